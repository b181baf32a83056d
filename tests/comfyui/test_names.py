"""Names of models in genuine ComfyUI: which are listed, and that no name ends its worker."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..nodes import graphs
from ..nodes.tiny import NAMES
from .conftest import DEV
from .server import ComfyServer, PromptFailed

SHADOW = bytes.fromhex("00051607") + bytes(4092)
MODEL = NAMES["diffusion_models"]


def prompt(files: graphs.Prompt, model: Any, lora: Any = NAMES["loras"], clip: Any = NAMES["clip"]) -> Any:
    made = graphs.text_to_image(files, steps=1, cfg_scale=1.0, seed=77)
    made["model"] = graphs.node("RectifluxModelLoader", model_name=model, weight_dtype="auto")
    made["clip"] = graphs.node("RectifluxTextEncoderLoader", clip_name=clip, t5_name=NAMES["t5"])
    strengths = {"strength_model": 1.0, "strength_clip": 1.0, "blocks": ""}
    made["lora"] = graphs.node("RectifluxLora", model=["model", 0], lora_name=lora, **strengths)
    made["sample"]["inputs"]["model"] = ["lora", 0]
    return made | {"save": graphs.node("SaveImage", images=["decode", 0], filename_prefix="names")}


@pytest.fixture(scope="module")
def models(base: Path) -> Path:
    """The tiny models under other names too, and files that are no models beside them."""
    models = base / "models"
    folder = models / "diffusion_models"
    for kind, names in (
        ("diffusion_models", ("named.sft", "flux/mini.safetensors")),
        ("loras", ("named.sft", "styles/a.safetensors")),
    ):
        for name in names:
            (models / kind / name).parent.mkdir(exist_ok=True)
            shutil.copy(models / kind / NAMES[kind], models / kind / name)
    (models / "unet").mkdir(exist_ok=True)
    (models / "clip").mkdir(exist_ok=True)
    shutil.copy(folder / MODEL, models / "unet" / "both.safetensors")
    shutil.copy(folder / DEV, folder / "both.safetensors")
    for encoder in ("tiny-clip.safetensors", "tiny-clip.tokenizer.json"):
        name = encoder.replace("tiny-", "old-")
        shutil.copy(models / "text_encoders" / encoder, models / "clip" / name)
    for name in ("._a.safetensors", "__MACOSX/._b.gguf", ".cache/hidden.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(SHADOW)
    (folder / "dangling.safetensors").symlink_to("gone.safetensors")
    if sys.platform == "linux":
        shutil.copy(folder / MODEL, os.fsencode(folder) + b"/bad\xff.safetensors")
    return models


@pytest.fixture(scope="module")
def expected(comfy: ComfyServer, files: graphs.Prompt) -> np.ndarray:
    return comfy.pictures(prompt(files, MODEL), "save")


def listed(comfy: ComfyServer, node: str, field: str) -> list[str]:
    return comfy.get(f"/api/object_info/{node}")[node]["input"]["required"][field][0]


def test_only_models_that_load_are_listed(comfy: ComfyServer, models: Path) -> None:
    names = listed(comfy, "RectifluxModelLoader", "model_name")
    assert {"named.sft", "flux/mini.safetensors", "both.safetensors"} <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if "._" in name or name.startswith((".", "bad", "dangling"))]
    assert {"named.sft", "styles/a.safetensors"} <= set(listed(comfy, "RectifluxLora", "lora_name"))
    assert "old-clip.safetensors" in listed(comfy, "RectifluxTextEncoderLoader", "clip_name")
    assert "RectifluxModelLoader" in comfy.get("/api/object_info")


@pytest.mark.parametrize(
    ("model", "lora", "clip"),
    [
        ("named.sft", "named.sft", NAMES["clip"]),
        ("flux\\mini.safetensors", "styles\\a.safetensors", NAMES["clip"]),
        ("both.safetensors", NAMES["loras"], "old-clip.safetensors"),
    ],
)
def test_the_same_image_under_every_name(
    comfy: ComfyServer,
    models: Path,
    files: graphs.Prompt,
    expected: np.ndarray,
    model: str,
    lora: str,
    clip: str,
) -> None:
    """Of both.safetensors in two folders the one in unet/, which ComfyUI searches first."""
    assert np.array_equal(comfy.pictures(prompt(files, model, lora, clip), "save"), expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bad\udcff.safetensors", "Unicode"),
        ("..\\..\\x.safetensors", "must stay in its folder"),
        ("flux\\..\\..\\x.safetensors", "must stay in its folder"),
        ("D:x.safetensors", "must stay in its folder"),
        ("._a.safetensors", "hidden"),
        ("dangling.safetensors", "is not in its list"),
        ("x" * 5000, "at most 255 bytes"),
        (5, "must be text"),
        ({"a": 1}, "must be text"),
        (None, "must be text"),
    ],
)
def test_a_bad_name_is_refused_and_the_next_prompt_runs(
    comfy: ComfyServer,
    models: Path,
    files: graphs.Prompt,
    expected: np.ndarray,
    name: Any,
    reason: str,
) -> None:
    with pytest.raises(PromptFailed) as refused:
        comfy.run(prompt(files, name))
    details = str(refused.value.details)
    assert reason in details and "damaged" not in details and "download" not in details
    assert np.array_equal(comfy.pictures(prompt(files, MODEL), "save"), expected)
