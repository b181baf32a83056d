"""Cases of `bench speed`: autoencoder, text encoders, whole pictures and loading, against diffusers.

They run the shipped miniatures; theirs has the same weights, in folders as diffusers keeps them.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor

from ..flux_core.backends.cpu_pack import pack_weights
from ..flux_core.model.autoencoder import AutoEncoder, AutoEncoderSpec
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import pack
from ..flux_core.pipeline import Models, draw_noise, text_to_image
from ..flux_core.weights import load_autoencoder, load_text_encoders, load_transformer
from .generate import Files, check_files, files_of
from .interleaved import compare
from .reference.models import diffusers_autoencoder, diffusers_pipeline, diffusers_transformer, randomize
from .speed_settings import NO_BFLOAT16, Outcome, Settings, Skipped, Told, knows_bfloat16

PROMPT = "a red circle left of a blue square on a gray background"
SEED, SIDE, GUIDANCE = 7, 128, 3.5
FULL_VAE = AutoEncoderSpec()


def autoencoder(settings: Settings) -> Iterator[Outcome]:
    """FLUX.1's autoencoder in full width with random weights, fp32: decode and encode, eager as it comes."""
    side = 64 if settings.quick else 256
    model = AutoEncoder(AutoEncoderSpec(ch=32) if settings.quick else FULL_VAE).eval().requires_grad_(False)
    randomize(model)
    twin: Any = diffusers_autoencoder(model).to(settings.device)
    model = model.to(settings.device)
    latent = torch.randn(1, 16, side // 8, side // 8, device=settings.device)
    image = torch.rand(1, 3, side, side, device=settings.device) * 2 - 1
    difference = (model.decode(latent) - twin.decode(latent).sample).abs().max()
    yield Told(f"vae: largest difference of a decode {float(difference):.1e}")
    clock, budget = settings.clock, settings.budget
    yield compare(
        f"vae-decode-{side}", lambda: model.decode(latent), lambda: twin.decode(latent).sample, clock, budget
    )
    yield compare(
        f"vae-encode-{side}",
        lambda: model.encode(image),
        lambda: twin.encode(image).latent_dist.mode(),
        clock,
        budget,
    )
    yield from in_bfloat16(model, twin, latent, settings)


def in_bfloat16(model: AutoEncoder, twin: Any, latent: Tensor, settings: Settings) -> Iterator[Outcome]:
    """A decode in bfloat16 against theirs in both dtypes; ours is converted for it."""
    case, clock, budget = f"vae-decode-bf16-{8 * latent.shape[-1]}", settings.clock, settings.budget
    if not settings.quick and not knows_bfloat16(settings.device):
        yield Skipped(case, NO_BFLOAT16)
        return
    exact = twin.decode(latent).sample
    model, small = model.bfloat16(), latent.bfloat16()
    lost = (model.decode(small).float() - exact).abs().max()
    yield Told(f"{case}: largest difference to float32 {float(lost):.1e}")
    ours = partial(model.decode, small)
    note = "theirs in fp32"
    yield compare(f"{case}-fp32", ours, lambda: twin.decode(latent).sample, clock, budget, note, warm=True)
    half = copy.deepcopy(twin).bfloat16()
    yield compare(case, ours, lambda: half.decode(small).sample, clock, budget, "theirs in bf16")


def pictures(settings: Settings) -> Iterator[Outcome]:
    """The miniature: text encode, a whole picture, time from files to the first one, loading."""
    files = files_of(settings.models, "dev")
    try:
        check_files(files)
    except ValueError as error:
        for case in ("text-encode", "whole-picture", "first-picture", "load"):
            yield Skipped(case, str(error))
        return
    with tempfile.TemporaryDirectory() as name:
        yield from _pictures(files, Path(name), settings)


def _pictures(files: Files, folder: Path, settings: Settings) -> Iterator[Outcome]:
    clock, budget, steps = settings.clock, settings.budget, 2 if settings.quick else 8
    plain = load_transformer(files.transformer, torch.float32), load_autoencoder(files.vae, torch.float32)
    diffusers_transformer(plain[0]).half().save_pretrained(folder / "transformer")
    diffusers_autoencoder(plain[1]).half().save_pretrained(folder / "vae")
    encoders = load_text_encoders(files.clip, files.t5, dtype=torch.float32, device=settings.device)

    accelerated = importlib.util.find_spec("accelerate") is not None  # diffusers loads faster with it

    def load_ours() -> Models:
        transformer = load_transformer(files.transformer, torch.float32, settings.device)
        pack_weights(transformer)
        return Models(encoders, transformer, load_autoencoder(files.vae, torch.float32, settings.device))

    def load_theirs() -> Any:
        options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": accelerated}
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer", **options)
        vae = AutoencoderKL.from_pretrained(folder / "vae", **options)
        return diffusers_pipeline(transformer, vae).to(settings.device)

    def paint_ours(models: Models) -> Tensor:
        return our_picture(models, steps)

    def paint_theirs(pipeline: Any) -> Tensor:
        return their_picture(pipeline, encoders, steps)

    ours, theirs = load_ours(), load_theirs()
    difference = float((paint_ours(ours) - paint_theirs(theirs)).abs().max())
    yield Told(f"whole-picture: largest difference {difference:.1e} of 1")
    yield compare(
        "text-encode", lambda: encoders.encode([PROMPT]), lambda: _read(encoders), clock, budget / 4,
        "the same transformers models on both sides",
    )  # fmt: skip
    yield compare("whole-picture", lambda: paint_ours(ours), lambda: paint_theirs(theirs), clock, budget)
    yield compare(
        "load",
        load_ours,
        load_theirs,
        clock,
        budget / 2,
        f"transformer and autoencoder; theirs {'with' if accelerated else 'without'} accelerate",
    )
    first = "from files to the first picture, text encoders loaded"
    yield compare(
        "first-picture",
        lambda: paint_ours(load_ours()),
        lambda: paint_theirs(load_theirs()),
        clock,
        budget,
        first,
    )


def our_picture(models: Models, steps: int) -> Tensor:
    """[1, 3, SIDE, SIDE], 0..1."""
    image = text_to_image(models, PROMPT, width=SIDE, height=SIDE, steps=steps, seed=SEED, guidance=GUIDANCE)
    return image / 2 + 0.5


def their_picture(pipeline: Any, encoders: TextEncoders, steps: int) -> Tensor:
    """The same by diffusers' pipeline."""
    txt, pooled = _read(encoders)
    return pipeline(
        prompt_embeds=txt,
        pooled_prompt_embeds=pooled,
        guidance_scale=GUIDANCE,
        width=SIDE,
        height=SIDE,
        num_inference_steps=steps,
        latents=pack(draw_noise(SEED, 1, SIDE // 8, SIDE // 8)).to(txt.device),
        output_type="pt",
    ).images


@torch.no_grad()
def _read(encoders: TextEncoders) -> tuple[Tensor, Tensor]:
    """The prompt by transformers' models, called as diffusers calls them."""
    t5_ids, clip_ids = encoders.t5_ids([PROMPT]), encoders.clip_ids([PROMPT])
    device = encoders.t5.device
    txt = encoders.t5(input_ids=t5_ids.to(device)).last_hidden_state
    return txt, encoders.clip(input_ids=clip_ids.to(device)).pooler_output
