"""ComfyUI's linear layers in place of torch's, and q/k norms whose scale is a `weight`, as in ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..flux_core.model.layers import RMSNorm


class ComfyNorm(RMSNorm):
    """A q/k norm that has its scale under ComfyUI's name, `weight`, by which LoRAs and saved files have it.

    By `comfy_cast_weights` ComfyUI recognizes a layer that may be offloaded, and puts its patches, or a
    difference that is trained, in `weight_function`.
    """

    comfy_cast_weights = False
    bias = None

    def __init__(self, norm: RMSNorm) -> None:
        nn.Module.__init__(self)
        self.weight = norm.scale
        self.weight_function: list[Callable[[Tensor], Tensor]] = []
        self.bias_function: list[Callable[[Tensor], Tensor]] = []

    @property
    def scale(self) -> Tensor:
        """The weight with ComfyUI's functions applied, which may write into a copy."""
        scale: Tensor = self.weight
        for function in self.weight_function:
            scale = function(scale.clone())
        return scale


def use_comfy_layers(network: nn.Module, operations: Any) -> None:
    """Replace torch's linear layers by ComfyUI's, which can be loaded one by one, and the q/k norms."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is RMSNorm:
                setattr(parent, name, ComfyNorm(layer).train(layer.training))
            elif type(layer) is nn.Linear:
                bias = layer.bias is not None
                replaced = operations.Linear(layer.in_features, layer.out_features, bias, device="meta")
                replaced.weight, replaced.bias = layer.weight, layer.bias
                setattr(parent, name, replaced)
