"""Files that ComfyUI saves load whole."""

from __future__ import annotations

from pathlib import Path

import torch
from rectiflux.flux_core.weights import (
    Part,
    load_autoencoder,
    load_transformer,
    read_state_dict,
    read_weights,
)

from ..nodes.tiny import NAMES
from .conftest import inside


def test_a_checkpoint_saved_by_comfyui(base: Path, tmp_path: Path) -> None:
    """ComfyUI 0.33 writes the q/k norms as query_norm.weight, BFL as query_norm.scale."""
    paths = [base / "models" / kind / NAMES[kind] for kind in ("diffusion_models", "vae")]
    saved = tmp_path / "ComfyUI_00001_.safetensors"
    names = inside("inside_saved.py", *paths, saved)
    assert "model.diffusion_model.double_blocks.0.img_attn.norm.query_norm.weight" in names
    original, loaded = read_state_dict(paths[0]), load_transformer(saved).state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(tensor.float(), original[name].float()) for name, tensor in loaded.items())
    theirs, vae = read_weights(saved, Part.VAE).tensors, load_autoencoder(saved).state_dict()
    assert theirs.keys() == vae.keys() == read_state_dict(paths[1]).keys()
