"""What of ComfyUI's side of text needs no ComfyUI; the rest is in tests/comfyui."""

from __future__ import annotations

from typing import Any

import pytest
from rectiflux.nodes.host_comfy_text import whole


class Patcher:
    """The part of a ModelPatcher that is used."""

    offload_device = "cpu"

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False) -> Any:
        return device_to, lowvram_model_memory, force_patch_weights, full_load


@pytest.mark.parametrize(("fits", "place"), [(True, "cuda"), (False, "cpu")])
def test_text_encoders_are_loaded_whole(fits: bool, place: str) -> None:
    """ComfyUI says by `full_load` whether all of a model fits."""
    patcher = whole(Patcher)()
    loaded = patcher.load("cuda", lowvram_model_memory=1000, force_patch_weights=True, full_load=fits)
    assert loaded == (place, 0, True, True)
