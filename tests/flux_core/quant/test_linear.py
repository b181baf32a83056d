"""Quantized weights have the values that their files specify; layers over them compute with exactly those."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.quantized import every_format, nf4, weights
from rectiflux.flux_core.backends.fp8 import Fp8Linear, to_fp8
from rectiflux.flux_core.backends.quantize import check_fp8
from rectiflux.flux_core.quant import formats as forms_module
from rectiflux.flux_core.quant import linear as stored_module
from rectiflux.flux_core.quant.formats import (
    FP8,
    DenseWeight,
    QuantizedWeight,
    ScaledWeight,
    fp8_as_bytes,
    has_fp8,
)
from rectiflux.flux_core.quant.linear import (
    QuantizedLinear,
    compute_dtype,
    dequantize_layers,
    device_of,
    weight_count,
)
from torch import nn

FORMS = every_format()
FORMS |= {
    f"{name} as bytes": (fp8_as_bytes(stored), numbers)
    for name, (stored, numbers) in FORMS.items()
    if fp8_as_bytes(stored) is not stored
}
each_form = pytest.mark.parametrize(("stored", "numbers"), FORMS.values(), ids=FORMS)


@each_form
def test_numbers(stored: QuantizedWeight, numbers: torch.Tensor) -> None:
    """Exactly in float32; once rounded in bfloat16."""
    assert (stored.shape, stored.numel()) == (torch.Size([48, 64]), 48 * 64)
    assert torch.equal(stored.dequantize(torch.float32), numbers)
    assert torch.equal(stored.dequantize(torch.bfloat16), numbers.bfloat16())


@each_form
def test_slices_do_not_show(
    stored: QuantizedWeight, numbers: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms_module, "SLICE", 5 * 64)
    assert torch.equal(stored.dequantize(torch.float32), numbers)


@each_form
def test_rows(stored: QuantizedWeight, numbers: torch.Tensor) -> None:
    part = stored.rows(7, 31)
    assert part.shape == (24, 64)
    assert torch.equal(part.dequantize(torch.float32), numbers[7:31])


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_is_a_linear_layer_of_these_numbers(
    stored: QuantizedWeight, numbers: torch.Tensor, dtype: torch.dtype
) -> None:
    bias = torch.linspace(-1, 1, 48)
    layer = QuantizedLinear(stored, bias, dtype)
    assert (layer.in_features, layer.out_features) == (64, 48)
    assert layer.bias is not None and layer.bias.dtype == dtype
    x = weights(5, seed=1).to(dtype)
    assert torch.equal(layer(x), F.linear(x, numbers.to(dtype), bias.to(dtype)))
    assert torch.equal(layer.dense_weight(torch.float32), numbers)


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compilers_see_one_operation(
    stored: QuantizedWeight, numbers: torch.Tensor, dtype: torch.dtype
) -> None:
    """It makes the layer's numbers, in memory of its own, of the shape that it promises."""
    layer = QuantizedLinear(stored, None, dtype)
    asked = (layer._kept(), layer._form_name, dtype, torch.device("cpu"))
    found = stored_module._dense(*asked)
    assert torch.equal(found, numbers.to(dtype))
    assert all(found.data_ptr() != kept.data_ptr() for kept in layer._kept())
    torch.library.opcheck(stored_module._dense, asked, test_utils="test_faketensor")


@each_form
def test_a_change_of_dtype_leaves_what_is_kept(stored: QuantizedWeight, numbers: torch.Tensor) -> None:
    layer = nn.Sequential(QuantizedLinear(stored, torch.zeros(48), torch.float32)).to(torch.bfloat16)[0]
    kept = {name: tensor.data_ptr() for name, tensor in stored.tensors().items()}
    assert (layer.dtype, compute_dtype(layer), layer.bias.dtype) == (torch.bfloat16,) * 3
    assert {name: tensor.data_ptr() for name, tensor in layer.stored.tensors().items()} == kept
    assert torch.equal(layer.dense_weight(torch.float32), numbers)
    assert layer.float().dtype == torch.float32


def test_a_layer_can_be_emptied_and_counted() -> None:
    layer = QuantizedLinear(nf4(weights())[0], torch.zeros(48), torch.float32)
    assert device_of(layer) == torch.device("cpu")
    assert weight_count(nn.Sequential(layer, nn.Linear(3, 2))) == 48 * 64 + 48 + 3 * 2 + 2
    layer.to("meta")
    assert device_of(layer) == torch.device("meta")
    assert weight_count(layer) == 0


def test_bytes_and_names() -> None:
    """64 numbers of NF4 take 32 bytes and one float32 scale; 32 of Q4_0 take 18 bytes."""
    expected = {
        "bf16": 2 * 3072,
        "fp8 e4m3fn scaled": 3072 + 4,
        "GGUF Q4_0": 3072 // 32 * 18,
        "bitsandbytes NF4": 3072 // 64 * 36 + 64,
    }
    assert {name: FORMS[name][0].nbytes for name in expected} == expected
    assert [FORMS[name][0].label for name in expected] == [*expected]
    assert "64, 48, GGUF Q4_0, computed in torch.bfloat16" in str(
        QuantizedLinear(FORMS["GGUF Q4_0"][0], None, torch.bfloat16)
    )


