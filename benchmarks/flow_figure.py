"""Panels of points and of their paths, drawn with Pillow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from .palette import FAINT, GROUND, INK, PAPER, Color, font

SIDE, GAP, MARGIN, LABEL = 168, 10, 28, 150  # pixels: a panel, between panels, border, titles of rows
TITLE, HEAD = 40, 26  # pixels: a block's title, a line of column titles
OVERSAMPLING = 2  # paths are drawn at this scale, then reduced
REACH = 5.6  # a panel shows -REACH..REACH
SHADE = (203, 206, 216)  # the data beneath samples or paths


@dataclass(frozen=True)
class Panel:
    """What is drawn, bottom layer first: data [n, 2], points [m, 2], paths [steps + 1, k, 2]; a note."""

    color: Color
    data: Tensor | None = None
    points: Tensor | None = None
    paths: Tensor | None = None
    note: str = ""


@dataclass(frozen=True)
class Block:
    """A first row of panels with titles, then rows of panels with column titles."""

    title: str
    head: list[tuple[str, Panel]]
    columns: list[str]
    rows: list[list[Panel]]


def draw_sheet(blocks: list[Block], legend: str, row_titles: list[str]) -> Image.Image:
    """All blocks side by side, `legend` left of their first rows."""
    widths = [len(block.columns) * (SIDE + GAP) - GAP for block in blocks]
    width = 2 * MARGIN + LABEL + sum(widths) + 3 * GAP * (len(blocks) - 1)
    height = row_top(len(row_titles)) - GAP + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((MARGIN, MARGIN + TITLE + HEAD + 6), legend, FAINT, font(13), spacing=7)
    for index, title in enumerate(row_titles):
        pen.multiline_text((MARGIN, row_top(index) + SIDE // 2), title, INK, font(15), "lm", spacing=7)
    x = MARGIN + LABEL
    for block, size in zip(blocks, widths, strict=True):
        draw_block(sheet, block, x)
        x += size + 3 * GAP
    return sheet


def row_top(index: int) -> int:
    """The top of a row of panels; -1 is the head."""
    if index < 0:
        return MARGIN + TITLE + HEAD
    return row_top(-1) + SIDE + GAP + HEAD + index * (SIDE + GAP)


def draw_block(sheet: Image.Image, block: Block, left: int) -> None:
    """A block with its titles, from `left` on."""
    pen = ImageDraw.Draw(sheet)
    pen.text((left, MARGIN + 18), block.title, INK, font(22), anchor="ls")
    heads = ([title for title, _ in block.head], block.columns)
    for index, titles in zip((-1, 0), heads, strict=True):
        for column, title in enumerate(titles):
            middle = left + column * (SIDE + GAP) + SIDE // 2
            pen.text((middle, row_top(index) - 7), title, FAINT, font(14), anchor="ms")
    for row, panels in enumerate([[panel for _, panel in block.head], *block.rows]):
        for column, panel in enumerate(panels):
            sheet.paste(draw_panel(panel), (left + column * (SIDE + GAP), row_top(row - 1)))


def draw_panel(panel: Panel) -> Image.Image:
    """The panel as an image [SIDE, SIDE]."""
    image = Image.new("RGB", (SIDE, SIDE), GROUND)
    if panel.data is not None:
        image.paste(SHADE, mask=density(panel.data))
    if panel.points is not None:
        image.paste(panel.color, mask=density(panel.points))
    if panel.paths is not None:
        image = draw_paths(image, panel.paths, panel.color)
    if panel.note:
        ImageDraw.Draw(image).text((7, SIDE - 6), panel.note, INK, font(12), anchor="lb")
    return image


def density(points: Tensor) -> Image.Image:
    """The density of points at each pixel as a mask: 0 none, 255 much more than the average."""
    xy = points.double().numpy()
    edges = np.linspace(-REACH, REACH, SIDE + 1)
    counts, _, _ = np.histogram2d(-xy[:, 1], xy[:, 0], bins=(edges, edges))
    level = len(xy) / 6000  # points per pixel that count as dense
    mask = (255 * (1 - np.exp(-counts / level))).astype(np.uint8)
    return Image.fromarray(mask).filter(ImageFilter.GaussianBlur(0.6))


def draw_paths(image: Image.Image, paths: Tensor, color: Color) -> Image.Image:
    """Paths over the image, from faint at the noise to full color at the end, which has a dot."""
    large = image.resize((SIDE * OVERSAMPLING, SIDE * OVERSAMPLING), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large, "RGBA")
    scale = SIDE * OVERSAMPLING / (2 * REACH)
    pixels = ((paths.double() * paths.new_tensor([1.0, -1.0]) + REACH) * scale).numpy()
    steps = len(pixels) - 1
    for index in range(steps):
        alpha = 45 + 120 * (index + 1) // steps
        for start, end in zip(pixels[index], pixels[index + 1], strict=True):
            pen.line([*start, *end], (*color, alpha), 2)
    for ends, radius, fill in ((pixels[0], 2, (*FAINT, 150)), (pixels[-1], 3, (*color, 255))):
        for x, y in ends:
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill)
    return large.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
