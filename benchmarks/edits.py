"""`bench adherence --variant kontext`: does the miniature follow instructions, and leave the rest alone?

Every kind of edit (miniature/edits.py) has EACH edits, and so has "unseen": edits whose result training never
draws. An edit is right when the image has exactly the objects and the background that were asked for, in
their places; the overall score is the mean over the kinds, without "unseen". The PSNR compares what the edit
leaves alone with the input image, at least four pixels from what changes, as the mean over images.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..flux_core.train.progress import ProgressLine
from ..miniature.checker import parse_scene
from ..miniature.edit_checker import judge_edit, untouched_psnr
from ..miniature.edits import HELD_OUT_KINDS, KINDS, Edit, random_edit
from ..miniature.evaluate import Sampling, image_grid
from ..miniature.kontext import edit_images
from .generate import BATCH, ModelFiles, load_models, model_files
from .prompts import EACH
from .report import write_report

UNSEEN = "unseen"
GenerateEdits = Callable[[Sequence[Edit]], list[np.ndarray]]
"""Edits -> an image uint8 [H, W, 3] of each."""


@dataclass(frozen=True)
class ScoredEdit:
    """An image of an edit: whether each attribute is right, and PSNR in dB of what should stay, if any."""

    edit: Edit
    correct: dict[str, bool]
    psnr: float | None

    @property
    def right(self) -> bool:
        return all(self.correct.values())


def built_in_edits() -> dict[str, list[Edit]]:
    """EACH edits of every kind, and of held-out results under UNSEEN; always the same."""
    found = {}
    for kind in KINDS:
        rng = random.Random(f"bench {kind}")
        found[kind] = [random_edit(rng, kind) for _ in range(EACH)]
    rng = random.Random(f"bench {UNSEEN}")
    kinds = [HELD_OUT_KINDS[i % len(HELD_OUT_KINDS)] for i in range(EACH)]
    found[UNSEEN] = [random_edit(rng, kind, held_out=True) for kind in kinds]
    return found


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that edits do not have."""
    given = {
        "--prompts": args.prompts is not None,
        "--cfg": args.cfg is not None,
        "--cfg-until": args.cfg_until is not None,
        "--size": args.size != (128, 128),
    }
    for option, is_given in given.items():
        if is_given:
            raise ValueError(f"--variant kontext has built-in edits of 128x128 without CFG, got {option}")


def run_edits(args: argparse.Namespace, sampling: Sampling, generator: GenerateEdits | None = None) -> float:
    """Print scores of all edits; the overall one. Raises OSError and ValueError for invalid input."""
    check_options(args)
    share, seeds, renders = (8, 1, 64) if args.quick else (1, args.seeds, args.renders)
    edits = {kind: some[::share] for kind, some in built_in_edits().items()}
    generator = generator or load_editor(args, sampling)
    figures: dict[str, Any] = {"sampling": asdict(sampling), "checker": edit_checker_accuracy(renders)}
    print(
        f"checker: {figures['checker']['accuracy']:.4f} of {renders} rendered edits pass, "
        f"{figures['checker']['false_accepts']:.4f} of unedited inputs",
        flush=True,
    )
    asked = [edit for some in edits.values() for edit in some for _ in range(seeds)]
    start = time.perf_counter()
    images = generator(asked)
    figures["seconds_per_image"] = (time.perf_counter() - start) / len(images)
    scored = [score_edit(edit, image) for edit, image in zip(asked, images, strict=True)]
    sizes = {kind: len(some) * seeds for kind, some in edits.items()}
    figures |= edit_scores(scored, sizes)
    print_edit_scores(figures)
    if args.sheet is not None:
        Image.fromarray(edit_sheet(asked[::seeds], images[::seeds], len(edits[UNSEEN]))).save(args.sheet)
    write_report(args, "adherence", figures)
    return figures["overall"]


