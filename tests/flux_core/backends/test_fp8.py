"""fp8 layers compute exactly what their codes say, whether a GPU multiplies them or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.models import relative_error
from rectiflux.benchmarks.reference.quantized import fp8
from rectiflux.flux_core.backends import fp8 as module
from rectiflux.flux_core.backends.fp8 import FP8, Fp8Linear, can_multiply, quantize_rows_fp8, to_fp8
from rectiflux.flux_core.lora import AdaptedLinear, LoRA, Part
from rectiflux.flux_core.quant.formats import ConcatenatedWeight, DenseWeight, ScaledWeight
from rectiflux.flux_core.quant.linear import compute_dtype, device_of
from torch import Tensor

from .test_cpu_linear import CPU, randn

BF16 = torch.bfloat16


def layer_of(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Fp8Linear, Tensor, Tensor]:
    weight, b = randn(48, 64), randn(48, seed=1)
    return Fp8Linear(to_fp8(weight), b if bias else None, dtype), weight, b


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """s_x s_w (q_x . q_w) in float64, from the definition alone."""
    values = []
    for rows in (x, weight):
        scale = rows.float().abs().amax(1, keepdim=True) / 448
        values.append((rows.float() / scale).to(FP8).double() * scale.double())
    return values[0] @ values[1].T


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """As on a GPU that multiplies fp8: torch's fp8 matmul on the CPU, with the layouts that GPUs require."""
    calls: list[dict[str, Any]] = []
    inner = torch.ops.aten._scaled_mm

    def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Any, **how: Any) -> Tensor:
        assert a.dtype == b.dtype == FP8 and scale_a.dtype == scale_b.dtype == torch.float32
        assert a.is_contiguous() and b.t().is_contiguous(), "row-major times column-major"
        assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
        assert scale_a.is_contiguous() and scale_b.is_contiguous()
        assert not any(side % 16 for side in b.shape) and (bias is None or bias.dtype == BF16)
        calls.append(how)
        return inner(a, b, scale_a, scale_b, bias, **how)

    monkeypatch.setattr(torch.ops.aten, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(module, "can_multiply", lambda device: True)
    return calls


def test_codes_are_rounded_fractions_of_the_largest() -> None:
    """By hand: 448 / 448 is 1. From 16 to 32 codes are 2 apart: 19 is rounded to 20, whose code is even."""
    codes, scale = quantize_rows_fp8(torch.tensor([[448.0, 19.0, -17.0, 0.4], [0.0, 0.0, 0.0, 0.0]]))
    assert codes.float().tolist() == [[448.0, 20.0, -16.0, 0.40625], [0.0, 0.0, 0.0, 0.0]]
    assert float(scale[0]) == 1.0 and float(scale[1]) > 0
    codes, scale = quantize_rows_fp8(torch.tensor([[-896.0, 3.0], [1e-20, 0.0]]))
    assert codes.float().tolist() == [[-448.0, 1.5], [0.0, 0.0]] and float(scale[0]) == 2.0


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_of_a_row_never_overflows(seed: int) -> None:
    """Values above 464 would become NaN."""
    x = randn(2000, 5, seed=seed) * torch.logspace(-6, 6, 2000)[:, None]
    codes, scale = quantize_rows_fp8(x)
    assert codes.float().isfinite().all() and (codes.float().abs().amax(1) == 448).all()
    bound = (x.abs() / 16).maximum(scale * 2**-10)
    assert ((codes.float() * scale - x).abs() <= bound * 1.0001).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (5, 64), (2, 3, 64)])
def test_it_computes_what_its_codes_say(bias: bool, shape: tuple[int, ...]) -> None:
    layer, weight, b = layer_of(bias)
    x = randn(*shape, seed=2)
    y = layer(x)
    expected = reference(x.reshape(-1, 64), weight) + (b.double() if bias else 0)
    assert y.shape == (*shape[:-1], 48) and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected.view(y.shape), rtol=1e-6, atol=1e-6)
    assert y.numel() == 0 or 0.01 < relative_error(y, F.linear(x, weight, b if bias else None)) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_a_gpu_computes_the_same(dtype: torch.dtype, gpu: list[dict[str, Any]]) -> None:
    """Rounded to bfloat16, the dtype of its results."""
    layer, weight, b = layer_of(dtype=dtype)
    x = randn(2, 5, 64, seed=2).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 5, 48)
    expected = reference(x.flatten(0, 1), weight) + b.to(dtype).to(BF16).double()
    torch.testing.assert_close(y.double().flatten(0, 1), expected, rtol=2**-7, atol=2**-6)
    assert gpu == [{"out_dtype": BF16, "use_fast_accum": True}]