def test_without_a_bias() -> None:
    layer = QuantizedLinear(DenseWeight(weights().half()), None, torch.float32)
    x = weights(3, seed=2)
    assert torch.equal(layer(x), x @ weights().half().float().T)


def test_layers_can_be_made_torchs_own() -> None:
    """Same numbers, same places, no stored layer left."""
    stored, numbers = FORMS["bitsandbytes NF4"]
    bias = torch.linspace(-1, 1, 48)
    model = nn.Sequential(
        nn.Sequential(QuantizedLinear(stored, bias, torch.float32)),
        QuantizedLinear(stored, None, torch.float32),
    ).eval()
    dequantize_layers(model, torch.bfloat16)
    layers = [model.get_submodule("0.0"), model.get_submodule("1")]
    for layer in layers:
        assert type(layer) is nn.Linear and not layer.training and not layer.weight.requires_grad
        assert torch.equal(layer.weight, numbers.bfloat16())
    assert torch.equal(layers[0].bias, bias.bfloat16())
    assert layers[1].bias is None


def test_fp8_can_be_kept_as_bytes() -> None:
    """In the file's own memory, under its own label; what is no fp8 is left alone."""
    names = [name.removesuffix(" as bytes") for name in FORMS if name.endswith("as bytes")]
    assert names == ["fp8 e5m2", "fp8 e4m3fn scaled", "joined"]
    for name in names:
        stored, kept = FORMS[name][0], FORMS[f"{name} as bytes"][0]
        assert kept.label == stored.label
        assert not any(tensor.dtype in FP8 for tensor in kept.tensors().values())
        places = {tensor.data_ptr() for tensor in kept.tensors().values()}
        assert all(t.data_ptr() in places for t in stored.tensors().values() if t.dtype in FP8)


def test_a_layer_moves_to_a_device_without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the same device, which is said to have none: not a tensor in fp8 is left, and the numbers are."""
    layers = [
        QuantizedLinear(stored, weights(1, 48)[0], torch.float32) for stored, _ in every_format().values()
    ]
    rows = ScaledWeight(weights().to(FP8[0]), torch.linspace(1, 2, 48)[:, None])
    layers += [QuantizedLinear(rows, None, torch.bfloat16), Fp8Linear(to_fp8(rows), None, torch.float32)]
    expected = [layer.dense_weight(torch.float32) for layer in layers]
    x = weights(5, seed=1)
    monkeypatch.setattr(forms_module, "has_fp8", lambda device: False)
    for layer, numbers in zip(layers, expected, strict=True):
        layer.to("cpu")
        assert not any(buffer.dtype in FP8 for buffer in layer.buffers())
        assert torch.equal(layer.dense_weight(torch.float32), numbers)
        y = F.linear(x.to(layer.dtype), numbers.to(layer.dtype), layer.bias)
        assert torch.equal(layer(x.to(layer.dtype)), y)


def test_devices_without_fp8() -> None:
    """This torch has no such device at all, and so no fp8 on it; nor would it on a Mac."""
    assert has_fp8(torch.device("cpu")) and not has_fp8(torch.device("mps"))
    check_fp8(torch.device("cpu"))
    with pytest.raises(ValueError, match="for devices that have 8-bit floats, and mps has none; choose auto"):
        check_fp8(torch.device("mps"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_fp8_number(dtype: torch.dtype) -> None:
    """All 256 codes are torch's, the ones that are no number too."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
    torch.testing.assert_close(
        DenseWeight(codes).dequantize(torch.float32), codes.float(), rtol=0, atol=0, equal_nan=True
    )


def test_blocks_that_end_in_the_middle_of_a_row() -> None:
    """NF4 counts its blocks through the flat numbers, and the last may be short."""
    weight = weights(5, 38)
    form, numbers = nf4(weight)
    assert torch.equal(form.dequantize(torch.float32), numbers)
    assert isinstance(form.rows(1, 3), DenseWeight)
    assert torch.equal(form.rows(1, 3).dequantize(torch.float32), numbers[1:3])


@pytest.mark.parametrize("form", [name for name in FORMS if "joined" not in name])
def test_rows_are_kept_in_their_form(form: str) -> None:
    assert type(FORMS[form][0].rows(7, 31)) is type(FORMS[form][0])


def test_a_gradient_passes_to_the_input() -> None:
    layer = QuantizedLinear(FORMS["GGUF Q4_0"][0], None, torch.float32)
    x = weights(2).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, FORMS["GGUF Q4_0"][1].sum(0).expand(2, -1))
    assert not any(p.requires_grad for p in layer.parameters())
    assert {name for name, _ in layer.named_buffers()} == {"stored_packed"}
