"""Step Cache in the embedded host: skipping nothing changes nothing, and skipped passes are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rectiflux.host.files import Folders

from . import graphs
from .test_nodes import FILES, call

STEPS = 6


def cached(threshold: float | None, **settings: Any) -> tuple[torch.Tensor, dict[str, str]]:
    """The image, and the sampler's report."""
    prompt = graphs.text_to_image(FILES, steps=STEPS, **settings)
    if threshold is not None:
        cache = {"method": "forecast", "threshold": threshold}
        prompt["cache"] = graphs.node("RectifluxStepCache", model=["model", 0], **cache)
        prompt["sample"]["inputs"]["model"] = ["cache", 0]
    done: dict[str, tuple[Any, ...]] = {}
    image = graphs.run(prompt, "decode", done)[0]
    return image, dict(line.split(": ", 1) for line in done["sample"][1].splitlines())


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_without_skipping_nothing_changes(embedded: Folders, cfg_scale: float) -> None:
    plain, report = cached(None, cfg_scale=cfg_scale)
    same, cached_report = cached(0.0, cfg_scale=cfg_scale)
    assert torch.equal(same, plain)
    assert "skipped by the step cache" not in report
    assert cached_report["skipped by the step cache"] == f"0 of {STEPS} passes"
    assert cached_report["straightness of the path"] == report["straightness of the path"]


def test_skipped_steps_are_counted(embedded: Folders) -> None:
    plain, _ = cached(None)
    other, report = cached(100.0)  # the tiny model's weights are random: every step changes much
    assert not torch.equal(other, plain) and other.isfinite().all()
    assert report["skipped by the step cache"] == f"{STEPS - 2} of {STEPS} passes"


def test_the_input_model_is_not_changed(embedded: Folders) -> None:
    model = call("RectifluxModelLoader", **FILES["model"]["inputs"])
    other = call("RectifluxStepCache", model=model, method="first block", threshold=0.2)
    assert model.caching is None and other.caching.threshold == 0.2 and other.network is model.network
