"""Case `png` of `bench speed`: from a prompt to the bytes of a PNG, [schnell] in four steps.

On a CPU the shipped mini-schnell; with --device cuda FLUX.1 [schnell] in full size, with T5-XXL and CLIP-L,
all weights random, in bf16. Timed are text encoding, steps, decoding and PNG encoding, not loading. Both
sides use the same text encoders of transformers; theirs is diffusers' pipeline, eager.
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
from .generate import check_files, load_models, model_files
from .interleaved import Effort, compare
from .reference.models import diffusers_autoencoder, diffusers_pipeline, randomize
from .speed_gpu import compiled_or_eager, one_line
from .speed_inputs import diffusers_twin, random_model
from .speed_settings import Note, Outcome, Settings, Skipped

PROMPT = "a red circle left of a blue square on a gray background"
SEED, STEPS = 7, 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of the four networks and of the image; the text encoders default to T5-XXL and CLIP-L."""

    transformer: FluxSpec = FLUX_SCHNELL
    autoencoder: AutoEncoderSpec = AutoEncoderSpec()
    t5: tuple[int, int, int, int] = (24, 4096, 10240, 64)
    """Layers, width, inner width of the MLP, heads of 64 dims."""
    clip: tuple[int, int, int, int] = (12, 768, 3072, 12)
    txt_length: int = 256
    side: int = 1024


def png(settings: Settings, sizes: Sizes | None = None) -> Iterator[Outcome]:
    """FLUX.1 [schnell] in full size on a GPU, random models of `sizes` if given, else mini-schnell."""
    try:
        check_files(model_files(settings.models, "schnell"))  # full size uses its tokenizers
    except ValueError as error:
        yield Skipped("png", str(error))
        return
    mini = load_models(model_files(settings.models, "schnell"))
    if sizes is None and settings.device.type != "cuda":
        twin: Any = diffusers_twin(mini.transformer)
        pack_weights(mini.transformer)
        yield from _compared(mini, twin, 128, settings, "mini-schnell")
        return
    sizes = sizes or Sizes()
    try:
        models = random_models(sizes, mini.text_encoders, settings.device)
        twin = diffusers_twin(models.transformer)
        model, reason = compiled_or_eager(models.transformer)
        note = f"[schnell] in bf16, ours {f'eager, {reason}' if reason else 'compiled'}"
        yield from _compared(replace(models, transformer=model), twin, sizes.side, settings, note)
    except RuntimeError as error:  # out of memory, or the compiler failed
        yield Skipped("png", one_line(error))


def _compared(models: Models, twin: Any, side: int, settings: Settings, note: str) -> Iterator[Outcome]:
    theirs = diffusers_pipeline(twin, diffusers_autoencoder(models.autoencoder), shifted=False)
    nn.Module.to(theirs.vae, models.autoencoder.device, models.autoencoder.dtype)
    encoders = models.text_encoders
    one, other = our_image(models, side), their_image(theirs, encoders, side)
    yield Note(f"png: largest difference {np.abs(one.astype(int) - other.astype(int)).max()} of 255")
    yield compare(
        f"png-{side}",
        lambda: png_bytes(our_image(models, side)),
        lambda: png_bytes(their_image(theirs, encoders, side)),
        settings.clock,
        Effort(settings.budget / 2),
        f"{note}, {STEPS} steps",
    )


def random_models(sizes: Sizes, tokenizers: TextEncoders, device: torch.device) -> Models:
    """All models with random weights in bf16; of the borrowed tokenizers only the token counts matter."""
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


def our_image(models: Models, side: int) -> np.ndarray:
    """uint8 [side, side, 3] of PROMPT."""
    image = text_to_image(
        models, PROMPT, width=side, height=side, steps=STEPS, seed=SEED, guidance=None, shift="none"
    )
    return to_bytes(image / 2 + 0.5)


def their_image(pipeline: Any, encoders: TextEncoders, side: int) -> np.ndarray:
    """The same image by diffusers' pipeline, its prompt encoded by transformers' models."""
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


def png_bytes(image: np.ndarray) -> bytes:
    """The image encoded as PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
