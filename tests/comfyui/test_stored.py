"""A quantised MODEL in ComfyUI's hands: loaded, patched, unpatched, merged, saved; its bytes never change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rectiflux.flux_core.weights import read_state_dict

from ..nodes.model_files import quantized_transformer
from ..nodes.tiny import NAMES, write_models
from .conftest import inside

LABELS = {
    "Q8_0": "GGUF Q8_0",
    "Q4_K": "GGUF Q4_K",
    "scale_weight": "fp8 e4m3fn scaled",
    "NF4": "bitsandbytes NF4",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("inside"))


@pytest.fixture(scope="module", params=LABELS)
def seen(request: pytest.FixtureRequest, models: Path) -> tuple[str, Path, Path, dict[str, Any]]:
    """The form, the dense file of its numbers, a file that ComfyUI saved, and what inside.py found."""
    form = request.param
    name, dense = quantized_transformer(models, form)
    folder, output = models / "diffusion_models", models / f"saved-{form}.safetensors"
    found = inside("inside.py", folder / name, models / "loras" / NAMES["loras"], output)
    return form, folder / dense, output, found


def test_its_memory_is_what_the_file_needs(seen: tuple[str, Path, Path, dict[str, Any]]) -> None:
    """What ComfyUI counts is what is held: nothing is kept twice, and far less than in float32."""
    *_, found = seen
    assert found["layers"] > 20
    assert found["size"] == found["held"] < found["dense"] / 2
    assert found["extra keys"] == []


def test_loading_is_shown(seen: tuple[str, Path, Path, dict[str, Any]]) -> None:
    *_, found = seen
    assert found["percents"][-1] == 100 and len(found["percents"]) >= 2


def test_what_others_see_of_a_weight(seen: tuple[str, Path, Path, dict[str, Any]]) -> None:
    form, *_, found = seen
    shape, dtype, device, text = found["as seen"]
    assert (dtype, device, text) == ("torch.float32", "cpu", f"WeightView({shape}, {LABELS[form]})")
    assert found["numbers"]


def test_patches_come_and_go(seen: tuple[str, Path, Path, dict[str, Any]]) -> None:
    *_, found = seen
    assert found["patches"] > 20
    for what in (
        "patched",
        "beside",
        "used again",
        "merged",
        "changed",
        "base after it",
        "again",
        "detached",
        "kept",
        "merged with itself",
    ):
        assert found[what], what


def test_a_memory_limit(seen: tuple[str, Path, Path, dict[str, Any]]) -> None:
    """No more than the limit is on the device, and what is not is brought over with its patches."""
    *_, found = seen
    for what in (
        "within its limit",
        "limited",
        "nothing loaded",
        "its bias patched",
        "bias as before",
        "a VAE is loaded whole",
    ):
        assert found[what], what


def test_a_device_without_fp8_has_the_same_numbers(
    seen: tuple[str, Path, Path, dict[str, Any]],
) -> None:
    *_, found = seen
    assert found["without fp8"]


def test_what_is_saved_are_the_numbers(seen: tuple[str, Path, Path, dict[str, Any]]) -> None:
    """q/k norms under ComfyUI's names, `query_norm.weight`."""
    _, dense, output, _ = seen
    expected, saved = read_state_dict(dense), read_state_dict(output)
    expected = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in expected.items()}
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_overwriting_is_refused(seen: tuple[str, Path, Path, dict[str, Any]]) -> None:
    form, *_, found = seen
    assert found["overwritten"] == (
        f"weights quantized as {LABELS[form]} cannot be overwritten, which another node tried; patch them "
        "instead, or choose weight_dtype bf16 and a bf16 file"
    )
