"""Packed layers compute what torch's do."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.models import relative_error
from rectiflux.flux_core.backends import cpu_gelu, cpu_linear, onednn
from rectiflux.flux_core.backends.cpu_gelu import gelu, gelu_in_float32
from rectiflux.flux_core.backends.cpu_int8 import Int8Linear, quantize_int8
from rectiflux.flux_core.backends.cpu_linear import PackedLinear
from rectiflux.flux_core.backends.onednn import can_pack
from rectiflux.flux_core.lora import AdaptedLinear, dense_weight
from rectiflux.flux_core.quant.linear import compute_dtype, device_of
from torch import Tensor

CPU = torch.device("cpu")
EXACT = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # of the largest output; one rounding step of bfloat16


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(
    dtype: torch.dtype = torch.float32, qkv_dim: int | None = None
) -> tuple[PackedLinear, Tensor, Tensor]:
    weight, bias = randn(48, 64, dtype=dtype), randn(48, seed=1, dtype=dtype)
    return PackedLinear(weight, bias, qkv_dim), weight, bias


@pytest.fixture(params=["packed", "in rows"])
def either_layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN's operators, and as where they are missing."""
    if request.param == "in rows":
        monkeypatch.setattr(cpu_linear, "can_pack", lambda device, dtype: False)


def set_avx512(avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if avx512 else "AVX2")


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("qkv_dim", [None, 16])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (5, 64), (2, 3, 64)])
def test_it_is_a_linear_layer(
    dtype: torch.dtype,
    qkv_dim: int | None,
    shape: tuple[int, ...],
    avx512: bool,
    either_layout: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_avx512(avx512, monkeypatch)
    layer, weight, bias = layer_of(dtype, qkv_dim)
    x = randn(*shape, seed=2, dtype=dtype)
    expected = F.linear(x, weight, bias)
    y = layer(x)
    assert y.shape == expected.shape and y.dtype == dtype
    if x.numel():
        assert relative_error(y, expected) <= EXACT[dtype]
        activated = F.gelu(expected, approximate="tanh")
        assert relative_error(layer.gelu(x), activated) <= EXACT[dtype]
        first, rest = layer.split_gelu(x)
        assert torch.equal(first, y[..., : layer.qkv_dim])
        assert not rest.numel() or relative_error(rest, activated[..., layer.qkv_dim :]) <= EXACT[dtype]


def test_strided_inputs() -> None:
    layer, weight, bias = layer_of()
    x = randn(2, 9, 128)[:, 4:, 64:]
    assert relative_error(layer(x), F.linear(x, weight, bias)) <= 1e-6


@pytest.mark.parametrize("qkv_dim", [None, 16])
def test_the_weight_can_be_read_saved_and_copied(qkv_dim: int | None, either_layout: None) -> None:
    layer, weight, bias = layer_of(qkv_dim=qkv_dim)
    assert torch.equal(layer.dense_weight(torch.float32), weight)
    assert torch.equal(dense_weight(layer, torch.bfloat16), weight.bfloat16())
    assert torch.equal(layer.state_dict()["weight"], weight) and torch.equal(layer.state_dict()["bias"], bias)
    assert torch.equal(copy.deepcopy(layer).dense_weight(torch.float32), weight)
    assert (compute_dtype(layer), device_of(layer)) == (torch.float32, CPU)
    assert layer.weight.is_meta and layer.weight.shape == weight.shape


def test_it_changes_dtype_and_device() -> None:
    layer, weight, _ = layer_of(qkv_dim=16)
    assert layer.packed and "packed" in repr(layer)
    assert layer.half().dtype == torch.float16 and not layer.packed
    assert torch.equal(layer.float().dense_weight(torch.float32), weight.half().float()) and layer.packed
    assert device_of(layer.to("meta")).type == "meta"


def test_gradients_reach_the_inputs() -> None:
    layer, weight, _ = layer_of()
    x = randn(3, 64).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


def test_what_can_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_pack(CPU, torch.float32) and not can_pack(CPU, torch.float64)
    assert not can_pack(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_pack(CPU, torch.float32) and not can_pack(CPU, torch.int8)


def test_the_module_may_be_named_by_its_path() -> None:
    """As ComfyUI names those of custom nodes."""
    spec = importlib.util.spec_from_file_location("/custom nodes/pack-1.2.onednn", str(onednn.__file__))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def first(x: Tensor, weight: Any) -> Tensor:
        return x.clone()

    first.__annotations__ = {"x": Tensor, "weight": module.PackedWeight, "return": Tensor}
    operator = module.packed_operator("rectiflux::named_by_path", lambda x, weight: x.new_empty(x.shape))(
        first
    )
    x = randn(3)
    assert torch.equal(operator(x, module.PackedWeight(x)), x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "int8"])
def test_compiled_code_is_shared_by_all_layers_of_a_size(kind: str) -> None:
    """In one graph; each layer multiplies its own weight."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda layer, x: layer.split_gelu(x), fullgraph=True, backend="aot_eager")
    x = randn(5, 64, seed=2)
    for seed in range(3):
        weight = randn(48, 64, seed=seed)
        layer = PackedLinear(weight, None, 16)
        if kind == "int8":
            layer = Int8Linear(quantize_int8(weight), None, torch.float32, 16)
        with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
            for found, expected in zip(compiled(layer, x), layer.split_gelu(x), strict=True):
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["packed", "int8"])
def test_adapters_wrap_it(kind: str) -> None:
    layer, weight, bias = layer_of()
    if kind == "int8":
        layer = Int8Linear(quantize_int8(weight), bias, torch.float32)
    adapted = AdaptedLinear(layer, [], torch.float32)
    x = randn(5, 64, seed=2)
    assert torch.equal(adapted(x), layer(x))
    assert torch.equal(adapted.dense_weight(), layer.dense_weight(torch.float32))
    assert adapted.device == CPU


@pytest.mark.parametrize("dtype", EXACT)
def test_gelu_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gelu, "SLICE", 200)
    x = (4 * randn(7, 3, 64)).to(dtype)[:, 1:]
    assert relative_error(gelu_in_float32(x), F.gelu(x, approximate="tanh")) <= EXACT[dtype]


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("shape", [(64,), (0, 64), (3, 64), (2, 3, 64)])
def test_gelu(
    shape: tuple[int, ...], dtype: torch.dtype, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a new tensor, into a part of another, and in place."""
    set_avx512(avx512, monkeypatch)
    monkeypatch.setattr(cpu_gelu, "SLICE", 128)
    x = (4 * randn(*shape)).to(dtype)
    expected = F.gelu(x, approximate="tanh")
    joint = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
    assert gelu(x, out=joint[..., 32:96]).shape == x.shape
    assert not joint[..., :32].any() and not joint[..., 96:].any()
    changed = x.clone()
    assert gelu(changed, out=changed) is changed
    for found in (gelu(x), joint[..., 32:96], changed):
        assert not x.numel() or relative_error(found, expected) <= EXACT[dtype]
