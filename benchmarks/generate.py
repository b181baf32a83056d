"""Generate images with the miniature and score them: shared by `bench adherence` and `bench family`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..flux_core.pipeline import Models
from ..flux_core.train.loop import device
from ..flux_core.weights import load_autoencoder, load_text_encoders, load_transformer
from ..miniature.checker import ATTRIBUTES, judge, parse_scene, sharpness
from ..miniature.evaluate import Sampling, generate_images
from .prompts import SIX, Prompt

BATCH = 16
Generate = Callable[[Sequence[Prompt]], list[np.ndarray]]
"""Prompts -> an image uint8 [H, W, 3] of each."""


@dataclass(frozen=True)
class ModelFiles:
    """The four files of one variant of the miniature."""

    transformer: Path
    vae: Path
    clip: Path
    t5: Path


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt, the checker's verdict on each of its images, and the sharpness where it can be measured."""

    prompt: Prompt
    verdicts: list[dict[str, bool]]
    sharpness: list[float]

    @property
    def right(self) -> list[bool]:
        return [all(verdict.values()) for verdict in self.verdicts]


def model_files(models: Path, variant: str) -> ModelFiles:
    """The files of a variant in a folder of models."""
    text, mini = models / "text_encoders", "rectiflux-mini"
    return ModelFiles(
        models / "diffusion_models" / f"{mini}-{variant}.safetensors",
        models / "vae" / f"{mini}-vae.safetensors",
        text / f"{mini}-clip.safetensors",
        text / f"{mini}-t5.safetensors",
    )


def load_models(files: ModelFiles) -> Models:
    """The models in float32. Raises what loading raises, and ValueError for a missing file."""
    check_files(files)
    options = {"dtype": torch.float32, "device": device()}
    return Models(
        load_text_encoders(files.clip, files.t5, **options),
        load_transformer(files.transformer, **options),
        load_autoencoder(files.vae, **options),
    )


def check_files(files: ModelFiles) -> None:
    """Raises ValueError for the first missing file."""
    for path in astuple(files):
        if not path.is_file():
            raise ValueError(f"{path} is missing; train it (run.py train) or name another file")


def generate(
    models: Models,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    width: int = 128,
    height: int = 128,
    on_batch: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """An image uint8 [height, width, 3] of each prompt; `on_batch` is called with the count of images done.

    The noise of the n-th prompt depends on n alone, not on the model or the number of steps.
    """
    return generate_images(
        models.transformer,
        models.text_encoders,
        lambda latents: models.autoencoder.decode(latents).cpu(),
        [prompt.text for prompt in prompts],
        sampling,
        batch=BATCH,
        width=width,
        height=height,
        on_batch=on_batch,
    )


def check_images(prompts: Sequence[Prompt], images: Sequence[np.ndarray], seeds: int) -> list[ScoredPrompt]:
    """Each prompt with the verdicts on its `seeds` images, which follow one another."""
    scored = []
    for i, prompt in enumerate(prompts):
        own = images[i * seeds : (i + 1) * seeds]
        findings = [parse_scene(image) for image in own]
        sharp = [sharpness(image, finding) for image, finding in zip(own, findings, strict=True)]
        verdicts = [judge(finding, prompt.scene).correct for finding in findings]
        scored.append(ScoredPrompt(prompt, verdicts, [value for value in sharp if value is not None]))
    return scored


def scores(scored: Sequence[ScoredPrompt]) -> dict[str, Any]:
    """Scores by category, overall and by prompt; a category's is the share of its images that are right."""
    found = {
        name: _category([one for one in scored if one.prompt.category == name])
        for name in dict.fromkeys(one.prompt.category for one in scored)
    }
    counted = [name for name in SIX if name in found] if set(SIX) <= found.keys() else list(found)
    sharp = [value for one in scored for value in one.sharpness]
    return {
        "overall": float(np.mean([found[name]["score"] for name in counted])),
        "categories": found,
        "sharpness": float(np.mean(sharp)) if sharp else float("nan"),
        "prompts": [
            {
                "prompt": one.prompt.text,
                "category": one.prompt.category,
                "right": one.right,
                "wrong": [[key for key, right in verdict.items() if not right] for verdict in one.verdicts],
            }
            for one in scored
        ],
    }


def _category(scored: Sequence[ScoredPrompt]) -> dict[str, Any]:
    """The score of one category, and the share of images that are right in each attribute asked for."""
    verdicts = [verdict for one in scored for verdict in one.verdicts]
    asked = {key: [verdict[key] for verdict in verdicts if key in verdict] for key in ATTRIBUTES}
    return {
        "prompts": len(scored),
        "images": len(verdicts),
        "score": float(np.mean([all(verdict.values()) for verdict in verdicts])),
        "attributes": {key: float(np.mean(values)) for key, values in asked.items() if values},
    }
