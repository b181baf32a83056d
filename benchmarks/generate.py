"""Prompts painted by the miniature and judged: what `bench adherence` and `bench family` share."""

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
Painter = Callable[[Sequence[Prompt]], list[np.ndarray]]
"""Prompts -> a picture uint8 [H, W, 3] of each."""


@dataclass(frozen=True)
class Files:
    """The four files of one member of the family."""

    transformer: Path
    vae: Path
    clip: Path
    t5: Path


@dataclass(frozen=True)
class Painted:
    """What became of one prompt: a verdict for each seed, and the sharpness of each picture that has one."""

    prompt: Prompt
    verdicts: list[dict[str, bool]]
    sharpness: list[float]

    @property
    def right(self) -> list[bool]:
        return [all(verdict.values()) for verdict in self.verdicts]


def files_of(models: Path, variant: str) -> Files:
    """Where a member of the family lies in a folder of models."""
    text, mini = models / "text_encoders", "rectiflux-mini"
    return Files(
        models / "diffusion_models" / f"{mini}-{variant}.safetensors",
        models / "vae" / f"{mini}-vae.safetensors",
        text / f"{mini}-clip.safetensors",
        text / f"{mini}-t5.safetensors",
    )


def load_models(files: Files) -> Models:
    """The models in float32. Raises what loading raises, and ValueError for a file that is not there."""
    check_files(files)
    options = {"dtype": torch.float32, "device": device()}
    return Models(
        load_text_encoders(files.clip, files.t5, **options),
        load_transformer(files.transformer, **options),
        load_autoencoder(files.vae, **options),
    )


def check_files(files: Files) -> None:
    """Raises ValueError for the first that is not there."""
    for path in astuple(files):
        if not path.is_file():
            raise ValueError(f"there is no {path}; train it (run.py train) or name another place")


def paint(
    models: Models,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    width: int = 128,
    height: int = 128,
    on_batch: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """A picture uint8 [height, width, 3] of each prompt; `on_batch` is told how many are done.

    The noise of the n-th prompt depends on n alone, whoever paints and in however many steps.
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


def judge_pictures(prompts: Sequence[Prompt], pictures: Sequence[np.ndarray], seeds: int) -> list[Painted]:
    """What became of each prompt; its pictures follow one another."""
    painted = []
    for i, prompt in enumerate(prompts):
        mine = pictures[i * seeds : (i + 1) * seeds]
        found = [parse_scene(picture) for picture in mine]
        sharp = [sharpness(picture, finding) for picture, finding in zip(mine, found, strict=True)]
        verdicts = [judge(finding, prompt.scene).correct for finding in found]
        painted.append(Painted(prompt, verdicts, [value for value in sharp if value is not None]))
    return painted


def figures_of(painted: Sequence[Painted]) -> dict[str, Any]:
    """Scores by category, overall and by prompt. A category's is the share of its pictures that are right."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(one.prompt.category for one in painted):
        mine = [one for one in painted if one.prompt.category == name]
        verdicts = [verdict for one in mine for verdict in one.verdicts]
        told = {key: [verdict[key] for verdict in verdicts if key in verdict] for key in ATTRIBUTES}
        found[name] = {
            "prompts": len(mine),
            "pictures": len(verdicts),
            "score": float(np.mean([all(verdict.values()) for verdict in verdicts])),
            "attributes": {key: float(np.mean(values)) for key, values in told.items() if values},
        }
    counted = [name for name in SIX if name in found] if set(SIX) <= found.keys() else list(found)
    sharp = [value for one in painted for value in one.sharpness]
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
            for one in painted
        ],
    }
