"""fp8 and int8 as weight_dtype in ComfyUI: the layers, their patches, and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rectiflux.host.files import Folders
from rectiflux.nodes import host_embedded_loading as loading

from ..nodes import graphs
from ..nodes.tiny import NAMES
from .conftest import inside, to_pixels
from .server import ComfyServer


@pytest.fixture(scope="module", params=["fp8", "int8"])
def seen(request: pytest.FixtureRequest, base: Path) -> tuple[str, dict[str, Any]]:
    """The form, and what inside_quantised.py found."""
    files = [base / "models" / kind / NAMES[kind] for kind in ("diffusion_models", "loras")]
    return request.param, inside("inside_quantised.py", *files, request.param)


def test_what_is_quantised_and_counted(seen: tuple[str, dict[str, Any]]) -> None:
    form, found = seen
    double, single = found["blocks"]
    expected = {"fp8": 10 * double + 3 * (single - 1), "int8": 8 * double + 2 * single}
    assert found["layers"] == expected[form]
    assert found["counted"] and found["smaller"]


def test_products_patches_and_codes(seen: tuple[str, dict[str, Any]]) -> None:
    _, found = seen
    for what in (
        "as in flux_core",
        "rounded",
        "beside",
        "changed",
        "merged",
        "base after it",
        "nothing loaded",
        "its bias patched",
        "kept",
        "made again",
        "saved as numbers",
    ):
        assert found[what], what


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_the_picture_moves_as_far_as_in_the_embedded_host(
    comfy: ComfyServer, embedded: Folders, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """No nearer to that of the embedded host: a rounding of 1e-7 between the two turns some inputs' codes,
    by 1/16 in fp8, from block to block more. How far either is from the exact picture is the same.
    """
    monkeypatch.setattr(loading, "can_pack", lambda device, dtype: False)  # float32, as ComfyUI on a CPU
    names = ["rectiflux-mini-schnell", "rectiflux-mini-clip", "rectiflux-mini-t5", "rectiflux-mini-vae"]
    files = graphs.loaders(*(f"{name}.safetensors" for name in names))
    prompt = graphs.text_to_image(files, prompt="a red heart", steps=4, width=128, height=128)
    exact = to_pixels(graphs.run(prompt, "decode")[0]).astype(float)
    prompt["model"]["inputs"]["weight_dtype"] = form
    ours = to_pixels(graphs.run(prompt, "decode")[0]).astype(float)
    prompt["save"] = graphs.node("SaveImage", images=["decode", 0], filename_prefix=form)
    theirs = comfy.pictures(prompt, "save").astype(float)
    far, expected = np.abs(theirs - exact).mean(), np.abs(ours - exact).mean()
    assert 0.1 < expected < 2 and expected / 1.5 < far < expected * 1.5
