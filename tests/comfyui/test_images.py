"""LoadImage of the embedded host gives the values of ComfyUI's."""

from __future__ import annotations

import io
import urllib.parse
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rectiflux.host.images import decode

from ..host.image_fuzzer import encoded
from ..host.test_images import COLOR, KINDS, MODES
from ..nodes import graphs
from .conftest import to_pixels
from .server import ComfyServer

COARSER = {"adobe-cmyk.jpg": 3, "cmyk.tif": 3}
"""Pixel values between the two decoders, where not 1; ComfyUI reads images with FFmpeg."""


@pytest.fixture(scope="module")
def loaded(comfy: ComfyServer) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(colors, mask), uint8 of 255, of every file, in one prompt."""
    prompt: graphs.Prompt = {}
    for name, data in files().items():
        (comfy.base / "input" / name).write_bytes(data)
        prompt[f"load {name}"] = graphs.node("LoadImage", image=name)
        prompt[f"mask {name}"] = graphs.node("MaskToImage", mask=[f"load {name}", 1])
        prompt[f"show {name}"] = graphs.node("PreviewImage", images=[f"load {name}", 0])
        prompt[f"shown mask {name}"] = graphs.node("PreviewImage", images=[f"mask {name}", 0])
    outputs = comfy.run(prompt)
    return {
        name: (_shown(comfy, outputs, f"show {name}"), _shown(comfy, outputs, f"shown mask {name}"))
        for name in files()
    }


def files() -> dict[str, bytes]:
    """Every color mode, and animations of each format; ComfyUI drops frames of a GIF without durations."""
    found = {name: make() for name, (make, *_) in MODES.items()}
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"append_images": [COLOR.rotate(180)], "save_all": True, "duration": 100}
        found[f"animation.{kind.lower()}"] = encoded(COLOR, kind, **options, **KINDS.get(kind, {}))
    return found


def _shown(comfy: ComfyServer, outputs: dict[str, Any], node: str) -> np.ndarray:
    """The images that a PreviewImage node shows."""
    shown = [comfy.fetch(f"/api/view?{urllib.parse.urlencode(image)}") for image in outputs[node]["images"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in shown])


@pytest.mark.parametrize("name", files())
def test_values_are_comfyuis(loaded: dict[str, tuple[np.ndarray, np.ndarray]], name: str) -> None:
    """Every color mode and animation: colors and masks to one value of 255, which both hosts truncate."""
    image, mask = decode(files()[name], name).tensors()
    colors, alpha = loaded[name]
    ours = to_pixels(image)
    assert ours.shape == colors.shape
    assert np.abs(ours.astype(int) - colors).max() <= COARSER.get(name, 1)
    masks = to_pixels(mask[..., None].expand(*mask.shape, 3))
    if masks.shape == alpha.shape:
        assert np.abs(masks.astype(int) - alpha).max() <= 1
    else:  # without alpha a mask is zeros, of 64 x 64 or of the image's size
        assert masks.max() == 0 and alpha.max() <= 1
