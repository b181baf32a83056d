"""Connected regions against masks whose pieces can be counted by eye."""

from __future__ import annotations

import numpy as np
from rectiflux.flux_core.train.regions import erode, fill_holes, pieces


def mask(*rows: str) -> np.ndarray:
    return np.array([[place == "#" for place in row] for row in rows])


def test_pieces_are_told_apart_and_ordered_by_size() -> None:
    """A ring, a corner that touches it only diagonally, a single pixel: three pieces of 8, 3 and 1."""
    picture = mask(
        "###....",
        "#.#....",
        "###....",
        "...##..",
        "...#..#",
    )
    found = pieces(picture)
    assert [int(piece.sum()) for piece in found] == [8, 3, 1]
    assert np.array_equal(np.sum(found, axis=0), picture)


def test_a_winding_piece_is_one() -> None:
    """A snake, whose ends are far apart along it."""
    picture = mask("#######", "......#", "#######", "#......", "#######")
    assert len(pieces(picture)) == 1
    assert pieces(np.zeros((3, 3), dtype=bool)) == []


def test_holes_are_filled_and_bays_are_not() -> None:
    picture = mask("####.", "#..#.", "####.", "#....", "###..")
    filled = mask("####.", "####.", "####.", "#....", "###..")
    assert np.array_equal(fill_holes(picture), filled)


def test_a_hole_at_the_frame_is_no_hole() -> None:
    picture = mask("#.#", "#.#", "###")
    assert np.array_equal(fill_holes(picture), picture)


def test_erosion_takes_the_rim_off() -> None:
    picture = np.zeros((9, 9), dtype=bool)
    picture[1:8, 1:8] = True
    for rim, side in ((1, 5), (2, 3), (3, 1), (4, 0)):
        assert erode(picture, rim).sum() == side**2
    assert erode(np.ones((4, 4), dtype=bool), 2).all()  # what lies beyond the frame is unknown, not outside
