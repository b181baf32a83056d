"""Judging edits: is everything that was asked for in the image, and is the rest as it was?"""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy import ndimage

from .checker import PLACE_SLACK, SIZE_SLACK, Verdict
from .edits import SIDE, Edit
from .scene_parser import DetectedObject, ParsedScene

KEPT_SLACK = 0.03
"""Largest deviation of a center that the edit leaves alone, as a fraction of each side."""
BORDER = 4
"""Width in pixels of the border of changed places that does not count as untouched: the autoencoder blurs."""


def judge_edit(parsed: ParsedScene, edit: Edit) -> Verdict:
    """Whether an image has exactly the objects of the edited scene, where it has them, and its background.

    An edited object may deviate from its place as in checker.judge, any other by KEPT_SLACK.
    """
    wanted = edit.after.objects
    correct = {
        "count": len(parsed.objects) == len(wanted),
        "background": parsed.background == edit.after.background,
    }
    found = [_compare(order, edit) for order in itertools.permutations(parsed.objects, len(wanted))]
    nothing = dict.fromkeys(("shape", "colour", "size", "place"), False)
    few = len(parsed.objects) <= 5 and bool(found)
    return Verdict(correct | (max(found, key=lambda one: sum(one.values())) if few else nothing))


def _compare(found: tuple[DetectedObject, ...], edit: Edit) -> dict[str, bool]:
    pairs = list(zip(found, edit.after.objects, strict=True))
    slacks = [PLACE_SLACK if i in edit.edited else KEPT_SLACK for i in range(len(pairs))]
    return {
        "shape": all(one.shape == wanted.shape for one, wanted in pairs),
        "colour": all(one.color == wanted.color for one, wanted in pairs),
        "size": all(abs(one.radius * SIDE / wanted.radius - 1) <= SIZE_SLACK for one, wanted in pairs),
        "place": all(
            max(abs(one.x - wanted.x / SIDE), abs(one.y - wanted.y / SIDE)) <= slack
            for (one, wanted), slack in zip(pairs, slacks, strict=True)
        ),
    }


def untouched(edit: Edit) -> np.ndarray:
    """Where the edited image equals the first reference, bool [SIDE, SIDE], without a border of BORDER."""
    differs = (edit.after.render() != edit.references[0].render()).any(axis=-1)
    return ~ndimage.binary_dilation(differs, iterations=BORDER)


def untouched_psnr(image: np.ndarray, edit: Edit) -> float | None:
    """Peak signal-to-noise ratio in dB of the untouched part of an image; None without such a part."""
    where = untouched(edit)
    if not where.any():
        return None
    error = image[where].astype(np.float64) - edit.references[0].render()[where]
    mean = float(np.mean(error**2))
    return 10 * math.log10(255**2 / mean) if mean else math.inf
