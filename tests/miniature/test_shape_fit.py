"""Tables of distances to the outlines, and the fit of a silhouette, against areas and masks."""

from __future__ import annotations

import numpy as np
import pytest
from rectiflux.miniature.draw import mask
from rectiflux.miniature.scene import SHAPES
from rectiflux.miniature.shape_fit import distance_map, fit_outline, moments, perimeter


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_have_exact_areas_lengths_and_distances(shape: str) -> None:
    area, x, y = moments(shape)
    cover = mask(shape, (150.0, 150.0), 100.0, 300, 300)
    assert cover.sum() / 1e4 == pytest.approx(area, rel=0.01)
    rows, columns = np.mgrid[0:300, 0:300] + 0.5
    centroid = [float((cover * part).sum() / cover.sum() - 150) / 100 for part in (columns, rows)]
    assert centroid == pytest.approx([x, y], abs=0.01)
    distance = distance_map(shape, 150.0, 150.0, 100.0, (300, 300))
    assert ((distance < 0) == (cover > 0.5)).mean() > 0.998
    rim = (np.abs(distance) < 2).sum() / 4 / 100  # a band of 4 pixels along the outline
    assert rim == pytest.approx(perimeter(shape), rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fit_finds_center_and_radius(shape: str) -> None:
    fit = fit_outline(mask(shape, (30.3, 33.6), 17.2, 64, 64))
    assert (fit.shape, fit.x, fit.y) == (shape, pytest.approx(30.3, abs=0.3), pytest.approx(33.6, abs=0.3))
    assert fit.radius == pytest.approx(17.2, rel=0.02)
    assert fit.overlap > 0.95 > fit.runner_up and fit.mean_deviation < 0.015 and fit.max_deviation < 0.6
