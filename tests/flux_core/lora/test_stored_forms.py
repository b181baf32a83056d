"""LoRAs on every stored form of weights: the stored layer plus its adapters, the weight never dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rectiflux.benchmarks.reference import quantized as forms
from rectiflux.benchmarks.reference.models import SPEC, flux_transformer, relative_error
from rectiflux.flux_core.lora import LoraUse, read_lora, with_lora
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.flux_core.quant.linear import QuantizedLinear, QuantizedWeight
from torch import Tensor, nn

from .files import Change, kohya, merged
from .test_conventions import LINEAR, paint, whole

FORMS: dict[str, Callable[[Tensor], tuple[QuantizedWeight, Tensor]]] = {
    "fp8 scaled": forms.fp8,
    "int8 scaled": forms.int8,
    "GGUF Q4_0": forms.gguf,
    "GGUF Q8_0": lambda weight: forms.gguf(weight, "Q8_0"),
    "NF4": forms.nf4,
}


def in_form(form: str, dtype: torch.dtype) -> tuple[FluxTransformer, FluxTransformer]:
    """A model with stored layers where the form takes the weight, and one with the same numbers, float32."""
    stored, dense = flux_transformer().to(dtype), flux_transformer()
    for name in LINEAR:
        layer = dense.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if layer.in_features % 64:
            continue
        kept, numbers = FORMS[form](layer.weight)
        layer.weight.copy_(numbers)
        parent, _, last = name.rpartition(".")
        setattr(stored.get_submodule(parent), last, QuantizedLinear(kept, layer.bias, dtype))
    return stored, dense


def raw(tensor: Tensor) -> Tensor:
    """The tensor's bytes: torch compares no 8-bit floats."""
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_on_stored_weights(form: str) -> None:
    model, dense = in_form(form, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changes: list[Change] = whole(dense)
    use = LoraUse(read_lora(kohya(changes), SPEC), 0.7)
    adapted, report = with_lora(model, [use])
    assert report.files[0].matched() == 3 * len(LINEAR)
    assert relative_error(paint(adapted), paint(merged(dense, changes, 0.7))) < 1e-5
    assert adapted.dtype == model.dtype and adapted.device == model.device
    after = model.state_dict()
    assert all(torch.equal(raw(after[name]), raw(tensor)) for name, tensor in before.items())


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_on_stored_weights_in_bf16(form: str) -> None:
    model, dense = in_form(form, torch.bfloat16)
    changes = whole(dense)
    adapted, _ = with_lora(model, [LoraUse(read_lora(kohya(changes), SPEC), 0.7)])
    rounding = relative_error(paint(model).float(), paint(dense))
    assert adapted.dtype == torch.bfloat16
    assert {b.dtype for n, b in adapted.named_buffers() if "quantized" not in n} == {torch.bfloat16}
    assert relative_error(paint(adapted).float(), paint(merged(dense, changes, 0.7))) < 2 * rounding
