"""Contact sheet: images side by side with a label below each, for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BACKGROUND = 0.96
"""Gray level of the sheet, in 0..1."""
TEXT_COLOR = (40, 40, 44)


def side_by_side(images: Sequence[Tensor], labels: Sequence[str] = (), gap: int = 8) -> Tensor:
    """One image [1, 3, H', W'], float32 in -1..1, of batches [B, 3, H, W]: a column each, its label below.

    The images of a batch are stacked; smaller ones are centered in their cell. A label that is wider than its
    column is truncated. Raises ValueError without images or with more labels than images.
    """
    if not images:
        raise ValueError("a sheet needs at least one image, got none; connect one")
    if len(labels) > len(images):
        raise ValueError(
            f"a sheet needs at most one label for each of its {len(images)} images, got {len(labels)}; "
            "write one label a line"
        )
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    rows = max(image.shape[0] for image in images)
    size = max(11, round(min(width, height) / 11))
    footer = round(1.9 * size) if any(label.strip() for label in labels) else 0
    sheet_height = rows * (height + gap) + gap + footer
    sheet = torch.full((1, 3, sheet_height, len(images) * (width + gap) + gap), 2 * BACKGROUND - 1)
    for column, image in enumerate(images):
        left = gap + column * (width + gap)
        for row, single in enumerate(image):
            h, w = single.shape[-2:]
            y = gap + row * (height + gap) + (height - h) // 2
            x = left + (width - w) // 2
            sheet[0, :, y : y + h, x : x + w] = single.float().cpu()
        if column < len(labels) and footer:
            strip = _draw_label(labels[column].strip(), width, footer, size)
            sheet[0, :, sheet_height - footer :, left : left + width] = strip
    return sheet


def _draw_label(label: str, width: int, height: int, size: int) -> Tensor:
    """The label centered in a strip [3, height, width] in -1..1."""
    gray = round(255 * BACKGROUND)
    strip = Image.new("RGB", (width, height), (gray, gray, gray))
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(size)
    while label and pen.textlength(label, font=font) > width:
        label = label[:-1]
    pen.text((width / 2, height / 2), label, fill=TEXT_COLOR, font=font, anchor="mm")
    pixels = torch.from_numpy(np.array(strip, dtype=np.float32)) / 127.5 - 1
    return rearrange(pixels, "h w c -> c h w")
