"""Layers over quantized weights compute with exactly the dequantized values."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.quantized import every_format, nf4, weights
from rectiflux.flux_core.backends.fp8 import Fp8Linear, to_fp8
from rectiflux.flux_core.quant import formats
from rectiflux.flux_core.quant.formats import FP8, DenseWeight, QuantizedWeight, ScaledWeight
from rectiflux.flux_core.quant.linear import (
    QuantizedLinear,
    compute_dtype,
    dequantize_layers,
    device_of,
)
from torch import Tensor, nn

from .test_formats import FORMATS, each_format

EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@each_format
@EACH_DTYPE
def test_the_layer_is_a_linear_layer(weight: QuantizedWeight, values: Tensor, dtype: torch.dtype) -> None:
    bias = torch.linspace(-1, 1, 48)
    layer = QuantizedLinear(weight, bias, dtype)
    assert (layer.in_features, layer.out_features) == (64, 48)
    assert layer.bias is not None and layer.bias.dtype == dtype
    x = weights(5, seed=1).to(dtype)
    assert torch.equal(layer(x), F.linear(x, values.to(dtype), bias.to(dtype)))
    assert torch.equal(layer.dense_weight(torch.float32), values)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.slow
@each_format
def test_compiled_code_is_shared_by_layers_of_a_format(weight: QuantizedWeight, values: Tensor) -> None:
    """In one graph; each layer multiplies its own weight."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend="aot_eager")
    x = weights(5, seed=1)
    twin = weight.with_tensors(lambda t: t.clone() if t.dtype == torch.uint8 or t.ndim == 0 else t.flip(0))
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for each in (weight, twin):
            layer = QuantizedLinear(each, None, torch.float32)
            assert torch.equal(compiled(layer, x), layer(x))


@each_format
def test_a_change_of_dtype_keeps_the_weight(weight: QuantizedWeight, values: Tensor) -> None:
    layer = nn.Sequential(QuantizedLinear(weight, torch.zeros(48), torch.float32)).to(torch.bfloat16)[0]
    addresses = {tensor.data_ptr() for tensor in weight.tensors()}
    assert (layer.dtype, compute_dtype(layer), layer.bias.dtype) == (torch.bfloat16,) * 3
    assert {tensor.data_ptr() for tensor in layer.buffers()} == addresses
    assert torch.equal(layer.dense_weight(torch.float32), values)
    assert layer.float().dtype == torch.float32


@each_format
def test_a_state_dict_restores_the_weight(weight: QuantizedWeight, values: Tensor) -> None:
    state = QuantizedLinear(weight, torch.ones(48), torch.float32).state_dict()
    empty = weight.with_tensors(torch.zeros_like)
    layer = QuantizedLinear(empty, torch.zeros(48), torch.float32)
    layer.load_state_dict(state)
    assert torch.equal(layer.dense_weight(torch.float32), values) and bool((layer.bias == 1).all())


def test_a_layer_on_the_meta_device_is_there() -> None:
    layer = QuantizedLinear(nf4(weights())[0], torch.zeros(48), torch.float32)
    assert device_of(layer) == torch.device("cpu")
    layer.to("meta")
    assert device_of(layer) == torch.device("meta")


def test_a_layer_without_a_bias() -> None:
    layer = QuantizedLinear(DenseWeight(weights().half()), None, torch.float32)
    x = weights(3, seed=2)
    assert torch.equal(layer(x), x @ weights().half().float().T)


def test_layers_can_be_dequantized() -> None:
    weight, values = FORMATS["bitsandbytes NF4"]
    bias = torch.linspace(-1, 1, 48)
    model = nn.Sequential(
        nn.Sequential(QuantizedLinear(weight, bias, torch.float32)),
        QuantizedLinear(weight, None, torch.float32),
    ).eval()
    dequantize_layers(model, torch.bfloat16)
    layers = [model.get_submodule("0.0"), model.get_submodule("1")]
    for layer in layers:
        assert type(layer) is nn.Linear and not layer.training and not layer.weight.requires_grad
        assert torch.equal(layer.weight, values.bfloat16())
    assert torch.equal(layers[0].bias, bias.bfloat16())
    assert layers[1].bias is None


def test_a_layer_moves_to_a_device_without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated by the same device: no tensor stays in fp8, and the values do not change."""
    layers = [QuantizedLinear(each, weights(1, 48)[0], torch.float32) for each, _ in every_format().values()]
    rows = ScaledWeight(weights().to(FP8[0]), torch.linspace(1, 2, 48)[:, None])
    layers += [QuantizedLinear(rows, None, torch.bfloat16), Fp8Linear(to_fp8(rows), None, torch.float32)]
    expected = [layer.dense_weight(torch.float32) for layer in layers]
    x = weights(5, seed=1)
    monkeypatch.setattr(formats, "has_fp8", lambda device: False)
    for layer, values in zip(layers, expected, strict=True):
        layer.to("cpu")
        assert not any(buffer.dtype in FP8 for buffer in layer.buffers())
        assert torch.equal(layer.dense_weight(torch.float32), values)
        y = F.linear(x.to(layer.dtype), values.to(layer.dtype), layer.bias)
        assert torch.equal(layer(x.to(layer.dtype)), y)


def test_gradients_reach_the_inputs_and_not_the_weight() -> None:
    layer = QuantizedLinear(FORMATS["GGUF Q4_0"][0], None, torch.float32)
    x = weights(2).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, FORMATS["GGUF Q4_0"][1].sum(0).expand(2, -1))
    assert not any(p.requires_grad for p in layer.parameters())
