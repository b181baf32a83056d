"""LoRAs attached to a copy of a model that shares the model's parameters.

In the copy the layers that a LoRA changes are AdaptedLinear, and the norms that it changes have parameters of
their own. The base model stays bit for bit as it is: to remove a LoRA, discard the copy; another strength is
another copy, in which only the adapters' tensors are new.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..model.names import layer_names
from ..model.text_encoders import TextEncoders
from ..model.transformer import FluxTransformer
from .additive import FullDifference
from .blocks import parse_blocks
from .conventions import CLIP, T5, TRANSFORMER
from .entry import Entry, incompatibility
from .file import LoraFile
from .linear import AdaptedLinear, Part, is_linear
from .report import FileReport, Misfit, Report

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class LoraUse:
    """A LoRA and its strengths: `strength` on the transformer, `text_strength` on the text encoders.

    `blocks` are strengths of single blocks, as text (blocks.py). At strength 0 nothing is changed; what a
    file replaces (a control LoRA's norms) is replaced whole at every other strength, as in ComfyUI and
    diffusers.
    """

    file: LoraFile
    strength: float = 1.0
    text_strength: float = 1.0
    blocks: str = ""


@dataclass
class _Plan:
    """The changes of one module."""

    parts: list[Part] = field(default_factory=list)
    weight: Tensor | None = None
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """New values of a norm's parameters."""


def with_lora(model: FluxTransformer, loras: Sequence[LoraUse]) -> tuple[FluxTransformer, Report]:
    """A copy of the transformer with the LoRAs attached, and a report on their keys.

    It shares the base's parameters, quantized or not; LoRAs of a model that already has some are stacked on
    those. A control LoRA widens `img_in`, and the copy's spec says so. Raises ValueError for a file that is
    made for the transformer and of which nothing fits, and for `blocks` that cannot be parsed.
    """
    names = layer_names(model.spec)
    rules = {use: parse_blocks(use.blocks, names) for use in loras}
    (twin,), report = _attached(
        {TRANSFORMER: model}, loras, lambda use, module: use.strength * rules[use].of(module)
    )
    twin = cast(FluxTransformer, twin)
    twin.spec = replace(model.spec, in_channels=int(cast(Any, twin.img_in).in_features))
    return twin, report


def with_text_lora(encoders: TextEncoders, loras: Sequence[LoraUse]) -> tuple[TextEncoders, Report]:
    """A copy of the text encoders with the LoRAs attached, and a report on their keys.

    As `with_lora`, with `text_strength`. A LoRA without text encoders changes nothing here, and is no error.
    """
    twin = copy.copy(encoders)
    (clip, t5), report = _attached(
        {CLIP: encoders.clip, T5: encoders.t5}, loras, lambda use, _: use.text_strength
    )
    twin.clip, twin.t5 = cast(Any, clip), cast(Any, t5)
    return twin, report


def _attached(
    models: Mapping[str, nn.Module],
    loras: Sequence[LoraUse],
    strength_of: Callable[[LoraUse, str], float],
) -> tuple[list[nn.Module], Report]:
    """Copies of the models of these parts with the LoRAs attached; strengths are by LoRA and module."""
    modules = {part: dict(model.named_modules()) for part, model in models.items()}
    plans: dict[str, dict[str, _Plan]] = {part: {} for part in models}
    files = []
    for use in loras:
        misfits, applied = [], []
        for entry in use.file.entries:
            if entry.part in models:
                inside = modules[entry.part]
                nested = f"text_model.{entry.module}"  # transformers 4 wraps CLIP, 5 does not
                name = nested if nested in inside else entry.module
                why = _incompatibility(entry, inside.get(name))
                if why is not None:
                    misfits.append(Misfit(entry.part, entry.keys, why))
                elif (strength := strength_of(use, entry.module)) != 0.0:
                    applied.append(entry)
                    _plan(entry, inside[name], strength, plans[entry.part].setdefault(name, _Plan()))
        use.file.check_finite(applied)
        files.append(FileReport(use.file, frozenset(models), tuple(misfits)).checked())
    return [_changed(model, plans[part]) for part, model in models.items()], Report(tuple(files))


# Planning


def _incompatibility(entry: Entry, module: nn.Module | None) -> str | None:
    if module is None:
        return incompatibility(entry, None, None)
    if is_linear(module):
        out, width = int(cast(Any, module).out_features), int(cast(Any, module).in_features)
        return incompatibility(entry, (out, width), (out,))
    bias = getattr(module, "bias", None)
    return incompatibility(
        entry, module.get_parameter(_scale_name(module)).shape, None if bias is None else bias.shape
    )


def _plan(entry: Entry, module: nn.Module, strength: float, plan: _Plan) -> None:
    """Add an entry that fits a module to its plan."""
    if is_linear(module):
        plan.weight = plan.weight if entry.replacement is None else entry.replacement
        if entry.adapter is not None or entry.bias is not None:
            plan.parts.append(Part(entry.adapter, entry.rows, entry.bias, strength))
        return
    scale = _scale_name(module)
    difference = entry.adapter.difference if isinstance(entry.adapter, FullDifference) else None
    for name, tensor in ((scale, difference), ("bias", entry.bias), (scale, entry.replacement)):
        if tensor is not None:
            own = module.get_parameter(name)
            value = tensor.float().reshape(own.shape).to(own.device)
            if tensor is not entry.replacement:
                value = plan.vectors.get(name, own.float()) + strength * value
            plan.vectors[name] = value


def _scale_name(module: nn.Module) -> str:
    """The name of a norm's scale."""
    return "scale" if hasattr(module, "scale") else "weight"


# Copying


def _changed(model: Module, plans: Mapping[str, _Plan]) -> Module:
    """A copy of the module tree with the planned changes."""
    twin = shallow_copy(model)
    default = cast(Any, model).dtype
    for name, plan in plans.items():
        module = twin.get_submodule(name)
        parent_name, _, last = name.rpartition(".")
        for parameter, value in plan.vectors.items():
            old = module.get_parameter(parameter)
            new = nn.Parameter(value.to(old.device, old.dtype), requires_grad=False)
            module.register_parameter(parameter, new)
        weight = getattr(module, "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) and _is_compute_dtype(weight.dtype) else default
        if plan.weight is not None:
            module = _with_weight(module, plan.weight, dtype)
        if plan.parts:
            module = AdaptedLinear(module, plan.parts, dtype)
        if is_linear(module):
            setattr(twin.get_submodule(parent_name), last, module.train(model.training))
    return twin


def _is_compute_dtype(dtype: torch.dtype) -> bool:
    """Whether torch can multiply in a dtype; 8-bit floats can only be stored."""
    return dtype.is_floating_point and dtype.itemsize >= 2


def _with_weight(layer: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """A plain layer with another weight and the same bias, and with the adapters that it had."""
    if isinstance(layer, AdaptedLinear):
        return AdaptedLinear(_with_weight(layer.base, weight, dtype), layer.parts, dtype)
    device = next(tensor.device for tensor in (*layer.parameters(), *layer.buffers()))
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(cast(Tensor, layer.bias).detach().to(dtype), requires_grad=False)
    return plain


def shallow_copy(module: Module, seen: dict[int, nn.Module] | None = None) -> Module:
    """A copy of a module and of all modules in it, which shares their parameters and buffers.

    Replacing one in the copy, or moving the copy to the meta device, leaves the original as it is.
    """
    seen = {} if seen is None else seen
    if id(module) not in seen:
        twin = seen[id(module)] = copy.copy(module)
        inside = twin.__dict__
        inside["_parameters"] = dict(module._parameters)
        inside["_buffers"] = dict(module._buffers)
        inside["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        inside["_modules"] = {
            name: None if child is None else shallow_copy(child, seen)
            for name, child in module._modules.items()
        }
    return cast(Module, seen[id(module)])
