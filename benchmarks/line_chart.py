"""Charts of lines over the number of steps, side by side, drawn with Pillow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

from .palette import FAINT, INK, PAPER, Color, font

OVERSAMPLING = 4  # everything is drawn at this scale, then reduced
WIDTH, HEIGHT = 444, 330  # pixels: the area of a chart
LEFT, RIGHT, TOP, BOTTOM = 54, 112, 52, 64  # pixels around it: axis, names of lines, title, axis
FOOT = 34  # pixels: the note below all charts
INSET = 18  # pixels between the frame and the first and last step count
NAME_DISTANCE = 19  # pixels between the names of lines
GRID = (228, 230, 236)
MARKERS = (("circle", 7.5), ("diamond", 6.2), ("square", 4.8), ("triangle", 4.8))
"""Kinds and radii in pixels: later ones, drawn on top, are smaller."""


@dataclass(frozen=True)
class Line:
    """Values by number of steps; values that are not finite are left out."""

    name: str
    color: Color
    values: dict[int, float]

    @property
    def points(self) -> list[tuple[int, float]]:
        return [(steps, value) for steps, value in sorted(self.values.items()) if math.isfinite(value)]


@dataclass(frozen=True)
class Chart:
    """Lines between the values `low` and `high`, with an axis label every `tick`.

    `level`, if given, is a value and a text: a dashed line across.
    """

    title: str
    lines: list[Line]
    low: float
    high: float
    tick: float
    level: tuple[float, str] | None = None

    @property
    def steps(self) -> list[int]:
        return sorted({steps for line in self.lines for steps in line.values})

    def place(self, steps: int, value: float) -> tuple[float, float]:
        """(x, y) in pixels from the chart's upper left corner: logarithmic in steps, linear in the value."""
        first, last = math.log2(self.steps[0]), math.log2(self.steps[-1])
        along = (math.log2(steps) - first) / (last - first) if last > first else 0.5
        up = (value - self.low) / (self.high - self.low)
        return LEFT + INSET + along * (WIDTH - 2 * INSET), TOP + (1 - up) * HEIGHT


def axis_top(lines: list[Line], least: float, tick: float) -> float:
    """The smallest multiple of `tick` that no value of the lines exceeds, at least `least`."""
    highest = max((value for line in lines for _, value in line.points), default=least)
    return tick * math.ceil(max(highest, least) / tick - 1e-9)


def draw_charts(charts: list[Chart], note: str) -> Image.Image:
    """The charts side by side, the note below them."""
    size = (len(charts) * chart_width(), TOP + HEIGHT + BOTTOM + FOOT)
    large = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), PAPER)
    for index, chart in enumerate(charts):
        draw_chart(Pen(large, index * chart_width()), chart)
    pen = Pen(large, 0)
    pen.text((LEFT, size[1] - 14), note, FAINT, 13, "ls")
    return large.reduce(OVERSAMPLING)


def chart_width() -> int:
    return LEFT + WIDTH + RIGHT


class Pen:
    """Draws on the oversampled image in pixels of the final one, from `left` on."""

    def __init__(self, large: Image.Image, left: int) -> None:
        self.draw, self.left = ImageDraw.Draw(large), left

    def at(self, x: float, y: float) -> tuple[float, float]:
        return (x + self.left) * OVERSAMPLING, y * OVERSAMPLING

    def line(self, start: tuple[float, float], end: tuple[float, float], color: Color, width: float) -> None:
        """With round ends, so that lines join."""
        self.draw.line([self.at(*start), self.at(*end)], color, round(width * OVERSAMPLING))
        for x, y in (start, end):
            self.draw.circle(self.at(x, y), width * OVERSAMPLING / 2 - 0.5, color)

    def text(self, place: tuple[float, float], text: str, color: Color, size: int, anchor: str) -> None:
        self.draw.text(self.at(*place), text, color, font(size * OVERSAMPLING), anchor)

    def marker(self, place: tuple[float, float], kind: str, radius: float, color: Color) -> None:
        """One of MARKERS, about as large as a circle of that radius."""
        if kind == "circle":
            self.draw.circle(self.at(*place), radius * OVERSAMPLING, color)
            return
        corners, rotation, size = {
            "square": (4, 0, 1.25),
            "diamond": (4, 45, 1.3),
            "triangle": (3, 0, 1.35),
        }[kind]
        self.draw.regular_polygon((*self.at(*place), size * radius * OVERSAMPLING), corners, rotation, color)


