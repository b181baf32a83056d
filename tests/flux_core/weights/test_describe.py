"""Variants by shape and guidance embedder, formats by what most numbers are in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.models import autoencoder, diffusers_state_dict, flux_transformer
from rectiflux.benchmarks.reference.quantized_files import (
    wide_transformer,
    write_gguf,
    write_quantized_safetensors,
)
from rectiflux.flux_core.model.spec import FLUX_DEV, FLUX_SCHNELL, FluxSpec
from rectiflux.flux_core.weights import describe
from rectiflux.flux_core.weights.describe import variant_of
from safetensors.torch import save_file


@pytest.mark.parametrize(
    ("spec", "title", "name"),
    [
        (FLUX_DEV, "", "FLUX.1 [dev]"),
        (FLUX_DEV, "flux1-krea-dev", "FLUX.1 Krea [dev]"),
        (FLUX_DEV, "Flux.1 Kontext dev", "FLUX.1 Kontext [dev]"),
        (FLUX_SCHNELL, "", "FLUX.1 [schnell]"),
        (replace(FLUX_DEV, in_channels=384), "", "FLUX.1 Fill [dev]"),
        (replace(FLUX_DEV, in_channels=128), "", "FLUX.1 Canny or Depth [dev]"),
        (replace(FLUX_DEV, in_channels=128), "FLUX.1 Depth", "FLUX.1 Depth [dev]"),
        (replace(FLUX_DEV, in_channels=96), "", "FLUX.1 [dev] with 96 inputs"),
        (replace(FLUX_SCHNELL, in_channels=96), "", "FLUX.1 without guidance, 96 inputs"),
        (replace(FLUX_DEV, depth=8), "", "FLUX.1 [dev] in small (hidden size 3072, 8 + 38 blocks)"),
    ],
)
def test_variants(spec: FluxSpec, title: str, name: str) -> None:
    assert variant_of(spec, {"modelspec.title": title}) == name
    assert variant_of(spec, {"general.name": title}) == name


@pytest.mark.parametrize(
    ("form", "label"),
    [
        ("fp8 e4m3fn", "fp8 e4m3fn"),
        ("fp8 e5m2", "fp8 e5m2"),
        ("scale_weight", "fp8 e4m3fn scaled"),
        ("metadata", "fp8 e4m3fn scaled"),
        ("comfy_quant", "fp8 e4m3fn scaled"),
        ("int8 by rows", "int8 scaled"),
        ("SCB", "int8 scaled"),
        ("NF4", "bitsandbytes NF4"),
        ("nested NF4", "bitsandbytes NF4"),
    ],
)
def test_formats(tmp_path: Path, form: str, label: str) -> None:
    model = flux_transformer(context_in=32, vec_in=64)
    path = tmp_path / "f.safetensors"
    write_quantized_safetensors(model.state_dict(), path, form)
    count = sum(tensor.numel() for tensor in model.state_dict().values()) / 1e6
    line = describe(path)
    assert line.startswith("FLUX.1 [dev] in small (hidden size 64, 2 + 3 blocks), ")
    assert line.endswith(f", {label}, {path.stat().st_size / 1e6:.1f} MB, {count:.2f} million parameters")


@pytest.mark.parametrize(
    ("kind", "label"), [("Q4_K", "GGUF Q4_K"), ("Q8_0", "GGUF Q8_0"), ("F16", "GGUF fp16")]
)
def test_gguf(tmp_path: Path, kind: str, label: str) -> None:
    write_gguf(wide_transformer().state_dict(), tmp_path / "q.gguf", kind, name="Kontext")
    assert describe(tmp_path / "q.gguf").startswith(
        f"FLUX.1 Kontext [dev] in small (hidden size 256, 1 + 1 blocks), {label}, "
    )


def test_diffusers_and_other_models(tmp_path: Path) -> None:
    half = {n: t.bfloat16() for n, t in diffusers_state_dict(flux_transformer(guidance_embed=False)).items()}
    save_file(half, tmp_path / "d.safetensors")
    assert describe(tmp_path / "d.safetensors").startswith(
        "FLUX.1 [schnell] in small (hidden size 64, 2 + 3 blocks), bf16"
    )
    save_file(autoencoder().state_dict(), tmp_path / "v.safetensors")
    assert describe(tmp_path / "v.safetensors").startswith("a VAE, fp32, ")
    save_file({"redux_up.weight": torch.zeros(3)}, tmp_path / "r.safetensors")
    assert (
        describe(tmp_path / "r.safetensors")
        == "a FLUX.1 Redux adapter, fp32, 0.0 MB, 0.00 million parameters"
    )


def test_large_sizes_are_told_in_billions(tmp_path: Path) -> None:
    """A sparse file, of which nothing but the header is read."""
    size = 1_100_000_000
    entry = {"dtype": "F8_E4M3", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"conv_first.weight": entry}).encode()
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert describe(path) == "of an unknown kind, fp8 e4m3fn, 1.10 GB, 1.10 billion parameters"
