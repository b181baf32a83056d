"""Weights that stay quantised under ComfyUI's ModelPatcher.

ComfyUI patches weights in place: it would need the numbers of every layer that a LoRA changes. Here a layer
keeps the codes of its file, and ComfyUI's patches are applied beside it, or to the numbers that it makes when
it is used: what is kept never changes, so that removing a LoRA has nothing to undo.

What ComfyUI sees of such a layer is a `weight` in the state dict, by which LoRA loaders find it, and no
parameter, so that nothing is patched in place. What is relied on, as of ComfyUI 0.33: ModelPatcher.patches by
key, its callback ON_LOAD after every change of them, comfy.lora.calculate_weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..flux_core.compiling import run_compiled
from ..flux_core.forms import Plain
from ..flux_core.fp8 import Fp8Linear
from ..flux_core.lora.arithmetic import LowRankStack
from ..flux_core.lora.terms import Terms
from ..flux_core.stored import StoredLinear


class StoredWeight(Tensor):
    """A stored layer's weight [out, in] as others see it: shape, dtype, device; numbers only when asked.

    It counts the bytes that are kept. Any operation makes the numbers first; writing into it is refused.
    """

    layer: StoredLinear

    @staticmethod
    def __new__(cls, layer: StoredLinear) -> StoredWeight:
        shape = (layer.out_features, layer.in_features)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer.device)
        self.layer = layer
        return self

    @property
    def nbytes(self) -> int:
        return self.layer.stored.nbytes

    @property
    def data(self) -> Tensor:
        return self  # not numbers, into which one could write without effect

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        return False  # so that what saves a model asks for `contiguous`

    def contiguous(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer.dense_weight(self.dtype)

    def __repr__(self) -> str:
        return f"StoredWeight({[*self.shape]}, {self.layer.stored.label})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise TypeError(
                f"weights that stay {args[0].layer.stored.label} cannot be overwritten, as scheduled LoRAs "
                "(hooks) do; load the LoRA with Load FLUX LoRA, or choose weight_dtype bf16 and a bf16 file"
            )
        args, kwargs = pytree.tree_map_only(cls, lambda w: w.contiguous(), (args, kwargs or {}))
        return func(*args, **kwargs)


class PatchedLinear(StoredLinear):
    """A stored linear layer with ComfyUI's patches: LoRAs beside it, all else merged at every use.

    By `comfy_cast_weights` ComfyUI knows that it may stay off the device when memory is low: what is kept is
    brought over, layer by layer, when it is used. Patches of its bias are then in `bias_function`; those of
    its weight, which ComfyUI puts in `weight_function`, are in `patches` already.
    """

    comfy_cast_weights = False

    def __init__(self, layer: StoredLinear) -> None:
        super().__init__(layer.stored, layer.bias, layer.dtype)
        self.key, self.patches = "", []
        self.beside: LowRankStack | None = None
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.device, x.dtype)
        for function in self.bias_function:
            bias = function(None if bias is None else bias.clone())  # it is written into
        y = self.product(x, bias)
        if self.beside is None:
            return y
        if self.beside.kept("down", 0).device != x.device:
            self.beside.to(x.device)
        return self.beside(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])).view(y.shape)

    @property
    def weight(self) -> Tensor:
        return StoredWeight(self)

    def patch(self, key: str, patches: list[Any]) -> None:
        """Use these patches of ComfyUI's from now on, in place of those before.

        Where all are plain LoRAs their two products are added beside the layer's own, which costs only these;
        else the patches are merged into the numbers at every use.
        """
        self.key, self.patches = key, []
        self.beside = low_rank(patches, self)
        if self.beside is None:
            self.patches = [(p[0], _at(p[1], self.device), *p[2:]) for p in patches]

    def numbers_for(self, x: Tensor) -> Tensor:
        """The weight with its patches, which ComfyUI merges in float32."""
        if not self.patches:
            return super().numbers_for(x)
        import comfy.lora

        stored = self.stored.to(x.device)
        weight = stored.dense(torch.float32)
        weight = weight.clone() if isinstance(stored, Plain) else weight  # it is written into
        return comfy.lora.calculate_weight(self.patches, weight, self.key).to(x.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


class PatchedFp8Linear(PatchedLinear, Fp8Linear):
    """The same of a layer that multiplies in fp8; where patches are merged, its numbers are multiplied."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return StoredLinear.product(self, x, bias) if self.patches else Fp8Linear.product(self, x, bias)


def low_rank(patches: list[Any], layer: StoredLinear) -> LowRankStack | None:
    """The products of plain LoRAs, on the layer's device; None where there are none, or any other patch."""
    import comfy.weight_adapter

    placed = []
    for strength, value, strength_model, offset, function, *_ in patches:
        if not isinstance(value, comfy.weight_adapter.LoRAAdapter):
            return None
        up, down, alpha, *others = value.weights
        scaled = strength_model != 1.0 or function is not None or (offset is not None and offset[0] != 0)
        if scaled or any(other is not None for other in others):
            return None
        scale = strength * (1.0 if alpha is None else float(alpha) / down.shape[0])
        rows = (0, layer.out_features) if offset is None else (offset[1], offset[2])
        placed.append((rows, Terms(((down.flatten(1).float(), scale * up.flatten(1).float()),))))
    return LowRankStack(placed, layer.in_features, layer.dtype).to(layer.device) if placed else None


def _at(value: Any, device: torch.device) -> Any:
    """A patch with its tensors on a device; they come from the file on the CPU."""
    import comfy.weight_adapter

    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        return type(value)(value.loaded_keys, _at(value.weights, device))
    return type(value)(_at(v, device) for v in value) if type(value) in (tuple, list) else value


def run_block(block: nn.Module, *inputs: Any) -> Any:
    """A block compiled; as it is where patches are merged into its numbers, which is ComfyUI's own code."""
    merging = any(isinstance(layer, PatchedLinear) and layer.patches for layer in block.modules())
    return block(*inputs) if merging else run_compiled(block, *inputs)


def keep_stored(module: nn.Module) -> bool:
    """Put `PatchedLinear` in the place of stored layers; whether there are any."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, StoredLinear):
                kind = PatchedFp8Linear if isinstance(layer, Fp8Linear) else PatchedLinear
                setattr(parent, name, kind(layer).train(layer.training))
    return any(isinstance(layer, PatchedLinear) for layer in module.modules())


def follow(patcher: Any) -> None:
    """Have the stored layers of a patcher's model use the patches of whichever of its clones is loaded."""
    from comfy.patcher_extension import CallbacksMP

    patcher.add_callback(CallbacksMP.ON_LOAD, lambda loaded, *_: _use(loaded.model, loaded.patches))
    patcher.add_callback(CallbacksMP.ON_DETACH, lambda detached, *_: _use(detached.model, {}))


def _use(model: nn.Module, patches: dict[str, Any]) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, PatchedLinear):
            layer.patch(f"{name}.weight", patches.get(f"{name}.weight", []))
