"""A linear layer that keeps its weight in another form, as quantised models have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StoredLinear(nn.Module):
    """Weights as whole numbers with a scale for each row; made dense at every call."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, layer: nn.Linear) -> StoredLinear:
        scales = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        codes = torch.round(layer.weight.detach() / scales).to(torch.int8)
        return cls(codes, scales, None if layer.bias is None else layer.bias.detach())

    @property
    def weight(self) -> Tensor:
        """A tensor without memory, for code that asks for a layer's dtype."""
        return torch.empty(self.out_features, self.in_features, device="meta")

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.scales).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense_weight(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def store(model: nn.Module, part: str = "blocks") -> None:
    """Put stored layers in place of the linear layers that have `part` in their names."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and part in name:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, StoredLinear.of(module))
