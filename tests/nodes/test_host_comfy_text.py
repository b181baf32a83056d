"""What of ComfyUI's side of text needs no ComfyUI; the rest is in tests/comfyui."""

from __future__ import annotations

from typing import Any

import pytest
from rectiflux.nodes.host_comfy_text import whole


class Patcher:
    """As much of a ModelPatcher as is asked for."""

    offload_device = "cpu"

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False) -> str:
        self.asked.append((device_to, lowvram_model_memory, force_patch_weights, full_load))
        return "loaded"


@pytest.mark.parametrize(("fits", "place"), [(True, "cuda"), (False, "cpu")])
def test_text_encoders_are_loaded_whole(fits: bool, place: str) -> None:
    """ComfyUI says by `full_load` whether there is room for all of a model."""
    patcher = whole(Patcher)()
    assert (
        patcher.load("cuda", lowvram_model_memory=1000, force_patch_weights=True, full_load=fits) == "loaded"
    )
    assert patcher.asked == [(place, 0, True, True)]
