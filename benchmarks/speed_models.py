"""Cases of `bench speed`: autoencoder, text encoders, whole images and loading, against diffusers.

They run the shipped miniatures; diffusers gets the same weights in its own folders.
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
from .generate import ModelFiles, check_files, model_files
from .interleaved import Effort, compare
from .reference.models import diffusers_autoencoder, diffusers_pipeline, diffusers_transformer, randomize
from .speed_settings import NO_BFLOAT16, Note, Outcome, Settings, Skipped, supports_bfloat16

PROMPT = "a red circle left of a blue square on a gray background"
SEED, SIDE, GUIDANCE = 7, 128, 3.5
FULL_VAE = AutoEncoderSpec()


def autoencoder(settings: Settings) -> Iterator[Outcome]:
    """Decode and encode by FLUX.1's autoencoder at full width, random weights, fp32, both sides eager."""
    side = 64 if settings.quick else 256
    model = AutoEncoder(AutoEncoderSpec(ch=32) if settings.quick else FULL_VAE).eval().requires_grad_(False)
    randomize(model)
    twin: Any = diffusers_autoencoder(model).to(settings.device)
    model = model.to(settings.device)
    latent = torch.randn(1, 16, side // 8, side // 8, device=settings.device)
    image = torch.rand(1, 3, side, side, device=settings.device) * 2 - 1
    difference = (model.decode(latent) - twin.decode(latent).sample).abs().max()
    yield Note(f"vae: largest difference of a decode {float(difference):.1e}")
    runs = {
        "decode": (lambda: model.decode(latent), lambda: twin.decode(latent).sample),
        "encode": (lambda: model.encode(image), lambda: twin.encode(image).latent_dist.mode()),
    }
    for name, (ours, theirs) in runs.items():
        yield compare(f"vae-{name}-{side}", ours, theirs, settings.clock, Effort(settings.budget))
    yield from in_bfloat16(model, twin, latent, settings)


def in_bfloat16(model: AutoEncoder, twin: Any, latent: Tensor, settings: Settings) -> Iterator[Outcome]:
    """A decode in bfloat16 against theirs in both dtypes; converts our model in place."""
    case, clock, budget = f"vae-decode-bf16-{8 * latent.shape[-1]}", settings.clock, settings.budget
    if not settings.quick and not supports_bfloat16(settings.device):
        yield Skipped(case, NO_BFLOAT16)
        return
    exact = twin.decode(latent).sample
    model, rounded = model.bfloat16(), latent.bfloat16()
    error = (model.decode(rounded).float() - exact).abs().max()
    yield Note(f"{case}: largest difference to float32 {float(error):.1e}")
    ours = partial(model.decode, rounded)
    effort = Effort(budget, warm=True)
    yield compare(f"{case}-fp32", ours, lambda: twin.decode(latent).sample, clock, effort, "theirs in fp32")
    half = copy.deepcopy(twin).bfloat16()
    yield compare(case, ours, lambda: half.decode(rounded).sample, clock, Effort(budget), "theirs in bf16")


def images(settings: Settings) -> Iterator[Outcome]:
    """The miniature: text encoding, a whole image, the first image including loading, loading alone."""
    files = model_files(settings.models, "dev")
    try:
        check_files(files)
    except ValueError as error:
        for case in ("text-encode", "whole-picture", "first-picture", "load"):
            yield Skipped(case, str(error))
        return
    with tempfile.TemporaryDirectory() as name:
        yield from _images(Pair(files, Path(name), settings), settings)


class Pair:
    """Both sides' ways to load the miniature; the text encoders are loaded once and shared."""

    def __init__(self, files: ModelFiles, folder: Path, settings: Settings) -> None:
        """`folder` receives the models as diffusers saves them."""
        self.files, self.folder, self.device = files, folder, settings.device
        transformer = load_transformer(files.transformer, torch.float32)
        diffusers_transformer(transformer).half().save_pretrained(folder / "transformer")
        vae = load_autoencoder(files.vae, torch.float32)
        diffusers_autoencoder(vae).half().save_pretrained(folder / "vae")
        self.encoders = load_text_encoders(files.clip, files.t5, dtype=torch.float32, device=self.device)
        self.has_accelerate = importlib.util.find_spec("accelerate") is not None  # diffusers loads faster

    def load_ours(self) -> Models:
        transformer = load_transformer(self.files.transformer, torch.float32, self.device)
        pack_weights(transformer)
        autoencoder = load_autoencoder(self.files.vae, torch.float32, self.device)
        return Models(self.encoders, transformer, autoencoder)

    def load_theirs(self) -> Any:
        options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": self.has_accelerate}
        transformer = FluxTransformer2DModel.from_pretrained(self.folder / "transformer", **options)
        vae = AutoencoderKL.from_pretrained(self.folder / "vae", **options)
        return diffusers_pipeline(transformer, vae).to(self.device)


def _images(pair: Pair, settings: Settings) -> Iterator[Outcome]:
    clock, budget, steps = settings.clock, settings.budget, 2 if settings.quick else 8
    encoders, ours, theirs = pair.encoders, pair.load_ours(), pair.load_theirs()

    def generate_ours(models: Models) -> Tensor:
        return our_image(models, steps)

    def generate_theirs(pipeline: Any) -> Tensor:
        return their_image(pipeline, encoders, steps)

    difference = float((generate_ours(ours) - generate_theirs(theirs)).abs().max())
    yield Note(f"whole-picture: largest difference {difference:.1e} of 1")
    note = "the same transformers models on both sides"
    encode = partial(encoders.encode, [PROMPT])
    yield compare("text-encode", encode, partial(_encode, encoders), clock, Effort(budget / 4), note)
    run, other = partial(generate_ours, ours), partial(generate_theirs, theirs)
    yield compare("whole-picture", run, other, clock, Effort(budget))
    note = f"transformer and autoencoder; theirs {'with' if pair.has_accelerate else 'without'} accelerate"
    yield compare("load", pair.load_ours, pair.load_theirs, clock, Effort(budget / 2), note)
    yield compare(
        "first-picture",
        lambda: generate_ours(pair.load_ours()),
        lambda: generate_theirs(pair.load_theirs()),
        clock,
        Effort(budget),
        "from files to the first image, text encoders loaded",
    )


def our_image(models: Models, steps: int) -> Tensor:
    """[1, 3, SIDE, SIDE], 0..1."""
    image = text_to_image(models, PROMPT, width=SIDE, height=SIDE, steps=steps, seed=SEED, guidance=GUIDANCE)
    return image / 2 + 0.5


def their_image(pipeline: Any, encoders: TextEncoders, steps: int) -> Tensor:
    """The same image by diffusers' pipeline."""
    txt, pooled = _encode(encoders)
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
def _encode(encoders: TextEncoders) -> tuple[Tensor, Tensor]:
    """(txt, pooled) of PROMPT by transformers' models, called as diffusers calls them."""
    t5_ids, clip_ids = encoders.t5_ids([PROMPT]), encoders.clip_ids([PROMPT])
    device = encoders.t5.device
    txt = encoders.t5(input_ids=t5_ids.to(device)).last_hidden_state
    return txt, encoders.clip(input_ids=clip_ids.to(device)).pooler_output
