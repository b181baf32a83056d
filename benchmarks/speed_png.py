"""Case `png` of `bench speed`: from a prompt's words to the bytes of a PNG, [schnell] in four steps.

On a CPU the shipped mini-schnell; with --device cuda FLUX.1 [schnell] in full size, with T5-XXL and CLIP-L,
all weights random, in bf16. Text encoding, steps, decoding and writing are in it, models are loaded. Both
sides have the same text encoders, by transformers; theirs is diffusers' pipeline, eager.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ..flux_core.backends.cpu_pack import pack_weights
from ..flux_core.model.autoencoder import AutoEncoder, AutoEncoderSpec
from ..flux_core.model.spec import FLUX_SCHNELL, FluxSpec
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import FluxTransformer, pack
from ..flux_core.pipeline import Models, draw_noise, text_to_image
from .generate import check_files, files_of, load_models
from .interleaved import compare
from .reference.models import diffusers_autoencoder, diffusers_pipeline, randomize
from .speed_gpu import compiled_or_not, first_words
from .speed_inputs import diffusers_twin, random_model
from .speed_settings import Outcome, Settings, Skipped, Told

PROMPT = "a red circle left of a blue square on a gray background"
SEED, STEPS = 7, 4


@dataclass(frozen=True)
class Sizes:
    """Of all four networks, and of the picture. T5-XXL and CLIP-L unless given."""

    transformer: FluxSpec = FLUX_SCHNELL
    autoencoder: AutoEncoderSpec = AutoEncoderSpec()
    t5: tuple[int, int, int, int] = (24, 4096, 10240, 64)
    """Layers, width, inner width of the MLP, heads of 64."""
    clip: tuple[int, int, int, int] = (12, 768, 3072, 12)
    txt_length: int = 256
    side: int = 1024


def png(settings: Settings, sizes: Sizes | None = None) -> Iterator[Outcome]:
    """Full size on a GPU, or where `sizes` are given; else the miniature."""
    try:
        check_files(files_of(settings.models, "schnell"))  # full size takes its tokenizers
    except ValueError as error:
        yield Skipped("png", str(error))
        return
    mini = load_models(files_of(settings.models, "schnell"))
    if sizes is None and settings.device.type != "cuda":
        twin: Any = diffusers_twin(mini.transformer)
        pack_weights(mini.transformer)
        yield from _compared(mini, twin, 128, settings, "mini-schnell")
        return
    sizes = sizes or Sizes()
    try:
        models = random_models(sizes, mini.text_encoders, settings.device)
        twin = diffusers_twin(models.transformer)
        model, why = compiled_or_not(models.transformer)
        note = f"[schnell] in bf16, ours {f'eager, {why}' if why else 'compiled'}"
        yield from _compared(replace(models, transformer=model), twin, sizes.side, settings, note)
    except RuntimeError as error:  # out of memory, or what compiling stumbles over
        yield Skipped("png", first_words(error))


def _compared(models: Models, twin: Any, side: int, settings: Settings, note: str) -> Iterator[Outcome]:
    theirs = diffusers_pipeline(twin, diffusers_autoencoder(models.autoencoder), shifted=False)
    nn.Module.to(theirs.vae, models.autoencoder.device, models.autoencoder.dtype)
    encoders = models.text_encoders
    one, other = our_picture(models, side), their_picture(theirs, encoders, side)
    yield Told(f"png: largest difference {np.abs(one.astype(int) - other.astype(int)).max()} of 255")
    yield compare(
        f"png-{side}",
        lambda: written(our_picture(models, side)),
        lambda: written(their_picture(theirs, encoders, side)),
        settings.clock,
        settings.budget / 2,
        f"{note}, {STEPS} steps",
    )


def random_models(sizes: Sizes, tokenizers: TextEncoders, device: torch.device) -> Models:
    """All models with random weights in bf16; the tokenizers are another's, so only numbers of tokens fit."""
    layers, width, inner, heads = sizes.t5
    t5 = T5Config(
        vocab_size=32128, d_model=width, num_layers=layers, num_heads=heads, d_kv=64, d_ff=inner,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    layers, width, inner, heads = sizes.clip
    clip = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=None,
        eos_token_id=tokenizers.clip_end, pad_token_id=None,
    )  # fmt: skip
    with device:
        networks = T5EncoderModel(t5), CLIPTextModel(clip)
    for network in networks:
        nn.Module.to(network.requires_grad_(False).eval(), dtype=torch.bfloat16)
    encoders = TextEncoders(
        networks[0], tokenizers.t5_tokenizer, networks[1], tokenizers.clip_tokenizer, sizes.txt_length
    )
    autoencoder = AutoEncoder(sizes.autoencoder).eval().requires_grad_(False)
    randomize(autoencoder)
    transformer: FluxTransformer = random_model(sizes.transformer, torch.bfloat16, device)
    return Models(encoders, transformer, autoencoder.to(device, torch.bfloat16))


def our_picture(models: Models, side: int) -> np.ndarray:
    """uint8 [side, side, 3] of PROMPT."""
    image = text_to_image(
        models, PROMPT, width=side, height=side, steps=STEPS, seed=SEED, guidance=None, shift="none"
    )
    return to_bytes(image / 2 + 0.5)


def their_picture(pipeline: Any, encoders: TextEncoders, side: int) -> np.ndarray:
    """The same by diffusers' pipeline, its prompt by transformers' models."""
    dtype, device = pipeline.transformer.dtype, pipeline.transformer.device
    with torch.no_grad():
        txt = encoders.t5(input_ids=encoders.t5_ids([PROMPT]).to(device)).last_hidden_state
        pooled = encoders.clip(input_ids=encoders.clip_ids([PROMPT]).to(device)).pooler_output
    image = pipeline(
        prompt_embeds=txt.to(dtype),
        pooled_prompt_embeds=pooled.to(dtype),
        width=side,
        height=side,
        num_inference_steps=STEPS,
        latents=pack(draw_noise(SEED, 1, side // 8, side // 8)).to(device, dtype),
        output_type="pt",
    ).images
    return to_bytes(image)


def to_bytes(image: Tensor) -> np.ndarray:
    """uint8 [H, W, 3] of [1, 3, H, W] in 0..1."""
    return (image[0].float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def written(picture: np.ndarray) -> bytes:
    """The bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
