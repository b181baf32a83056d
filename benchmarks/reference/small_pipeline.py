"""A small FLUX.1: four models wired like the real ones, random weights; images by ours and by diffusers.

The transformer has heads of 128 dims like FLUX.1's, T5 reads 512 or 256 tokens, CLIP 77; rows of large
weights are multiples of 256, as GGUF's K types need.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from ...flux_core.model.autoencoder import AutoEncoder
from ...flux_core.model.transformer import FluxTransformer, pack
from ...flux_core.pipeline import Models, draw_noise, text_to_image
from .models import (
    autoencoder,
    diffusers_autoencoder,
    diffusers_pipeline,
    diffusers_transformer,
    flux_transformer,
)
from .quantized_files import WIDE, State
from .text import WORDS, clip_model, t5_model, t5_state, tokenizer

VARIANTS: dict[str, dict[str, object]] = {
    "dev": {},
    "schnell": {"guidance_embed": False},
    "Fill": {"in_channels": 384},
    "Canny": {"in_channels": 128},
}
"""How the transformers of FLUX.1 differ."""

WIDTH = 256
CLIP_WORDS = ("<|startoftext|>", *WORDS[3:], "<|endoftext|>")
PROMPT, SEED, SIDE, STEPS, GUIDANCE = "a red fox on a blue square", 7, 64, 4, 3.5


@dataclass(frozen=True)
class Small:
    """The four models of a pipeline: our transformer and autoencoder, transformers' encoders; float32."""

    transformer: FluxTransformer
    autoencoder: AutoEncoder
    t5: T5EncoderModel
    clip: CLIPTextModel

    def states(self) -> dict[str, State]:
        """Their tensors by model, with the names of FLUX.1's files."""
        clip = {f"text_model.{name}": tensor for name, tensor in self.clip.state_dict().items()}
        return {
            "transformer": self.transformer.state_dict(),
            "autoencoder": self.autoencoder.state_dict(),
            "t5": t5_state(self.t5),
            "clip": clip,
        }

    def with_weights(self, weights: Mapping[str, State]) -> Small:
        """The same models with other weights, by model, in float32; models not listed keep their own."""
        models: dict[str, nn.Module] = {}
        for part in self.states():
            models[part] = getattr(self, part)
            if part in weights:
                models[part] = copy.deepcopy(models[part])
                state = {n.removeprefix("text_model."): t.float() for n, t in weights[part].items()}
                if part == "t5":
                    state["encoder.embed_tokens.weight"] = state["shared.weight"]
                models[part].load_state_dict(state)
        return type(self)(**models)

    def references(self) -> References:
        """diffusers' and transformers' models with the same weights."""
        return References(
            diffusers_transformer(self.transformer),
            diffusers_autoencoder(self.autoencoder),
            self.t5,
            self.clip,
        )


@dataclass(frozen=True)
class References:
    """The four models of the reference implementations."""

    transformer: FluxTransformer2DModel
    autoencoder: AutoencoderKL
    t5: T5EncoderModel
    clip: CLIPTextModel

    def computing_in(self, dtype: torch.dtype) -> References:
        """Copies that compute in another dtype."""
        models = (self.transformer, self.autoencoder, self.t5, self.clip)
        return References(*(copy.deepcopy(model).to(dtype) for model in models))


def small(variant: str = "dev") -> Small:
    """A pipeline of a variant, always with the same weights."""
    t5 = t5_model(2, d_model=WIDTH, d_kv=64, num_heads=4, d_ff=2 * WIDTH, num_layers=2)
    clip = clip_model(
        3,
        vocab_size=len(CLIP_WORDS),
        hidden_size=WIDTH,
        num_attention_heads=WIDTH // 64,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=len(CLIP_WORDS) - 1,
    )
    transformer = flux_transformer(**{**WIDE, "depth": 2, "depth_single": 2, **VARIANTS[variant]})
    return Small(transformer, autoencoder(), t5, clip)


def save_tokenizers(folder: Path) -> list[Path]:
    """Two folders with a tokenizer.json each, CLIP's and T5's."""
    clip = tokenizer("<|startoftext|> $A <|endoftext|>", CLIP_WORDS)
    folders = []
    for name, words in (("clip", clip), ("t5", tokenizer("$A </s>"))):
        folders.append(folder / f"{name}_tokenizer")
        folders[-1].mkdir(parents=True, exist_ok=True)
        words.save(str(folders[-1] / "tokenizer.json"))
    return folders


def our_image(models: Models) -> Tensor:
    """An image [1, 3, SIDE, SIDE] in 0..1 by our pipeline."""
    shift = "by size" if models.transformer.spec.guidance_embed else "none"
    image = text_to_image(
        models, PROMPT, width=SIDE, height=SIDE, steps=STEPS, seed=SEED, guidance=GUIDANCE, shift=shift
    )
    return image / 2 + 0.5


@torch.no_grad()
def diffusers_image(references: References, t5_ids: Tensor, clip_ids: Tensor) -> Tensor:
    """The same by diffusers and transformers, computed in their dtype, from the same tokens and noise."""
    transformer, dtype = references.transformer, references.transformer.dtype
    pipeline = diffusers_pipeline(transformer, references.autoencoder, transformer.config.guidance_embeds)
    return pipeline(
        prompt_embeds=references.t5(input_ids=t5_ids).last_hidden_state,
        pooled_prompt_embeds=references.clip(input_ids=clip_ids).pooler_output,
        guidance_scale=GUIDANCE,
        width=SIDE,
        height=SIDE,
        num_inference_steps=STEPS,
        latents=pack(draw_noise(SEED, 1, SIDE // 8, SIDE // 8)).to(dtype),
        output_type="pt",
    ).images