def edit_checker_accuracy(count: int) -> dict[str, float]:
    """Shares of `count` rendered edits, and of their unedited inputs, that pass."""
    rng = random.Random("edit checker")
    edits = [random_edit(rng, KINDS[i % len(KINDS)]) for i in range(count)]
    right = [judge_edit(parse_scene(edit.after.render()), edit).passes for edit in edits]
    wrong = [judge_edit(parse_scene(edit.references[0].render()), edit).passes for edit in edits]
    return {"accuracy": float(np.mean(right)), "false_accepts": float(np.mean(wrong))}


def load_editor(args: argparse.Namespace, sampling: Sampling) -> GenerateEdits:
    """A generator with the models of the options. Raises what loading raises."""
    files = model_files(args.models, "kontext")
    clip, t5 = args.text or (files.clip, files.t5)
    models = load_models(ModelFiles(args.model or files.transformer, args.vae or files.vae, clip, t5))

    def generator(edits: Sequence[Edit]) -> list[np.ndarray]:
        line, images = ProgressLine(len(edits)), []
        while len(images) < len(edits):
            first = edits[len(images)]
            rest = edits[len(images) : len(images) + BATCH]
            part = [edit for edit in rest if len(edit.references) == len(first.references)]
            part = part if part == list(rest) else [first]
            images += edit_images(
                models.transformer,
                models.text_encoders,
                models.autoencoder,
                part,
                sampling,
                seed=len(images),
            )
            line.update(len(images), "images edited")
        return images

    return generator


def score_edit(edit: Edit, image: np.ndarray) -> ScoredEdit:
    """The checker's verdict on an image, and the PSNR of what it should have left alone."""
    return ScoredEdit(edit, judge_edit(parse_scene(image), edit).correct, untouched_psnr(image, edit))


def edit_scores(scored: Sequence[ScoredEdit], sizes: dict[str, int]) -> dict[str, Any]:
    """Scores by kind and overall; `sizes` are the number of images of each kind, in order."""
    found, start = {}, 0
    for kind, size in sizes.items():
        part = scored[start : start + size]
        start += size
        found[kind] = {
            "images": size,
            "score": float(np.mean([one.right for one in part])),
            "psnr": _mean_psnr(part),
            "attributes": {
                key: float(np.mean([one.correct[key] for one in part])) for key in part[0].correct
            },
        }
    kept = [one for one in scored if one.psnr is not None]
    return {
        "overall": float(np.mean([found[kind]["score"] for kind in KINDS])),
        "psnr": _mean_psnr(kept),
        "categories": found,
        "edits": [
            {"instruction": one.edit.instruction, "kind": one.edit.kind, "correct": one.correct}
            for one in scored
        ],
    }


def _mean_psnr(scored: Sequence[ScoredEdit]) -> float | None:
    """Mean PSNR in dB of images with an untouched part that is not exactly the input's; None without any."""
    values = [one.psnr for one in scored if one.psnr is not None and math.isfinite(one.psnr)]
    return float(np.mean(values)) if values else None


def print_edit_scores(figures: dict[str, Any]) -> None:
    print(f"{'edit':20}score    images  untouched  share of images right in each attribute")
    for kind, row in figures["categories"].items():
        parts = "  ".join(f"{key} {share:.2f}" for key, share in row["attributes"].items())
        print(f"{kind:20}{row['score']:5.2f}  {row['images']:8}  {_decibels(row['psnr']):>9}  {parts}")
    print(f"{figures['seconds_per_image']:.3f} seconds an image, untouched {_decibels(figures['psnr'])}")


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


def edit_sheet(edits: Sequence[Edit], images: Sequence[np.ndarray], each: int) -> np.ndarray:
    """A contact sheet, two rows a kind: the last references of eight of its `each` edits, then the images."""
    shown: list[np.ndarray] = []
    for start in range(0, len(edits), each):
        chosen = [start + k * each // 8 if each >= 8 else start + k % each for k in range(8)]
        shown += [edits[i].references[-1].render() for i in chosen] + [images[i] for i in chosen]
    return image_grid(shown, 8)
