"""Models with quantized weights, and the same models with the dequantized ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rectiflux.benchmarks.reference import quantized as formats
from rectiflux.benchmarks.reference.models import flux_transformer
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.flux_core.quant.linear import QuantizedLinear, QuantizedWeight
from torch import Tensor, nn

FORMATS: dict[str, Callable[[Tensor], tuple[QuantizedWeight, Tensor]]] = {
    "fp8 scaled": formats.fp8,
    "int8 scaled": formats.int8,
    "GGUF Q4_0": formats.gguf,
    "GGUF Q8_0": lambda weight: formats.gguf(weight, "Q8_0"),
    "NF4": formats.nf4,
}


def quantized(
    form: str = "int8 scaled", dtype: torch.dtype = torch.float32, part: str = ""
) -> tuple[FluxTransformer, FluxTransformer]:
    """A model whose linear layers with `part` in their names are quantized, and its float32 twin.

    Layers whose inputs do not divide into blocks of 64 stay dense, but for int8.
    """
    model, dense = flux_transformer().to(dtype), flux_transformer()
    for name, layer in list(dense.named_modules()):
        if (
            isinstance(layer, nn.Linear)
            and part in name
            and (form[:4] == "int8" or not layer.in_features % 64)
        ):
            weight, values = FORMATS[form](layer.weight)
            layer.weight.copy_(values)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, QuantizedLinear(weight, layer.bias, dtype))
    return model, dense
