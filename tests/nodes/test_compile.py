"""Compile FLUX in the embedded host: every block of a run goes through it, whatever is done to the MODEL.

What compiles is tested in flux_core/test_compiling.py; here stands a plain call in its place.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from rectiflux.flux_core.backends import compile as compiling
from rectiflux.host.files import Folders
from torch import nn

from . import graphs
from .test_nodes import FILES, call
from .tiny import NAMES, SPEC

STEPS = 3


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The blocks that compiled code would have run."""
    blocks: list[nn.Module] = []

    def run(self: Any, block: nn.Module, inputs: tuple[Any, ...], shared: Any) -> Any:
        blocks.append(block)
        return block(*inputs, shared)

    monkeypatch.setattr(compiling.CompiledBlocks, "__call__", run)
    return blocks


def picture(*order: str) -> torch.Tensor:
    """The picture with these nodes behind the loader, in this order."""
    prompt = graphs.text_to_image(FILES, steps=STEPS)
    nodes = {
        "compile": graphs.node("RectifluxCompile"),
        "lora": graphs.node(
            "RectifluxLora",
            lora_name=NAMES["loras"],
            strength_model=0.5,
            strength_clip=0.0,
            blocks="",
        ),
        "cache": graphs.node("RectifluxStepCache", method="forecast", threshold=0.0),
    }
    before = "model"
    for name in order:
        prompt[name] = nodes[name]
        prompt[name]["inputs"]["model"] = [before, 0]
        before = name
    prompt["sample"]["inputs"]["model"] = [before, 0]
    return graphs.run(prompt, "decode", {})[0]


@pytest.mark.parametrize("others", [(), ("lora",), ("cache",), ("lora", "cache")])
def test_every_block_runs_compiled(
    embedded: Folders, called: list[nn.Module], others: tuple[str, ...]
) -> None:
    """With LoRAs and a cache behind it or before it; the picture is the one without."""
    expected = picture(*others)
    assert not called
    for order in {("compile", *others), (*others, "compile")}:
        called.clear()
        torch.testing.assert_close(picture(*order), expected, rtol=1e-4, atol=1e-5)
        assert len(called) == STEPS * (SPEC.depth + SPEC.depth_single)


def test_the_model_that_came_in_stays_as_it_was(embedded: Folders) -> None:
    model = call("RectifluxModelLoader", **FILES["model"]["inputs"])
    other = call("RectifluxCompile", model=model)
    assert model.network.runner is None and isinstance(other.network.runner, compiling.CompiledBlocks)
    assert other.preview is model.preview


def test_what_is_missing_is_said_at_the_node(embedded: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    model = call("RectifluxModelLoader", **FILES["model"]["inputs"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="on the PATH, found none; install a C.. compiler, or go without"):
        call("RectifluxCompile", model=model)


def test_it_wants_our_model(embedded: Folders) -> None:
    with pytest.raises(TypeError, match="the MODEL must come from Load FLUX Model here, got str"):
        call("RectifluxCompile", model="x")
