"""The sampling variants that `bench family` compares: their images, their straightness, their time."""

from __future__ import annotations

import io
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..flux_core.flow import straightness
from ..flux_core.model.spec import Velocity
from ..flux_core.pipeline import (
    Guidance,
    Models,
    VelocityRequest,
    draw_noise,
    guided_velocity,
    latent_size,
    text_to_image,
)
from ..flux_core.train.loop import device
from ..miniature.autoencoder import to_uint8
from ..miniature.evaluate import FAMILY, Sampling
from .generate import BATCH, ModelFiles, check_files, generate, load_models, model_files
from .prompts import Prompt

SIDE = 128  # width and height of every image
STRAIGHT_STEPS = 24
OnPasses = Callable[[int], None]
"""Called with the number of network passes that a piece of work took, counted per image."""


@dataclass(frozen=True)
class Variant:
    """A network and the sampling it is used with."""

    models: Models
    sampling: Sampling

    @property
    def passes(self) -> int:
        """Network passes of one Euler step: two with classifier-free guidance."""
        return 2 if self.sampling.cfg_scale != 1.0 else 1

    def generate(
        self, prompts: Sequence[Prompt], steps: int, on_batch: Callable[[int], None]
    ) -> list[np.ndarray]:
        """An image uint8 [SIDE, SIDE, 3] of each prompt; its noise depends only on the prompt's index."""
        return generate(self.models, prompts, replace(self.sampling, steps=steps), SIDE, SIDE, on_batch)

    def velocity(self, texts: Sequence[str]) -> Velocity:
        """The guided velocity of latents in model space, one latent for each text, at any sigma."""
        encode, guidance = self.models.text_encoders.encode, self.sampling.guidance
        positive = replace(encode(list(texts)), guidance=guidance)
        negative = replace(encode([""] * len(texts)), guidance=guidance) if self.passes == 2 else None
        h, w = latent_size(SIDE, SIDE)
        guidance_settings = Guidance(negative, self.sampling.cfg_scale, self.sampling.cfg_until)
        request = VelocityRequest(positive, None, h, w, len(texts), guidance_settings)
        return guided_velocity(self.models.transformer, request)

    def png(self, text: str, steps: int, seed: int) -> bytes:
        """One image from prompt to PNG, models loaded."""
        sampling = self.sampling
        image = text_to_image(
            self.models,
            text,
            width=SIDE,
            height=SIDE,
            steps=steps,
            seed=seed,
            guidance=sampling.guidance,
            cfg_scale=sampling.cfg_scale,
            cfg_until=sampling.cfg_until,
            solver=sampling.solver,
            shift=sampling.shift,
        )
        file = io.BytesIO()
        Image.fromarray(to_uint8(image.cpu())[0]).save(file, "PNG")
        return file.getvalue()


VARIANTS = {name: replace(sampling, solver="euler") for name, sampling in FAMILY.items()} | {
    "stochastic": FAMILY["pro"]
}
"""The variants: each model by Euler steps along its flow, and mini-pro also with noise added on the way."""


def variant_files(folder: Path, name: str) -> ModelFiles:
    """The files of one of VARIANTS in a folder of models."""
    return model_files(folder, "pro" if name == "stochastic" else name)


def load_variants(folder: Path, names: Sequence[str]) -> dict[str, Variant]:
    """Variants from a folder of models. Raises ValueError for a missing file before any is loaded."""
    files = {name: variant_files(folder, name) for name in names}
    for of_one in files.values():
        check_files(of_one)
    return {name: Variant(load_models(files[name]), VARIANTS[name]) for name in names}


@torch.no_grad()
def straightness_of(variant: Variant, prompts: Sequence[Prompt], on_passes: OnPasses) -> float:
    """S over STRAIGHT_STEPS equal steps from sigma 1 to 0, a mean over the prompts.

    The sum over the latent's elements that flux_core/flow/straightness.py returns, divided by the number of
    elements, so that it does not depend on the image size.
    """
    h, w = latent_size(SIDE, SIDE)
    total, elements = 0.0, 1
    for start in range(0, len(prompts), BATCH):
        texts = [prompt.text for prompt in prompts[start : start + BATCH]]
        noise = draw_noise(start, len(texts), h, w)
        velocity = variant.velocity(texts)
        total += len(texts) * straightness(velocity, noise.to(device()), STRAIGHT_STEPS)
        elements = noise[0].numel()
        on_passes(len(texts) * STRAIGHT_STEPS * variant.passes)
    return total / len(prompts) / elements


def seconds_of(
    variants: dict[str, Variant],
    runs: Sequence[tuple[str, int]],
    prompts: Sequence[Prompt],
    rounds: int,
    on_passes: OnPasses,
) -> dict[tuple[str, int], float]:
    """Median seconds from prompt to PNG of each run (variant, steps).

    The runs are interleaved, in another order each round, so that other load slows all of them; an extra
    first round warms up and does not count.
    """
    taken: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    rng = random.Random(0)
    for index in range(rounds + 1):
        for variant, steps in rng.sample(list(runs), len(runs)):
            text = prompts[index % len(prompts)].text
            start = time.perf_counter()
            variants[variant].png(text, steps, index)
            if index:  # round 0 warms up
                taken[variant, steps].append(time.perf_counter() - start)
            on_passes(steps * variants[variant].passes)
    return {run: statistics.median(times) for run, times in taken.items()}
