"""Charts of lines: what is where, pixel by pixel."""

from __future__ import annotations

import math

import pytest
from rectiflux.benchmarks.line_chart import (
    APART,
    LEFT,
    TOP,
    Chart,
    Line,
    chart_width,
    draw_charts,
    reaching,
    spread,
)
from rectiflux.benchmarks.palette import PAPER

RED, BLUE, GREEN, PURPLE = (200, 30, 30), (30, 60, 200), (20, 140, 60), (120, 40, 160)


def four() -> list[Line]:
    """Lines that come nowhere near each other's points."""
    return [
        Line(name, colour, {1: 0.05 + i / 4, 4: 0.1 + i / 4, 28: 0.15 + i / 4})
        for i, (name, colour) in enumerate(zip("abcd", (RED, BLUE, GREEN, PURPLE), strict=True))
    ]


def test_every_point_has_its_lines_colour() -> None:
    """In both charts, at the middle of each marker and half way between two."""
    lines = four()
    chart = Chart("t", lines, 0.0, 1.0, 0.2, (0.98, "level"))
    picture = draw_charts([chart, chart], "note")
    assert 1150 < picture.width == 2 * chart_width() < 1250
    for line in lines:
        for left in (0, chart_width()):
            for steps, value in line.points:
                x, y = chart.place(steps, value)
                assert picture.getpixel((round(left + x), round(y))) == line.colour
            (x0, y0), (x1, y1) = (chart.place(*point) for point in line.points[:2])
            column = [
                picture.getpixel((round(left + (x0 + x1) / 2), round((y0 + y1) / 2) + d)) for d in (-1, 0, 1)
            ]
            assert line.colour in column


def test_steps_are_logarithmic_and_values_linear() -> None:
    chart = Chart("t", [Line("a", RED, {1: 0.0, 2: 0.0, 4: 0.0, 16: 1.0})], 0.0, 1.0, 0.5)
    xs = [chart.place(steps, 0.0)[0] for steps in (1, 2, 4, 16)]
    assert [(x - xs[0]) / (xs[3] - xs[0]) for x in xs] == pytest.approx([0, 0.25, 0.5, 1])
    top, middle, bottom = (chart.place(1, value)[1] for value in (1.0, 0.5, 0.0))
    assert top == TOP and middle - top == pytest.approx(bottom - middle)
    alone = Chart("t", [Line("a", RED, {4: 0.5})], 0.0, 1.0, 0.5)
    assert LEFT < alone.place(4, 0.5)[0] < chart_width() / 2 + LEFT


def test_what_could_not_be_measured_is_left_out() -> None:
    line = Line("a", RED, {4: 0.5, 1: math.nan, 8: 0.7})
    assert line.points == [(4, 0.5), (8, 0.7)]
    empty = Line("b", BLUE, {1: math.nan})
    chart = Chart("t", [line, empty], 0.0, 1.0, 0.2)
    assert chart.steps == [1, 4, 8]
    colours = {colour for _, colour in draw_charts([chart], "").getcolors(1 << 20) or []}
    assert RED in colours and PAPER in colours and BLUE not in colours


def test_an_axis_reaches_over_every_value() -> None:
    assert reaching([], 1.0, 0.2) == pytest.approx(1.0)
    assert reaching([Line("a", RED, {1: 1.2, 2: math.nan})], 1.0, 0.2) == pytest.approx(1.2)
    assert reaching([Line("a", RED, {1: 1.21})], 1.0, 0.2) == pytest.approx(1.4)


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
def test_names_that_would_touch_move_apart(heights: list[float], expected: list[float]) -> None:
    """Around the mean of where they belong, and never out of 0..300."""
    assert APART == 19
    assert spread(heights, APART, 0, 300) == pytest.approx(expected, abs=1e-3)
