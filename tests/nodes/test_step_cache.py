"""Step Cache in the embedded host: skipping nothing changes nothing, and the report says what was skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rectiflux.host import context
from rectiflux.host.files import Folders

from . import graphs
from .test_nodes import FILES, call
from .tiny import write_models

STEPS = 6


@pytest.fixture
def host(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    models = write_models(tmp_path_factory.mktemp("cached"))
    with context.using(Folders.under(tmp_path / "data", models=(models,))):
        yield


def cached(threshold: float | None, **settings: Any) -> tuple[torch.Tensor, list[str]]:
    """The picture and the lines of the sampler's report."""
    prompt = graphs.text_to_image(FILES, steps=STEPS, **settings)
    if threshold is not None:
        prompt["cache"] = graphs.node(
            "RectifluxStepCache", model=["model", 0], method="forecast", threshold=threshold
        )
        prompt["sample"]["inputs"]["model"] = ["cache", 0]
    done: dict[str, tuple[Any, ...]] = {}
    return graphs.run(prompt, "decode", done)[0], done["sample"][1].splitlines()


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_without_skipping_nothing_changes(host: None, cfg_scale: float) -> None:
    plain, report = cached(None, cfg_scale=cfg_scale)
    same, told = cached(0.0, cfg_scale=cfg_scale)
    assert torch.equal(same, plain)
    assert not any("step cache" in line for line in report)
    assert told[3] == f"skipped by the step cache: 0 of {STEPS} passes"
    assert [line for line in told if "seconds" not in line and "cache" not in line] == [
        line for line in report if "seconds" not in line
    ]


def test_skipping_is_told(host: None) -> None:
    plain, _ = cached(None)
    other, told = cached(100.0)  # the tiny model's weights are random: every step changes much
    assert not torch.equal(other, plain) and other.isfinite().all()
    assert told[3].startswith("skipped by the step cache: ") and told[3].endswith(f" of {STEPS} passes")
    assert int(told[3].split()[5]) == STEPS - 2


def test_the_model_that_came_in_stays_as_it_was(host: None) -> None:
    model = call("RectifluxModelLoader", **FILES["model"]["inputs"])
    other = call("RectifluxStepCache", model=model, method="first block", threshold=0.2)
    assert model.caching is None and other.caching.threshold == 0.2 and other.network is model.network


def test_it_wants_our_model(host: None) -> None:
    with pytest.raises(TypeError, match="the MODEL must come from Load FLUX Model here, got str"):
        call("RectifluxStepCache", model="x", method="forecast", threshold=0.1)
