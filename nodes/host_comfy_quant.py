"""Weights that stay quantised under ComfyUI's ModelPatcher.

ComfyUI patches weights in place: it would need the numbers of every layer that a LoRA changes. Here a layer
keeps the codes of its file, or those of fp8 or int8 that it got when it was loaded, and ComfyUI's patches are
applied beside it, or to the numbers that it makes when it is used: what is kept never changes, so that
removing a LoRA has nothing to undo.

What ComfyUI sees of such a layer is a `weight` in the state dict, by which LoRA loaders find it, and no
parameter, so that nothing is patched in place. What is relied on, as of ComfyUI 0.33: ModelPatcher.patches by
key, its callback ON_LOAD after every change of them, comfy.lora.calculate_weight.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..flux_core.backends.compile import CompiledBlocks
from ..flux_core.backends.cpu_int8 import Int8Linear
from ..flux_core.backends.fp8 import Fp8Linear
from ..flux_core.lora.arithmetic import LowRankStack
from ..flux_core.lora.terms import Terms
from ..flux_core.model.layers import Shared
from ..flux_core.quant.formats import DenseWeight
from ..flux_core.quant.linear import OpaqueWeightLinear, QuantizedLinear


class StoredWeight(Tensor):
    """A layer's weight [out, in] as others see it: shape, dtype, device; numbers only when asked.

    It counts the bytes that are kept. Any operation makes the numbers first; writing into it is refused.
    """

    layer: Patched

    @staticmethod
    def __new__(cls, layer: Patched) -> StoredWeight:
        shape = (layer.out_features, layer.in_features)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer.device)
        self.layer = layer
        return self

    @property
    def nbytes(self) -> int:
        return self.layer.kept_bytes

    @property
    def data(self) -> Tensor:
        return self  # not numbers, into which one could write without effect

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        return False  # so that what saves a model asks for `contiguous`

    def contiguous(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer.dense_weight(self.dtype)

    def __repr__(self) -> str:
        return f"StoredWeight({[*self.shape]}, {self.layer.label})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise TypeError(
                f"weights that stay {args[0].layer.label} cannot be overwritten, as scheduled LoRAs "
                "(hooks) do; load the LoRA with Load FLUX LoRA, or choose weight_dtype bf16 and a bf16 file"
            )
        args, kwargs = pytree.tree_map_only(cls, lambda w: w.contiguous(), (args, kwargs or {}))
        return func(*args, **kwargs)


class Patched(OpaqueWeightLinear):
    """A linear layer that keeps its weight in a form of its own, with ComfyUI's patches: LoRAs beside it, all
    else merged at every use.

    By `comfy_cast_weights` ComfyUI knows that it may stay off the device when memory is low: what is kept is
    brought over, layer by layer, when it is used. Patches of its bias are then in `bias_function`; those of
    its weight, which ComfyUI puts in `weight_function`, are in `patches` already.
    """

    comfy_cast_weights = False
    product: Callable[[Tensor, Tensor | None], Tensor]
    """(x [..., in], bias [out]) -> x times the transpose of the weight as it is kept, plus the bias."""

    def begin(self) -> None:
        """Have no patches yet."""
        self.key, self.patches = "", []
        self.beside: LowRankStack | None = None
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []

    @property
    @abstractmethod
    def label(self) -> str:
        """The form, in a few words."""

    @property
    @abstractmethod
    def kept_bytes(self) -> int:
        """Bytes of what is kept of the weight."""

    @abstractmethod
    def numbers(self, device: torch.device) -> Tensor:
        """The weight [out, in] as it is kept, float32 on a device, to be written into."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.device, x.dtype)
        for function in self.bias_function:
            bias = function(None if bias is None else bias.clone())  # it is written into
        y = F.linear(x, self.merged(x), bias) if self.patches else self.product(x, bias)
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

    def merged(self, x: Tensor) -> Tensor:
        """The weight with its patches, which ComfyUI merges in float32, where x is and in its dtype."""
        import comfy.lora

        return comfy.lora.calculate_weight(self.patches, self.numbers(x.device), self.key).to(x.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


class PatchedQuantizedLinear(Patched, QuantizedLinear):
    """The same of a layer whose weight stays as the file has it."""

    def __init__(self, layer: QuantizedLinear) -> None:
        QuantizedLinear.__init__(self, layer.stored, layer.bias, layer.dtype)
        self.begin()

    @property
    def label(self) -> str:
        return self.stored.label

    @property
    def kept_bytes(self) -> int:
        return self.stored.nbytes

    def numbers(self, device: torch.device) -> Tensor:
        stored = self.stored.to(device)
        weight = stored.dequantize(torch.float32)
        return weight.clone() if isinstance(stored, DenseWeight) else weight


class PatchedFp8Linear(PatchedQuantizedLinear, Fp8Linear):
    """The same of a layer that multiplies in fp8, but where patches are merged."""


class PatchedInt8Linear(Patched, Int8Linear):
    """The same of a layer that multiplies in int8, but where patches are merged."""

    def __init__(self, layer: Int8Linear) -> None:
        vars(self).update(vars(layer))  # its codes, which need not be made twice
        self.begin()

    @property
    def label(self) -> str:
        return "int8"

    @property
    def kept_bytes(self) -> int:
        return self.out_features * self.in_features + self.scale.nbytes

    def numbers(self, device: torch.device) -> Tensor:
        return self.dense_weight(torch.float32).to(device)


def low_rank(patches: list[Any], layer: Patched) -> LowRankStack | None:
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


class BlockRunner(CompiledBlocks):
    """Runs blocks compiled; eagerly where patches are merged into their weights, which is ComfyUI's code."""

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], shared: Shared) -> Any:
        merging = any(isinstance(layer, Patched) and layer.patches for layer in block.modules())
        return block(*inputs, shared) if merging else super().__call__(block, inputs, shared)


PATCHED = {
    QuantizedLinear: PatchedQuantizedLinear,
    Fp8Linear: PatchedFp8Linear,
    Int8Linear: PatchedInt8Linear,
}


def keep_stored(module: nn.Module) -> bool:
    """Put `Patched` layers in the place of those that keep their weights; whether there are any."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in PATCHED:
                setattr(parent, name, PATCHED[type(layer)](layer).train(layer.training))
    return any(isinstance(layer, Patched) for layer in module.modules())


def follow(patcher: Any) -> None:
    """Have the stored layers of a patcher's model use the patches of whichever of its clones is loaded.

    A model that is used again is detached first, and, where all of it is on the device, not loaded again:
    its patches stay with it then, as ComfyUI's own do.
    """
    from comfy.patcher_extension import CallbacksMP

    def detached(patcher: Any, unpatch_all: bool = True) -> None:
        if unpatch_all:
            _use(patcher.model, {})

    patcher.add_callback(CallbacksMP.ON_LOAD, lambda loaded, *_: _use(loaded.model, loaded.patches))
    patcher.add_callback(CallbacksMP.ON_DETACH, detached)


def _use(model: nn.Module, patches: dict[str, Any]) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, Patched):
            layer.patch(f"{name}.weight", patches.get(f"{name}.weight", []))
