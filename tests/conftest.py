"""Loads the pack by its path under the name `rectiflux`, as ComfyUI does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def load_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        "rectiflux", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"there is no pack in {ROOT}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["rectiflux"] = module
    spec.loader.exec_module(module)


load_pack()
torch.set_num_threads(1)  # the tensors here are tiny: more threads only wait for each other
