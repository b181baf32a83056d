"""LoRAs on quantized weights of every format: added beside the layer, whose weight stays as it is."""

from __future__ import annotations

import pytest
import torch
from rectiflux.benchmarks.reference.models import SPEC, relative_error
from rectiflux.flux_core.lora import AdaptedLinear, LoraUse, read_lora, with_lora
from torch import Tensor

from .files import kohya, merged
from .quantized import FORMATS, quantized
from .test_conventions import LINEAR, velocity, whole


def raw(tensor: Tensor) -> Tensor:
    """The tensor's bytes: torch compares no 8-bit floats."""
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("form", FORMATS)
def test_a_lora_on_quantized_weights(form: str) -> None:
    """Of every layer that the format can hold, the first and the last included."""
    model, dense = quantized(form)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changes = whole(dense)
    adapted, report = with_lora(model, [LoraUse(read_lora(kohya(changes), SPEC), 0.7)])
    assert report.files[0].matched() == 3 * len(LINEAR)
    assert relative_error(velocity(adapted), velocity(merged(dense, changes, 0.7))) < 1e-5
    assert adapted.dtype == model.dtype and adapted.device == model.device
    after = model.state_dict()
    assert all(torch.equal(raw(after[name]), raw(tensor)) for name, tensor in before.items())


@pytest.mark.parametrize("form", FORMATS)
def test_a_lora_on_quantized_weights_in_bf16(form: str) -> None:
    model, dense = quantized(form, torch.bfloat16)
    changes = whole(dense)
    adapted, _ = with_lora(model, [LoraUse(read_lora(kohya(changes), SPEC), 0.7)])
    rounding = relative_error(velocity(model).float(), velocity(dense))
    layers = [module for module in adapted.modules() if isinstance(module, AdaptedLinear)]
    stacks = [buffer for layer in layers for name, buffer in layer.named_buffers() if "stack" in name]
    assert adapted.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in stacks} == {torch.bfloat16}
    assert relative_error(velocity(adapted).float(), velocity(merged(dense, changes, 0.7))) < 2 * rounding


def test_a_quantized_layer_whose_weight_is_replaced_becomes_a_plain_one() -> None:
    model, _ = quantized(part="blocks")
    name = "double_blocks.0.img_attn.proj"
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    adapted, _ = with_lora(model, [LoraUse(read_lora({f"{name}.set_weight": weight}, SPEC), 0.5)])
    layer = adapted.get_submodule(name)
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, model.get_submodule(name).bias)
