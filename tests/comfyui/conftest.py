"""One genuine ComfyUI for all tests here: the checkout that COMFYUI_PATH names, run by COMFYUI_PYTHON.

COMFYUI_PYTHON defaults to the checkout's own .venv or venv, else to the Python of the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rectiflux.host import context
from rectiflux.host.files import Folders
from torch import Tensor

from ..nodes import graphs
from ..nodes.tiny import NAMES, SPEC, write_models, write_transformer
from .server import PACK, ComfyServer

DEV = "tiny-dev.safetensors"
"""A second tiny transformer, with [dev]'s guidance input; the other has none, as [schnell]."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.comfyui)
            if not os.environ.get("COMFYUI_PATH"):
                item.add_marker(pytest.mark.skip(reason="COMFYUI_PATH names no ComfyUI checkout"))


def python_of(checkout: Path) -> str:
    if named := os.environ.get("COMFYUI_PYTHON"):
        return named
    candidates = [checkout / venv / "bin" / "python" for venv in (".venv", "venv")]
    return next((str(python) for python in candidates if python.exists()), sys.executable)


def inside(script: str, *arguments: Path | str) -> Any:
    """What a script of this folder finds, as JSON, inside ComfyUI: run by its Python, in its checkout."""
    checkout = Path(os.environ["COMFYUI_PATH"])
    run = subprocess.run(
        [python_of(checkout), Path(__file__).with_name(script), PACK, *arguments],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's base directory, the tiny models in its models/."""
    base = tmp_path_factory.mktemp("comfyui")
    write_models(base / "models")
    write_transformer(base / "models" / "diffusion_models" / DEV, replace(SPEC, guidance_embed=True))
    return base


@pytest.fixture(scope="session")
def comfy(base: Path) -> Iterator[ComfyServer]:
    checkout = Path(os.environ["COMFYUI_PATH"])
    server = ComfyServer(checkout, python_of(checkout), base)
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def files() -> graphs.Prompt:
    """Our loaders on the tiny models."""
    return graphs.loaders(NAMES["diffusion_models"], NAMES["clip"], NAMES["t5"], NAMES["vae"])


@pytest.fixture
def embedded(base: Path, tmp_path: Path) -> Iterator[Folders]:
    """The embedded host's folders, its models those that ComfyUI has."""
    folders = Folders.under(tmp_path / "data", models=(base / "models",))
    with context.using(folders):
        yield folders


def to_pixels(image: Tensor) -> np.ndarray:
    """Pixels, uint8, of an IMAGE: rounded down, as SaveImage does in both hosts."""
    return (255.0 * image.numpy()).clip(0, 255).astype(np.uint8)
