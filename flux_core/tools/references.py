"""Where the tokens of reference images stand beside the generated ones: their position ids.

The methods have the names that ComfyUI 0.33 gives them (comfy/ldm/flux/model.py, Flux._forward and
process_img). All sides are of latents, in latent pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

METHODS = ("offset", "index", "uxo", "index_timestep_zero")
"""How references are placed: on one image index beside each other, on an index each, diagonally behind the
generated image, or as "index" with the modulation of sigma 0."""


@dataclass(frozen=True)
class RopeScale:
    """Scales and shifts of the image positions; (1, 0) everywhere changes nothing."""

    scale_x: float = 1.0
    scale_y: float = 1.0
    shift_x: float = 0.0
    shift_y: float = 0.0
    shift_t: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Position of a reference: image index, and row and column of its first latent pixel."""

    index: float = 0.0
    row: int = 0
    column: int = 0


def place_references(sizes: Iterable[Sequence[int]], h: int, w: int, method: str) -> list[Placement]:
    """Placements of references of sizes (h, w) beside a generated latent of h x w.

    Raises ValueError for another method than METHODS.
    """
    if method not in METHODS:
        raise ValueError(f"references are placed by one of {', '.join(METHODS)}, got {method!r}")
    placed: list[Placement] = []
    used_h = used_w = 0
    for number, (ref_h, ref_w) in enumerate(sizes):
        if method in ("index", "index_timestep_zero"):
            placed.append(Placement(number + 1.0))
        elif method == "uxo":
            placed.append(Placement(0.0, (h + 1) // 2 * 2 + used_h, (w + 1) // 2 * 2 + used_w))
            used_h, used_w = used_h + ref_h, used_w + ref_w
        else:
            right = ref_h + used_h > ref_w + used_w
            row, column = (0, used_w) if right else (used_h, 0)
            placed.append(Placement(1.0, row, column))
            used_h, used_w = max(used_h, ref_h + row), max(used_w, ref_w + column)
    return placed


def latent_ids(h: int, w: int, at: Placement = Placement(), scale: RopeScale = RopeScale()) -> Tensor:
    """Position ids [N, 3], float32, of the tokens of an h x w latent; odd sides count as padded to even."""
    rows, columns = (h + 1) // 2, (w + 1) // 2
    first_row = (at.row + 1) // 2 + scale.shift_y
    first_column = (at.column + 1) // 2 + scale.shift_x
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = at.index + scale.shift_t
    last_row, last_column = (rows - 1.0) * scale.scale_y, (columns - 1.0) * scale.scale_x
    ids[..., 1] = torch.linspace(first_row, last_row + first_row, rows)[:, None]
    ids[..., 2] = torch.linspace(first_column, last_column + first_column, columns)[None, :]
    return rearrange(ids, "h w i -> (h w) i")
