"""Files that change after they were loaded, and weights that hold NaN or inf."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.models import autoencoder, flux_transformer
from rectiflux.benchmarks.reference.quantized_files import write_quantized_safetensors
from rectiflux.benchmarks.reference.text import save_text_encoders
from rectiflux.flux_core.weights import (
    check_unchanged,
    load_autoencoder,
    load_text_encoders,
    load_transformer,
    not_finite_weight,
)
from safetensors.torch import load_file, save_file

from .refusals import refusal


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    """Cut short, or written over with as many bytes; a file that was deleted stays mapped."""
    flux, vae = tmp_path / "flux.safetensors", tmp_path / "ae.safetensors"
    save_file(flux_transformer().state_dict(), flux)
    save_file(autoencoder().state_dict(), vae)
    clip, t5 = save_text_encoders(tmp_path)
    encoders = load_text_encoders(clip, t5)
    modules = [load_transformer(flux), load_autoencoder(vae), encoders.t5, encoders.clip]
    check_unchanged(*modules)
    os.truncate(flux, flux.stat().st_size - 1)
    os.utime(t5, ns=(1, t5.stat().st_mtime_ns + 1))
    vae.unlink()
    for module, path in zip(modules[::2], (flux, t5), strict=True):
        assert "was changed on disk" in refusal(lambda _, module=module: check_unchanged(module), path)
    check_unchanged(modules[1], modules[3])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norms_and_scales_are_examined_when_a_file_is_loaded(tmp_path: Path, value: float) -> None:
    path = tmp_path / "f.safetensors"
    state = flux_transformer(context_in=32, vec_in=64).state_dict()
    norm = "single_blocks.1.norm.key_norm.scale"
    save_file({**state, norm: torch.full_like(state[norm], value)}, path)
    assert f"NaN or inf in {norm}" in refusal(load_transformer, path)
    for form, scale in (
        ("scale_weight", "txt_in.scale_weight"),
        ("nested NF4", "txt_in.weight.nested_absmax"),
    ):
        write_quantized_safetensors(state, path, form)
        whole = load_file(path)
        save_file({**whole, scale: torch.full_like(whole[scale], value)}, path)
        assert "NaN or inf in txt_in.weight" in refusal(load_transformer, path)


@pytest.mark.parametrize("form", ["plain", "fp8 e4m3fn"])
def test_the_weight_to_blame_is_found(tmp_path: Path, form: str) -> None:
    """In a whole model, dequantized where it must be."""
    state = dict(flux_transformer(context_in=32, vec_in=64).state_dict())
    state["txt_in.weight"] = state["txt_in.weight"].clone()
    path = tmp_path / "f.safetensors"
    save_file(state, path)
    assert not_finite_weight(load_transformer(path)) is None
    state["txt_in.weight"][3, 4] = float("nan")
    if form == "plain":
        save_file(state, path)
    else:
        write_quantized_safetensors(state, path, form)
    assert not_finite_weight(load_transformer(path)) == "txt_in.weight of f.safetensors"
