"""Positions of references; expected values worked out by hand from ComfyUI's description of the methods.

That whole images agree with ComfyUI's is in tests/comfyui/test_patches.py.
"""

from __future__ import annotations

import pytest
import torch
from rectiflux.flux_core.model.tokens import image_ids
from rectiflux.flux_core.tools.references import Placement, RopeScale, latent_ids, place_references


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("offset", [(1, 0, 0), (1, 8, 0), (1, 0, 12)]),
        ("index", [(1, 0, 0), (2, 0, 0), (3, 0, 0)]),
        ("index_timestep_zero", [(1, 0, 0), (2, 0, 0), (3, 0, 0)]),
        ("uxo", [(0, 10, 14), (0, 18, 26), (0, 22, 32)]),
    ],
)
def test_placements(method: str, expected: list[tuple[int, int, int]]) -> None:
    sizes = [(8, 12), (4, 6), (10, 2)]
    placed = place_references(sizes, 10, 14, method)
    assert [(p.index, p.row, p.column) for p in placed] == expected


def test_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match="'diagonal'"):
        place_references([], 10, 14, "diagonal")


def test_ids_of_a_plain_latent_are_its_rows_and_columns() -> None:
    assert torch.equal(latent_ids(6, 10), image_ids(6, 10))
    assert torch.equal(latent_ids(5, 9), image_ids(6, 10))


def test_placed_and_scaled_ids() -> None:
    ids = latent_ids(4, 6, Placement(2.0, 5, 8), RopeScale(2.0, 0.5, 1.0, -1.0, 3.0)).reshape(2, 3, 3)
    assert ids[..., 0].unique().tolist() == [5.0]
    assert ids[:, 0, 1].tolist() == [2.0, 2.5]
    assert ids[0, :, 2].tolist() == [5.0, 7.0, 9.0]