def test_devices_that_multiply_fp8(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    capability, fails = (9, 0), False

    def product(x: Any, weight: Any, bias: Tensor) -> Tensor:
        if fails:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")
        return torch.full((16, 16), 17.0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(module, "_scaled_mm", product)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    assert not can_multiply(CPU) and can_multiply(torch.device("cuda", 0))
    capability = (8, 6)
    assert not can_multiply(torch.device("cuda", 1)) and can_multiply(torch.device("cuda", 0))
    capability, fails = (12, 0), True
    assert not can_multiply(torch.device("cuda", 2)) and not can_multiply(torch.device("cuda", 2))
    (record,) = caplog.records
    assert "cuda:2: CUBLAS_STATUS_NOT_SUPPORTED" in record.getMessage()
    module._succeeds.cache_clear()


def test_files_keep_their_own_codes() -> None:
    """Unscaled, scaled and concatenated: the values stay exactly the same."""
    scaled, scaled_values = fp8(randn(48, 64))
    plain = randn(48, 64).to(FP8)
    rows = ScaledWeight(plain, torch.linspace(0.5, 2, 48)[:, None])
    joined = ConcatenatedWeight((scaled, DenseWeight(plain), rows))
    expected = [
        (scaled, scaled_values),
        (DenseWeight(plain), plain.float()),
        (rows, plain.float() * rows.scale),
        (joined, torch.cat([scaled_values, plain.float(), plain.float() * rows.scale])),
    ]
    for weight, values in expected:
        layer = Fp8Linear(to_fp8(weight), None, torch.float32)
        assert torch.equal(layer.dense_weight(torch.float32), values)
        assert layer.quantized.scale.shape == (len(values), 1)
    assert to_fp8(scaled).codes.data_ptr() == scaled.codes.data_ptr()
    assert torch.equal(
        to_fp8(DenseWeight(randn(48, 64).half())).codes, quantize_rows_fp8(randn(48, 64).half())[0]
    )


def test_it_changes_dtype_and_device() -> None:
    layer, weight, _ = layer_of()
    codes = layer.quantized.codes
    assert layer.bfloat16().dtype == compute_dtype(layer) == BF16 and layer.bias.dtype == BF16
    assert layer.quantized.codes is codes and layer.quantized.scale.dtype == torch.float32
    assert device_of(layer) == CPU
    assert torch.equal(copy.deepcopy(layer)(randn(3, 64)), layer(randn(3, 64)))
    assert "64, 48, fp8 e4m3fn scaled" in repr(layer) and layer.weight.is_meta
    other = layer_of()[0]
    other.load_state_dict(layer.float().state_dict())
    assert torch.equal(other(randn(3, 64)), layer(randn(3, 64)))
    assert device_of(layer.to("meta")).type == "meta"


def test_gradients_reach_the_inputs() -> None:
    layer, _, _ = layer_of()
    x = randn(3, 64).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense_weight(torch.float32).sum(0).expand(3, -1))


def test_a_lora_on_it() -> None:
    layer, _, _ = layer_of()
    down, up, x = randn(4, 64, seed=3), randn(48, 4, seed=4), randn(5, 64, seed=2)
    adapted = AdaptedLinear(layer, [Part(LoRA(down, up), None, None, 0.5)], torch.float32)
    torch.testing.assert_close(adapted(x), layer(x) + 0.5 * x @ (up @ down).T, rtol=1e-5, atol=1e-4)
    merged = layer.dense_weight(torch.float32) + 0.5 * up @ down
    torch.testing.assert_close(adapted.dense_weight(), merged, rtol=1e-5, atol=1e-5)
    assert adapted.device == CPU


def test_compilers_can_trace_it() -> None:
    layer = layer_of()[0]
    x = randn(5, 64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)
