"""Compile FLUX in the embedded host: the image stays the same, whatever else is done to the MODEL.

What compiles is tested in flux_core/backends/test_compile.py; here plain calls stand in for torch.compile.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from rectiflux.host.files import Folders

from . import graphs
from .test_nodes import FILES, call
from .tiny import NAMES

STEPS = 3


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functions handed to torch.compile, which returns them as they are."""
    functions: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: functions.append(function) or function)
    return functions


def image(*order: str) -> torch.Tensor:
    """The image with these nodes behind the loader, in this order."""
    prompt = graphs.text_to_image(FILES, steps=STEPS)
    strengths = {"strength_model": 0.5, "strength_clip": 0.0}
    nodes = {
        "compile": graphs.node("RectifluxCompile"),
        "lora": graphs.node("RectifluxLora", lora_name=NAMES["loras"], blocks="", **strengths),
        "cache": graphs.node("RectifluxStepCache", method="forecast", threshold=0.0),
    }
    before = "model"
    for name in order:
        prompt[name] = nodes[name]
        prompt[name]["inputs"]["model"] = [before, 0]
        before = name
    prompt["sample"]["inputs"]["model"] = [before, 0]
    return graphs.run(prompt, "decode", {})[0]


@pytest.mark.parametrize("others", [(), ("lora", "cache")], ids=str)
def test_compiling_works_with_loras_and_a_cache_in_any_order(
    embedded: Folders, compiled: list[Any], others: tuple[str, ...]
) -> None:
    expected = image(*others)
    for order in {("compile", *others), (*others, "compile")}:
        torch.testing.assert_close(image(*order), expected, rtol=0, atol=1e-5)
    assert compiled


def test_the_input_model_is_not_changed(embedded: Folders) -> None:
    model = call("RectifluxModelLoader", **FILES["model"]["inputs"])
    other = call("RectifluxCompile", model=model)
    assert model.network.runner is None and other.network.runner is not None
    assert other.preview is model.preview


def test_what_cannot_be_compiled_is_said_at_the_node(
    embedded: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = call("RectifluxModelLoader", **FILES["model"]["inputs"])
    with pytest.raises(ValueError, match="cpu"):
        call("RectifluxCompile", model=model, mode="cuda graphs")
    with pytest.raises(ValueError, match="got 'fast'"):
        call("RectifluxCompile", model=model, mode="fast")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="install a C.. compiler"):
        call("RectifluxCompile", model=model)
