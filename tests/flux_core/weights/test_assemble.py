"""Quantized tensors whose scales or descriptions do not match."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.models import flux_transformer
from rectiflux.benchmarks.reference.quantized_files import write_quantized_safetensors
from rectiflux.flux_core.weights import load_transformer
from safetensors.torch import load_file, save_file
from torch import Tensor

from .refusals import refusal

State = dict[str, Tensor]


def as_bytes(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


STATE = "txt_in.weight.quant_state.bitsandbytes__nf4"
NF4 = "nf4 description of txt_in.weight"


def comfy(value: object) -> State:
    return {"txt_in.comfy_quant": as_bytes(value)}


def state(**description: object) -> State:
    return {STATE: as_bytes(description)}


@pytest.mark.parametrize(
    ("form", "change", "problem"),
    [
        ("comfy_quant", comfy({"format": "nvfp4"}), "'nvfp4' (txt_in)"),
        ("comfy_quant", comfy({"format": "\n"}), r"'\n' (txt_in)"),
        ("comfy_quant", comfy({"format": ""}), "'' (txt_in)"),
        (
            "comfy_quant",
            comfy({"format": "int8_tensorwise", "convrot": True}),
            "int8_tensorwise (rotated)' (t",
        ),
        ("comfy_quant", comfy([1]), "txt_in.comfy_quant"),
        ("comfy_quant", comfy({}), "the format of txt_in"),
        ("comfy_quant", comfy({"format": "int8_tensorwise"}), "txt_in is torch.uint8, not int8"),
        ("scale_weight", {"txt_in.scale_weight": torch.ones(7)}, "txt_in has 7 scales"),
        ("scale_weight", {"txt_in.scale_weight": torch.ones(1, dtype=torch.int32)}, "scale of txt_in"),
        ("NF4", {STATE: as_bytes("x")}, STATE),
        ("NF4", state(shape=[64, 32]), NF4),
        ("NF4", state(shape=[64, 33], blocksize=64), NF4),
        ("NF4", state(shape=[64, 32], blocksize=0), NF4),
        ("NF4", state(shape=[-64, -32], blocksize=64), NF4),
        ("NF4", state(shape=[2**61 + 256, 8], blocksize=64), NF4),  # 64 * 32 modulo 2^64
        ("NF4", {"txt_in.weight.absmax": torch.ones(3)}, NF4),
        ("NF4", {"txt_in.weight.quant_map": torch.ones(3)}, NF4),
        ("NF4", {"txt_in.weight.quant_map": torch.ones(1, 16)}, NF4),
        ("NF4", state(shape=[64, 32], blocksize=2**40), NF4),  # would allocate a block at a time
        ("nested NF4", {"txt_in.weight.nested_quant_map": torch.ones(3)}, NF4),
        ("nested NF4", {"txt_in.weight.nested_quant_map": torch.ones(16, 16)}, NF4),
        ("nested NF4", state(shape=[64, 32], blocksize=64, nested_blocksize=2**40), NF4),
        ("nested NF4", {"txt_in.weight.nested_absmax": torch.ones(3)}, NF4),
    ],
)
def test_scales_and_descriptions_that_do_not_match(
    tmp_path: Path, form: str, change: State, problem: str
) -> None:
    original = flux_transformer(context_in=32, vec_in=64).state_dict()
    write_quantized_safetensors(original, tmp_path / "whole", form)
    whole = load_file(tmp_path / "whole")
    assert whole.keys() >= change.keys()
    save_file({**whole, **change}, tmp_path / "f.safetensors")
    assert problem in refusal(load_transformer, tmp_path / "f.safetensors")


@pytest.mark.parametrize("metadata", ["[", "[1]", "{}", '{"layers": [1]}', '{"layers": {"txt_in": 1}}'])
def test_broken_quantization_metadata(tmp_path: Path, metadata: str) -> None:
    path = tmp_path / "f.safetensors"
    save_file(flux_transformer().state_dict(), path, {"_quantization_metadata": metadata})
    problem = refusal(load_transformer, path)
    assert "choose a bf16" in problem and "damaged" not in problem
