"""Quantized weights under ComfyUI's ModelPatcher.

ComfyUI patches weights in place, which would need the dequantized weight of every layer that a LoRA changes.
Here a layer keeps its codes: the file's, or those of fp8 and int8 that were computed when it was loaded.
ComfyUI's patches are applied beside it, or to the dequantized weight at each forward; removing a LoRA has
nothing to undo.

ComfyUI sees a `weight` in the state dict, by which LoRA loaders find the layer, and no parameter, so that it
patches nothing in place. This relies, as of ComfyUI 0.33, on ModelPatcher.patches by key, its callback
ON_LOAD after every change of them, and comfy.lora.calculate_weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..flux_core.backends.compile import CompiledBlocks
from ..flux_core.backends.cpu_int8 import Int8Linear
from ..flux_core.backends.fp8 import Fp8Linear
from ..flux_core.lora import LoRAStack
from ..flux_core.model.layers import Shared
from ..flux_core.quant.formats import DenseWeight, QuantizedWeight
from ..flux_core.quant.linear import QuantizedLinear


class WeightView(Tensor):
    """A layer's weight [out, in] as ComfyUI sees it: shape, dtype and device, dequantized by any operation.

    `nbytes` counts the quantized weight. Writing into it raises TypeError.
    """

    layer: PatchedLinear

    @staticmethod
    def __new__(cls, layer: PatchedLinear) -> WeightView:
        shape = (layer.out_features, layer.in_features)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer.device)
        self.layer = layer
        return self

    @property
    def nbytes(self) -> int:
        return self.layer.quantized.nbytes

    @property
    def data(self) -> Tensor:
        return self  # not a dequantized copy: writing into that would have no effect

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        return False  # so that code that saves a model calls `contiguous`

    def contiguous(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer.dense_weight(self.dtype)

    def __repr__(self) -> str:
        return f"WeightView({[*self.shape]}, {self.layer.quantized.label})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], cls):
            label = args[0].layer.quantized.label
            raise TypeError(
                f"weights quantized as {label} cannot be overwritten, which another node tried; patch them "
                "instead, or choose weight_dtype bf16 and a bf16 file"
            )
        args, kwargs = pytree.tree_map_only(cls, lambda w: w.contiguous(), (args, kwargs or {}))
        return func(*args, **kwargs)


class PatchedLinear(QuantizedLinear):
    """A quantized layer with ComfyUI's patches: LoRAs beside it, all others merged at each forward.

    By `comfy_cast_weights` ComfyUI recognizes a layer that may be offloaded when memory is low; its weight is
    then copied to the input's device at each forward. ComfyUI puts patches of the bias in `bias_function`,
    and those of the weight in `weight_function`, where they are skipped: `patches` has them already. Other
    functions there, as of a LoRA in training, get the dequantized weight.
    """

    comfy_cast_weights = False

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(quantized, bias, dtype)
        self.key, self.patches = "", []
        self._loaded: list[Any] = []
        self._scheduled: list[Any] = []
        self.beside: LoRAStack | None = None
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []

    @classmethod
    def of(cls, layer: Any) -> PatchedLinear:
        """A patched layer that shares the weight of another."""
        return cls(layer.quantized, layer.bias, layer.dtype).train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.device, x.dtype)
        for function in self.bias_function:
            bias = function(None if bias is None else bias.clone())  # the function may write into it
        functions = self._weight_functions() if self.weight_function else []
        if self.patches or functions:
            weight = self.merged(x)
            for function in functions:
                weight = function(weight)
            y = F.linear(x, weight.to(x.dtype), bias)
        else:
            y = self.matmul(x, bias)
        if self.beside is None:
            return y
        if (self.beside.down.device, self.beside.down.dtype) != (x.device, x.dtype):
            self.beside.to(x.device, x.dtype)  # not the layer's dtype under ModelComputeDtype
        return self.beside(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])).view(y.shape)

    @property
    def weight(self) -> Tensor:
        return WeightView(self)

    def patch(self, key: str, patches: list[Any]) -> None:
        """Use these patches of ComfyUI's instead of the previous ones, the scheduled ones among them.

        If all are plain LoRAs, their two matmuls are added to the layer's own; else the patches are merged
        into the dequantized weight at each forward.
        """
        self.key, self._loaded, self._scheduled = key, patches, []
        self._apply_patches()

    def schedule(self, patches: list[Any]) -> None:
        """Use these patches of hooks beside the loaded ones, instead of those scheduled before."""
        if patches or self._scheduled:
            self._scheduled = patches
            self._apply_patches()

    def _apply_patches(self) -> None:
        patches, self.patches = [*self._loaded, *self._scheduled], []
        self.beside = low_rank(patches, self)
        if self.beside is None:
            self.patches = [(p[0], _at(p[1], self.device), *p[2:]) for p in patches]

    def _weight_functions(self) -> list[Any]:
        """Functions of the weight that are no patches."""
        from comfy.model_patcher import LowVramPatch

        return [function for function in self.weight_function if not isinstance(function, LowVramPatch)]

    def merged(self, x: Tensor) -> Tensor:
        """The weight with its patches, which ComfyUI merges in float32, on x's device and in its dtype."""
        import comfy.lora

        quantized = self.quantized.moved_to(x.device)
        weight = quantized.dequantize(torch.float32)
        if isinstance(quantized, DenseWeight):
            weight = weight.clone()  # ComfyUI writes into it
        originals: dict[str, Any] = {}
        if any(type(patch[1]) is tuple and patch[1][0] == "model_as_lora" for patch in self.patches):
            originals["original_weights"] = {self.key: [(quantized.dequantize(torch.float32),)]}
        return comfy.lora.calculate_weight(self.patches, weight, self.key, **originals).to(x.dtype)

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """That of `nn.Linear`, with a `WeightView`."""
        destination = {} if destination is None else destination
        destination.update(self.linear_state(self.weight, prefix, keep_vars))
        return destination


