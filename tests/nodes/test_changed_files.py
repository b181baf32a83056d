"""Model files that change, or hold NaN, under nodes of the embedded host."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rectiflux.host import context
from rectiflux.host.files import Folders
from rectiflux.nodes import NODE_CLASS_MAPPINGS
from safetensors.torch import load_file, save_file

from . import graphs
from .tiny import NAMES

FILES = graphs.loaders(NAMES["diffusion_models"], NAMES["clip"], NAMES["t5"], NAMES["vae"])
WHERE = {
    "model": ("diffusion_models", NAMES["diffusion_models"]),
    "clip": ("text_encoders", NAMES["t5"]),
    "vae": ("vae", NAMES["vae"]),
}


@pytest.fixture
def models(tiny_models: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the tiny models that may be changed."""
    copy = tmp_path / "models"
    shutil.copytree(tiny_models, copy)
    with context.using(Folders.under(tmp_path / "data", models=(copy,))):
        yield copy


@pytest.mark.parametrize("node", WHERE)
def test_a_file_cut_short_while_it_is_loaded(models: Path, node: str) -> None:
    """Its pages are gone; reading one would end the process."""
    path = models.joinpath(*WHERE[node])
    prompt = graphs.text_to_image(FILES, steps=1)
    done: dict[str, tuple[Any, ...]] = {}
    for name in FILES:
        graphs.run(prompt, name, done)
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match=f"^{path.name} was changed on disk after it was loaded; "):
        graphs.run(prompt, "decode", done)


@pytest.mark.parametrize("node", WHERE)
def test_a_loader_runs_again_when_its_file_changes(models: Path, node: str) -> None:
    path, inputs = models.joinpath(*WHERE[node]), FILES[node]["inputs"]
    kind = NODE_CLASS_MAPPINGS[FILES[node]["class_type"]]
    before = kind.IS_CHANGED(**inputs)
    assert before and kind.IS_CHANGED(**inputs) == before
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert kind.IS_CHANGED(**inputs) != before
    assert kind.IS_CHANGED(**dict.fromkeys(inputs)) == "", "names from other nodes are not known yet"
    path.unlink()
    kind.IS_CHANGED(**inputs)  # what is missing is reported by VALIDATE_INPUTS


@pytest.mark.parametrize(
    ("node", "weight"),
    [
        ("model", "single_blocks.1.linear1.weight"),
        ("clip", "encoder.block.1.layer.1.DenseReluDense.wo.weight"),
        ("vae", "decoder.conv_in.weight"),
    ],
)
def test_nan_in_a_weight_is_named(models: Path, node: str, weight: str) -> None:
    """At the first result that is not finite, with the tensor and the file."""
    path = models.joinpath(*WHERE[node])
    state = load_file(path)
    state[weight][0] = float("nan")
    save_file(state, path, {"txt_length": "16"})
    with pytest.raises(ValueError, match=f"contain NaN or inf, as does {weight} of {path.name}; choose"):
        with torch.no_grad():
            graphs.run(graphs.text_to_image(FILES, steps=1), "decode")
