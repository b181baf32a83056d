"""The colors and the font of every figure that the benchmarks draw."""

from __future__ import annotations

from PIL import ImageFont

Color = tuple[int, int, int]

PAPER, GROUND, INK, FAINT = (255, 255, 255), (246, 247, 250), (33, 37, 48), (112, 118, 134)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's default font."""
    return ImageFont.load_default(size)