class PatchedFp8Linear(PatchedLinear, Fp8Linear):
    """A `PatchedLinear` that multiplies in fp8 unless patches are merged."""


class PatchedInt8Linear(PatchedLinear, Int8Linear):
    """A `PatchedLinear` that multiplies in int8 unless patches are merged."""

    @classmethod
    def of(cls, layer: Any) -> PatchedLinear:
        patched = super().of(layer)
        patched.qkv_dim = layer.qkv_dim
        return patched


def low_rank(patches: list[Any], layer: PatchedLinear) -> LoRAStack | None:
    """The matmuls of plain LoRAs, on the layer's device; None if there are none, or other patches too."""
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
        placed.append((rows, down.flatten(1).float(), scale * up.flatten(1).float()))
    return LoRAStack(placed, layer.in_features, layer.dtype).to(layer.device) if placed else None


def _at(value: Any, device: torch.device) -> Any:
    """A patch with its tensors, which the file's loader left on the CPU, on a device."""
    import comfy.weight_adapter

    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        return type(value)(value.loaded_keys, _at(value.weights, device))
    return type(value)(_at(v, device) for v in value) if type(value) in (tuple, list) else value


class BlockRunner(CompiledBlocks):
    """Runs blocks compiled; eagerly where patches are merged into their weights, which is ComfyUI's code."""

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], shared: Shared) -> Any:
        merging = any(isinstance(layer, PatchedLinear) and layer.patches for layer in block.modules())
        return block(*inputs, shared) if merging else super().__call__(block, inputs, shared)


PATCHED: dict[type[nn.Module], type[PatchedLinear]] = {
    QuantizedLinear: PatchedLinear,
    Fp8Linear: PatchedFp8Linear,
    Int8Linear: PatchedInt8Linear,
}


def make_patchable(module: nn.Module) -> bool:
    """Replace quantized layers by patched ones; returns whether the module has any."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in PATCHED:
                setattr(parent, name, PATCHED[type(layer)].of(layer))
    return any(isinstance(layer, PatchedLinear) for layer in module.modules())


def follow_patches(patcher: Any) -> None:
    """Let the quantized layers of a patcher's model use the patches of the clone that is loaded.

    A model that is used again is detached first, and, if all of it is on the device, not loaded again: like
    ComfyUI's own, its patches stay with it then.
    """
    from comfy.patcher_extension import CallbacksMP

    def detached(patcher: Any, unpatch_all: bool = True) -> None:
        if unpatch_all:
            _use(patcher.model, {})

    patcher.add_callback(CallbacksMP.ON_LOAD, lambda loaded, *_: _use(loaded.model, loaded.patches))
    patcher.add_callback(CallbacksMP.ON_DETACH, detached)


def _use(model: nn.Module, patches: dict[str, Any]) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, PatchedLinear):
            layer.patch(f"{name}.weight", patches.get(f"{name}.weight", []))
