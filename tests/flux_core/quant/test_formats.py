"""Quantized weights dequantize to the values that their formats specify, exactly."""

from __future__ import annotations

import pytest
import torch
from rectiflux.benchmarks.reference.quantized import every_format, nf4, weights
from rectiflux.flux_core.quant import formats, four_bit
from rectiflux.flux_core.quant.formats import FP8, DenseWeight, QuantizedWeight, has_fp8
from rectiflux.flux_core.quant.four_bit import FourBitWeight, NestedScales
from rectiflux.flux_core.quant.operator import dequantized, rebuild
from torch import Tensor

FORMATS = every_format()
FORMATS |= {
    f"{name} without fp8": (weight.without_fp8(), values)
    for name, (weight, values) in FORMATS.items()
    if any(tensor.dtype in FP8 for tensor in weight.tensors())
}
each_format = pytest.mark.parametrize(("weight", "values"), FORMATS.values(), ids=FORMATS)


@each_format
def test_values(weight: QuantizedWeight, values: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact in float32, rounded once in bfloat16, and independent of the slices."""
    assert (weight.shape, weight.numel()) == (torch.Size([48, 64]), 48 * 64)
    assert torch.equal(weight.dequantize(torch.float32), values)
    assert torch.equal(weight.dequantize(torch.bfloat16), values.bfloat16())
    for module in (formats, four_bit):
        monkeypatch.setattr(module, "SLICE", 5 * 64)
    assert torch.equal(weight.dequantize(torch.float32), values)


@each_format
def test_rows(weight: QuantizedWeight, values: Tensor) -> None:
    """In the same format, except for concatenated weights."""
    part = weight.rows(7, 31)
    assert part.shape == (24, 64)
    assert torch.equal(part.dequantize(torch.float32), values[7:31])
    assert type(part) in (type(weight), DenseWeight)


@each_format
def test_a_weight_is_rebuilt_from_its_description(weight: QuantizedWeight, values: Tensor) -> None:
    twin = rebuild(weight.description, weight.tensors())
    assert type(twin) is type(weight) and twin.label == weight.label
    assert [t.data_ptr() for t in twin.tensors()] == [t.data_ptr() for t in weight.tensors()]
    assert torch.equal(twin.dequantize(torch.float32), values)


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_of_compiled_code(weight: QuantizedWeight, values: Tensor, dtype: torch.dtype) -> None:
    """It returns new memory of the shape that its fake promises."""
    arguments = (weight.tensors(), weight.description, [48, 64], dtype, torch.device("cpu"))
    found = dequantized(*arguments)
    assert torch.equal(found, values.to(dtype))
    assert all(found.data_ptr() != tensor.data_ptr() for tensor in weight.tensors())
    torch.library.opcheck(dequantized, arguments, test_utils="test_faketensor")


def test_bytes_and_labels() -> None:
    """64 values of NF4 take 32 bytes and one float32 scale; 32 of Q4_0 take 18 bytes."""
    expected = {
        "bf16": 2 * 3072,
        "fp8 e4m3fn scaled": 3072 + 4,
        "GGUF Q4_0": 3072 // 32 * 18,
        "bitsandbytes NF4": 3072 // 64 * 36 + 64,
    }
    assert {name: FORMATS[name][0].nbytes for name in expected} == expected
    assert [FORMATS[name][0].label for name in expected] == [*expected]


def test_fp8_as_bytes() -> None:
    """In the file's own memory, under its own label."""
    names = [name.removesuffix(" without fp8") for name in FORMATS if name.endswith("without fp8")]
    assert {"fp8 e5m2", "fp8 e4m3fn scaled"} < {*names}
    for name in names:
        weight, twin = FORMATS[name][0], FORMATS[f"{name} without fp8"][0]
        assert twin.label == weight.label
        assert not any(tensor.dtype in FP8 for tensor in twin.tensors())
        addresses = {tensor.data_ptr() for tensor in twin.tensors()}
        assert all(t.data_ptr() in addresses for t in weight.tensors() if t.dtype in FP8)


def test_devices_without_fp8() -> None:
    """This torch has no MPS device at all, and so no fp8 on it; nor does a Mac."""
    assert has_fp8(torch.device("cpu")) and not has_fp8(torch.device("mps"))


@pytest.mark.parametrize("dtype", FP8)
def test_every_fp8_code(dtype: torch.dtype) -> None:
    """All 256 have torch's values, NaN and inf included."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
    torch.testing.assert_close(
        DenseWeight(codes).dequantize(torch.float32), codes.float(), rtol=0, atol=0, equal_nan=True
    )


def test_blocks_that_cross_rows() -> None:
    """NF4's blocks run over the flattened weight, and the last may be short."""
    weight, values = nf4(weights(5, 38))
    assert torch.equal(weight.dequantize(torch.float32), values)
    assert isinstance(weight.rows(1, 3), DenseWeight)
    assert torch.equal(weight.rows(1, 3).dequantize(torch.float32), values[1:3])


def test_a_4_bit_weight_whose_tensors_do_not_fit_its_shape() -> None:
    packed, scales, levels = torch.zeros(32, dtype=torch.uint8), torch.ones(1), torch.zeros(16)
    assert FourBitWeight(packed, scales, levels, [1, 64], 64).shape == (1, 64)
    for size, block in (([2, 64], 64), ([1, 64], 32), ([1, 64], 0), ([], 64), ([2**40, 2**40], 64)):
        with pytest.raises(ValueError, match="4-bit"):
            FourBitWeight(packed, scales, levels, size, block)
    codes, nested_levels = torch.zeros(1, dtype=torch.uint8), torch.zeros(256)
    NestedScales(codes, nested_levels, torch.ones(1))
    for wrong in ((codes, levels, torch.ones(1)), (codes, nested_levels, torch.ones(2))):
        with pytest.raises(ValueError, match="4-bit"):
            NestedScales(*wrong)