def draw_chart(pen: Pen, chart: Chart) -> None:
    draw_axes(pen, chart)
    for line in chart.lines:
        for start, end in pairwise(line.points):
            pen.line(chart.place(*start), chart.place(*end), line.color, 2.2)
    for index, line in enumerate(chart.lines):
        kind, radius = MARKERS[index % len(MARKERS)]
        for point in line.points:
            pen.marker(chart.place(*point), kind, radius + 1, PAPER)
            pen.marker(chart.place(*point), kind, radius, line.color)
    draw_names(pen, chart)


def draw_axes(pen: Pen, chart: Chart) -> None:
    """Title, grid, labels, frame."""
    right, bottom = LEFT + WIDTH, TOP + HEIGHT
    pen.text((LEFT, TOP - 20), chart.title, INK, 17, "ls")
    for i in range(round((chart.high - chart.low) / chart.tick) + 1):
        value = chart.low + i * chart.tick
        _, y = chart.place(chart.steps[0], value)
        pen.line((LEFT, y), (right, y), GRID, 1)
        pen.text((LEFT - 9, y), f"{value:.1f}", INK, 14, "rm")
    for steps in chart.steps:
        x, _ = chart.place(steps, chart.low)
        pen.line((x, bottom), (x, bottom + 5), INK, 1)
        pen.text((x, bottom + 11), str(steps), INK, 14, "mt")
    pen.text((LEFT + WIDTH / 2, bottom + 36), "steps", INK, 14, "mt")
    if chart.level is not None:
        value, text = chart.level
        _, y = chart.place(chart.steps[0], value)
        for x in range(LEFT, right, 8):
            pen.line((x, y), (x + 4, y), FAINT, 1.2)
        pen.text((LEFT + 6, y - 5), text, FAINT, 13, "ls")
    pen.line((LEFT, TOP), (LEFT, bottom), INK, 1.2)
    pen.line((LEFT, bottom), (right, bottom), INK, 1.2)


def draw_names(pen: Pen, chart: Chart) -> None:
    """Each line's name right of its last point, in its color; names that would overlap move apart."""
    ends = [(*chart.place(*line.points[-1]), line) for line in chart.lines if line.points]
    ends.sort(key=lambda end: end[1])
    heights = spread([y for _, y, _ in ends], NAME_DISTANCE, TOP, TOP + HEIGHT)
    left = LEFT + WIDTH + 10
    for (x, y, line), height in zip(ends, heights, strict=True):
        pen.line((x + 10, y), (left - 4, height), line.color, 0.8)
        pen.text((left, height), line.name, line.color, 15, "lm")


def spread(heights: list[float], apart: float, low: float, high: float) -> list[float]:
    """The ascending heights moved so that neighbors are `apart`, within low..high if there is space.

    Groups that touch are centered on the mean of their original heights.
    """
    groups: list[tuple[float, int]] = []  # (middle, members)
    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1 and gap(*groups[-2:]) < apart * (groups[-2][1] + groups[-1][1]) / 2:
            (a, m), (b, n) = groups.pop(-2), groups.pop()
            groups.append(((a * m + b * n) / (m + n), m + n))
    placed: list[float] = []
    for middle, members in groups:
        half = apart * (members - 1) / 2
        middle = max(min(middle, high - half), low + half)
        placed += [middle - half + apart * i for i in range(members)]
    return placed


def gap(first: tuple[float, int], second: tuple[float, int]) -> float:
    return second[0] - first[0]
