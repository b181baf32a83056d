"""The ways of sampling that `bench family` compares: what each paints, how straight it is, its time."""

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
from .generate import BATCH, Files, check_files, files_of, load_models, paint
from .prompts import Prompt

SIDE = 128  # pixels of every picture, both ways
STRAIGHT_STEPS = 24
OnPasses = Callable[[int], None]
"""Told how many network passes, counted once for each picture, a piece of work took."""


@dataclass(frozen=True)
class Member:
    """A network, and how it is meant to be used."""

    models: Models
    sampling: Sampling

    @property
    def passes(self) -> int:
        """Network passes of one Euler step, where it is guided."""
        return 2 if self.sampling.cfg_scale != 1.0 else 1

    def paint(
        self, prompts: Sequence[Prompt], steps: int, on_batch: Callable[[int], None]
    ) -> list[np.ndarray]:
        """A picture uint8 [SIDE, SIDE, 3] of each prompt; the noise depends on its place in the row alone."""
        return paint(self.models, prompts, replace(self.sampling, steps=steps), SIDE, SIDE, on_batch)

    def velocity(self, texts: Sequence[str]) -> Velocity:
        """The guided velocity of latents in model space, one for each of the texts, at any sigma."""
        encode, guidance = self.models.text_encoders.encode, self.sampling.guidance
        positive = replace(encode(list(texts)), guidance=guidance)
        negative = replace(encode([""] * len(texts)), guidance=guidance) if self.passes == 2 else None
        h, w = latent_size(SIDE, SIDE)
        way, network = self.sampling, self.models.transformer
        return guided_velocity(
            network,
            VelocityRequest(
                positive, None, h, w, len(texts), Guidance(negative, way.cfg_scale, way.cfg_until)
            ),
        )

    def png(self, text: str, steps: int, seed: int) -> bytes:
        """One picture from prompt to PNG, the models in memory."""
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


WAYS = {variant: replace(way, solver="euler") for variant, way in FAMILY.items()} | {
    "stochastic": FAMILY["pro"]
}
"""The ways of sampling: each member's own by Euler steps along its flow, and mini-pro's with noise added."""


def files_of_way(folder: Path, way: str) -> Files:
    """Where the network of one of WAYS lies in a folder of models."""
    return files_of(folder, "pro" if way == "stochastic" else way)


def load_members(folder: Path, ways: Sequence[str]) -> dict[str, Member]:
    """Those in a folder of models. Raises ValueError, before any is loaded, for a file that is missing."""
    files = {way: files_of_way(folder, way) for way in ways}
    for of_one in files.values():
        check_files(of_one)
    return {way: Member(load_models(files[way]), WAYS[way]) for way in ways}


@torch.no_grad()
def straightness_of(member: Member, prompts: Sequence[Prompt], on_passes: OnPasses) -> float:
    """S over STRAIGHT_STEPS equal steps from sigma 1 to 0, of a path for each prompt.

    That of flux_core/flow/straightness.py, a sum over the latent's elements, divided by their number, so
    that it doesn't grow with the picture.
    """
    h, w = latent_size(SIDE, SIDE)
    total, elements = 0.0, 1
    for start in range(0, len(prompts), BATCH):
        texts = [prompt.text for prompt in prompts[start : start + BATCH]]
        noise = draw_noise(start, len(texts), h, w)
        velocity = member.velocity(texts)
        total += len(texts) * straightness(velocity, noise.to(device()), STRAIGHT_STEPS)
        elements = noise[0].numel()
        on_passes(len(texts) * STRAIGHT_STEPS * member.passes)
    return total / len(prompts) / elements


def seconds_of(
    members: dict[str, Member],
    runs: Sequence[tuple[str, int]],
    prompts: Sequence[Prompt],
    rounds: int,
    on_passes: OnPasses,
) -> dict[tuple[str, int], float]:
    """Median seconds from prompt to PNG of each run, a (variant, steps).

    The runs take turns, in another order each round, so that whatever else the machine does slows all of
    them; a round before the first, in which memory is allocated, does not count.
    """
    taken: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    rng = random.Random(0)
    for number in range(rounds + 1):
        for variant, steps in rng.sample(list(runs), len(runs)):
            text = prompts[number % len(prompts)].text
            start = time.perf_counter()
            members[variant].png(text, steps, number)
            if number:
                taken[variant, steps].append(time.perf_counter() - start)
            on_passes(steps * members[variant].passes)
    return {run: statistics.median(times) for run, times in taken.items()}
