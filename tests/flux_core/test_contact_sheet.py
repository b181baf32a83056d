"""The contact sheet: every image complete in its cell, labels below, and what is refused."""

from __future__ import annotations

import pytest
import torch
from rectiflux.flux_core.contact_sheet import BACKGROUND, side_by_side


def test_images_are_complete_in_their_columns_and_rows() -> None:
    """Two of 20 x 30 beside one of 10 x 10: cells of 20 x 30, gaps of 8, the small one centered."""
    torch.manual_seed(0)
    tall, small = torch.rand(2, 3, 20, 30) * 2 - 1, torch.rand(1, 3, 10, 10) * 2 - 1
    sheet = side_by_side([tall, small])
    assert sheet.shape == (1, 3, 8 + 2 * 28, 8 + 2 * 38) and sheet.dtype == torch.float32
    assert torch.equal(sheet[0, :, 8:28, 8:38], tall[0])
    assert torch.equal(sheet[0, :, 36:56, 8:38], tall[1])
    assert torch.equal(sheet[0, :, 13:23, 56:66], small[0])
    rest = sheet.clone()
    rest[0, :, 8:28, 8:38] = rest[0, :, 36:56, 8:38] = rest[0, :, 13:23, 56:66] = 2 * BACKGROUND - 1
    assert torch.all(rest == 2 * BACKGROUND - 1)


def test_labels_are_written_below_their_column_alone() -> None:
    images = [torch.zeros(1, 3, 64, 64)] * 3
    plain, written = side_by_side(images), side_by_side(images, ["1 step", "", "28 steps"])
    footer = written[0, :, plain.shape[2] :]
    assert footer.shape[1] > 10 and torch.equal(written[:, :, : plain.shape[2]], plain)
    ink = [bool((footer[:, :, 8 + 72 * i : 72 + 72 * i] < 0).any()) for i in range(3)]
    assert ink == [True, False, True]


def test_a_wide_label_is_truncated_to_its_column() -> None:
    images = [torch.zeros(1, 3, 64, 64)] * 2
    sheet = side_by_side(images, ["a label that is far too wide for its column", ""])
    assert torch.all(sheet[0, :, 80:, 72:] > 0)


def test_no_images_and_too_many_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        side_by_side([])
    with pytest.raises(ValueError, match="1 images, got 2"):
        side_by_side([torch.zeros(1, 3, 8, 8)], ["a", "b"])
