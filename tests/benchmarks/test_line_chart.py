"""Charts of lines: positions and colors, pixel by pixel."""

from __future__ import annotations

import math

import pytest
from rectiflux.benchmarks.line_chart import (
    NAME_DISTANCE,
    Chart,
    Line,
    axis_top,
    chart_width,
    draw_charts,
    spread,
)
from rectiflux.benchmarks.palette import PAPER

RED, BLUE, GREEN, PURPLE = (200, 30, 30), (30, 60, 200), (20, 140, 60), (120, 40, 160)


def test_every_point_has_its_lines_color() -> None:
    """In both charts, at the middle of each marker and half way between two."""
    lines = [
        Line(name, color, {1: 0.05 + i / 4, 4: 0.1 + i / 4, 28: 0.15 + i / 4})
        for i, (name, color) in enumerate(zip("abcd", (RED, BLUE, GREEN, PURPLE), strict=True))
    ]
    chart = Chart("t", lines, 0.0, 1.0, 0.2, (0.98, "level"))
    image = draw_charts([chart, chart], "note")
    assert image.width == 2 * chart_width()
    for line in lines:
        for left in (0, chart_width()):
            for steps, value in line.points:
                x, y = chart.place(steps, value)
                assert image.getpixel((round(left + x), round(y))) == line.color
            (x0, y0), (x1, y1) = (chart.place(*point) for point in line.points[:2])
            middle = round(left + (x0 + x1) / 2), round((y0 + y1) / 2)
            assert line.color in [image.getpixel((middle[0], middle[1] + d)) for d in (-1, 0, 1)]


def test_steps_are_logarithmic_and_values_linear() -> None:
    chart = Chart("t", [Line("a", RED, {1: 0.0, 2: 0.0, 4: 0.0, 16: 1.0})], 0.0, 1.0, 0.5)
    xs = [chart.place(steps, 0.0)[0] for steps in (1, 2, 4, 16)]
    assert [(x - xs[0]) / (xs[3] - xs[0]) for x in xs] == pytest.approx([0, 0.25, 0.5, 1])
    top, middle, bottom = (chart.place(1, value)[1] for value in (1.0, 0.5, 0.0))
    assert middle - top == pytest.approx(bottom - middle) and middle > top
    alone = Chart("t", [Line("a", RED, {4: 0.5})], 0.0, 1.0, 0.5)
    assert 0 < alone.place(4, 0.5)[0] < chart_width()


def test_values_that_are_not_finite_are_left_out() -> None:
    line = Line("a", RED, {4: 0.5, 1: math.nan, 8: 0.7})
    assert line.points == [(4, 0.5), (8, 0.7)]
    chart = Chart("t", [line, Line("b", BLUE, {1: math.nan})], 0.0, 1.0, 0.2)
    assert chart.steps == [1, 4, 8]
    colors = {color for _, color in draw_charts([chart], "").getcolors(1 << 20) or []}
    assert RED in colors and PAPER in colors and BLUE not in colors


def test_an_axis_covers_every_value() -> None:
    assert axis_top([], 1.0, 0.2) == pytest.approx(1.0)
    assert axis_top([Line("a", RED, {1: 1.2, 2: math.nan})], 1.0, 0.2) == pytest.approx(1.2)
    assert axis_top([Line("a", RED, {1: 1.21})], 1.0, 0.2) == pytest.approx(1.4)


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([], []),
        ([100, 200], [100, 200]),
        ([100, 100], [90.5, 109.5]),
        ([100, 110, 200], [95.5, 114.5, 200]),
        ([100, 117, 118], [92.6667, 111.6667, 130.6667]),
        ([298, 299, 300], [262, 281, 300]),
        ([0, 0, 5], [0, 19, 38]),
    ],
)
def test_names_that_would_overlap_move_apart(heights: list[float], expected: list[float]) -> None:
    """Around the mean of their own heights, and never outside of 0..300."""
    assert spread(heights, 19, 0, 300) == pytest.approx(expected, abs=1e-3)
    assert NAME_DISTANCE >= 15, "names are 15 pixels high"
