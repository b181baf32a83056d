"""int8 layers compute exactly what their codes and scales say."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.models import relative_error
from rectiflux.flux_core.backends import cpu_int8
from rectiflux.flux_core.backends.cpu_int8 import (
    Int8Linear,
    largest_exact_code,
    largest_weight_code,
    quantize_int8,
    quantize_rows,
)
from rectiflux.flux_core.backends.onednn import can_pack
from torch import Tensor

from .test_cpu_linear import CPU, EXACT, randn

TESTS = Path(__file__).resolve().parents[2]


def int8_layer(weight: Tensor, bias: Tensor | None = None, qkv_dim: int | None = None) -> Int8Linear:
    return Int8Linear(quantize_int8(weight), bias, weight.dtype, qkv_dim)


def test_codes_are_rounded_fractions_of_the_largest() -> None:
    """By hand: 254 / 127 is 2; 3 lies between the codes 1 and 2 and is rounded to the even one, -5 to -2."""
    codes, scale = quantize_rows(
        torch.tensor([[254.0, 3.0, -5.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, -127.0, 1.5, 2.5]])
    )
    assert codes.tolist() == [[127, 2, -2, 0], [0, 0, 0, 0], [0, -127, 2, 2]]
    assert scale.tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("packed", [True, False])
def test_it_computes_what_its_codes_say(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """y = s_x s_w (q_x . q_w) + b, the sums exact in integers; float32 rounds three times."""
    if not packed:
        monkeypatch.setattr(cpu_int8, "can_pack", lambda device, dtype: False)
    weight, bias, x = randn(48, 64), randn(48, seed=1), randn(2, 5, 64, seed=2)
    layer = int8_layer(weight, bias)
    qw, sw = quantize_rows(weight, largest_weight_code())
    qx, sx = quantize_rows(x.flatten(0, 1))
    expected = (qx.long() @ qw.long().T).double() * sx[:, None].double() * sw.double() + bias.double()
    assert torch.equal(layer.quantized.codes, qw)
    assert torch.equal(layer.dense_weight(torch.float32), qw * sw[:, None])
    torch.testing.assert_close(layer(x).double(), expected.view(2, 5, 48), rtol=1e-6, atol=1e-6)
    no_bias = int8_layer(weight)(x).double()
    torch.testing.assert_close(no_bias, (expected - bias).view(2, 5, 48), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", EXACT)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """With the largest code in every row the scales are 1, and nothing is lost."""
    weight = torch.zeros(3, 8)
    weight[:, 0], weight[1, 1], weight[2, 3] = float(largest_weight_code()), 5.0, -2.0
    x = torch.tensor([[0.0, 3.0, 0.0, 1.0, 127.0, 0.0, 0.0, 0.0]])
    assert int8_layer(weight.to(dtype))(x.to(dtype)).tolist() == [[0.0, 15.0, -2.0]]


ONE_MATMUL = """
import torch
from rectiflux.flux_core.backends.cpu_int8 import Int8Linear, quantize_int8
Int8Linear(quantize_int8(torch.randn(48, 64)), None, torch.float32)(torch.randn(5, 64))
"""


@pytest.mark.skipif(not can_pack(CPU, torch.int8), reason="no oneDNN here that multiplies int8")
def test_no_matmul_runs_in_onednns_reference_code() -> None:
    """Which takes a thousand times as long as any other."""
    script = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nimport conftest\n{ONE_MATMUL}"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    matmuls = [line for line in run.stdout.splitlines() if ",exec,cpu,matmul," in line]
    assert any("5x64:64x48" in line for line in matmuls)
    assert not [line for line in matmuls if ",matmul,ref" in line]


def test_errors_of_normal_weights_and_with_outliers() -> None:
    """Rounding errs by scale / sqrt(12) as uniform noise: at most 1 % for Gaussians of up to 4.2 sigma.

    On CPUs whose largest weight code is 64, 1.6 times as much.
    """
    x = randn(64, 256, seed=3)
    weight = randn(96, 256)
    outlying = weight.clone()
    outlying[:, 7] *= 100
    errors = []
    for w in (weight, outlying):
        y = F.linear(x, w)
        errors.append(float((int8_layer(w)(x) - y).norm() / y.norm()))
        step_w = w.abs().amax(1, keepdim=True) / largest_weight_code()
        step_x = x.abs().amax(1, keepdim=True) / 127
        noise = (x**2).sum() * (step_w**2).mean() / 12 * 96 + (step_x**2).mean() / 12 * 64 * (w**2).sum()
        assert errors[-1] == pytest.approx(float(noise**0.5 / y.norm()), rel=0.25)
    assert errors[0] < 0.015 * 127 / largest_weight_code() and errors[1] > 2 * errors[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_do_not_overflow(sign: int) -> None:
    """The largest codes everywhere: the worst case where pairs of products are added in 16 bits."""
    weight, x = torch.full((32, 512), 1.0), sign * torch.full((4, 512), 1.0)
    assert torch.allclose(int8_layer(weight)(x), torch.full((4, 32), 512.0 * sign), rtol=1e-6)


@pytest.mark.skipif(not can_pack(CPU, torch.int8), reason="no oneDNN here that multiplies int8")
@pytest.mark.parametrize(("sum_of_codes", "largest"), [(32767.0 * 32, 64), (64 * 127.0**2, 127)])
def test_a_cpu_that_overflows_is_detected(sum_of_codes: float, largest: int) -> None:
    assert largest_exact_code(lambda codes, *_: torch.full((16, 16), sum_of_codes)) == largest


def test_codes_survive_a_change_of_dtype_and_copies() -> None:
    layer = int8_layer(randn(48, 64), randn(48), 16)
    codes = layer.quantized.codes
    assert torch.equal(layer.bfloat16().quantized.codes, codes) and layer.dtype == torch.bfloat16
    x = randn(3, 64, dtype=torch.bfloat16)
    first, rest = layer.split_gelu(x)
    y = layer(x)
    assert torch.equal(first, y[:, :16])
    assert relative_error(rest, F.gelu(y[:, 16:], approximate="tanh")) < 0.01
    assert torch.equal(copy.deepcopy(layer).quantized.codes, codes)
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = randn(3, 64).requires_grad_()
    layer.float()(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense_weight(torch.float32).sum(0).expand(3, -1))
    assert layer.to("meta").device.type == "meta"
