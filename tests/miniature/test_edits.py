"""Edits: only what an instruction names changes; held-out results; the checker's verdicts on renders."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from rectiflux.miniature.checker import parse_scene
from rectiflux.miniature.edit_checker import judge_edit, untouched, untouched_psnr
from rectiflux.miniature.edits import (
    HELD_OUT_KINDS,
    KINDS,
    SIDE,
    Edit,
    PlacedScene,
    is_held_out,
    random_edit,
)
from rectiflux.miniature.scene import HELD_OUT_COUNTS, HELD_OUT_PAIRS, PlacedItem


def some(kind: str, count: int = 12) -> list[Edit]:
    rng = random.Random(kind)
    return [random_edit(rng, kind) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_objects_that_are_not_edited_stay_exactly_where_they_were(kind: str) -> None:
    for edit in some(kind, 50):
        kept = [one for i, one in enumerate(edit.after.objects) if i not in edit.edited]
        assert set(kept) <= set(edit.references[0].objects)
        assert edit.after != edit.references[0]
        assert kind == "background" or edit.after.background == edit.references[0].background
        assert len(edit.references) == (2 if kind == "two references" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_checker_accepts_the_edited_render_and_refuses_the_input(kind: str) -> None:
    for edit in some(kind):
        assert judge_edit(parse_scene(edit.after.render()), edit).passes, edit
        assert not judge_edit(parse_scene(edit.references[0].render()), edit).passes, edit


def test_training_draws_no_held_out_result() -> None:
    rng = random.Random(5)
    edits = [random_edit(rng) for _ in range(600)]
    assert not any(is_held_out(placed) for edit in edits for placed in (*edit.references, edit.after))
    assert {edit.kind for edit in edits} == set(KINDS) - {"two references"}


@pytest.mark.parametrize("kind", HELD_OUT_KINDS)
def test_held_out_results_are_drawn_on_request(kind: str) -> None:
    """Held-out pairs, or for "make both yellow" a held-out count such as two equal diamonds."""
    for seed in range(5):
        edit = random_edit(random.Random(seed), kind, held_out=True)
        pairs = [(one.shape, one.color) for one in edit.after.objects]
        assert set(pairs) & HELD_OUT_PAIRS or (len(pairs), pairs[0][0]) in HELD_OUT_COUNTS
        assert not is_held_out(edit.references[0])


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="'rotate'"):
        random_edit(random.Random(0), "rotate")
    with pytest.raises(ValueError, match="'move'"):
        random_edit(random.Random(0), "move", held_out=True)


def test_a_shifted_neighbor_and_a_wrong_color_are_wrong() -> None:
    """The star is recolored; the square beside it must not move by 6 of 128 pixels."""
    star, square = PlacedItem("star", "red", 35, 64, 21), PlacedItem("square", "blue", 93, 64, 21)
    before = PlacedScene((star, square), "gray")
    after = PlacedScene((replace(star, color="green"), square), "gray")
    edit = Edit("recolor", (before,), "make the star green", after, (0,))
    shifted = replace(after, objects=(after.objects[0], replace(square, x=99.0)))
    verdict = judge_edit(parse_scene(shifted.render()), edit).correct
    assert [name for name, right in verdict.items() if not right] == ["place"]
    verdict = judge_edit(parse_scene(before.render()), edit).correct
    assert [name for name, right in verdict.items() if not right] == ["colour"]


def test_the_untouched_part_excludes_what_changes_and_its_psnr_is_exact() -> None:
    """An error of 1 level everywhere is 20 log10(255) = 48.13 dB; changes elsewhere do not count."""
    edit = some("recolor")[0]
    changes = (edit.after.render() != edit.references[0].render()).any(axis=-1)
    where = untouched(edit)
    assert not (where & changes).any() and 0.3 < where.mean() < 0.98
    image = edit.references[0].render()
    image = np.where(image > 0, image - 1, 1).astype(np.uint8)
    image[changes] = 0
    assert untouched_psnr(image, edit) == pytest.approx(48.1308, abs=1e-4)
    assert untouched_psnr(edit.after.render(), edit) == float("inf")
    assert image.shape == (SIDE, SIDE, 3)
