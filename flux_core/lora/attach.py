"""LoRAs attached to a model without touching it: a copy of the module tree that shares every number.

In the copy the layers that a LoRA changes are AdaptedLinear, and the norms that it changes have parameters of
their own. The base model stays bit for bit as it was: to remove a LoRA is to forget the copy, and another
strength is another copy, in which only the adapters' own few numbers are made anew.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..model.text_encoders import TextEncoders
from ..model.transformer import FluxTransformer
from .blocks import parse_blocks
from .file import Entry, LoraFile
from .fit import why_not
from .linear import AdaptedLinear, Part, is_linear
from .names import CLIP, T5, TRANSFORMER, transformer_modules
from .report import FileReport, Misfit, Report

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class LoraUse:
    """A LoRA and how strongly: `strength` on the transformer, `text_strength` on the encoders.

    `blocks` are strengths for single blocks, as text (blocks.py). At strength 0 nothing is changed; what a
    file replaces (a control LoRA's norms) is replaced whole at every other strength, as in ComfyUI and
    diffusers.
    """

    file: LoraFile
    strength: float = 1.0
    text_strength: float = 1.0
    blocks: str = ""


@dataclass
class _Plan:
    """What is to be done to one module of the copy."""

    parts: list[Part] = field(default_factory=list)
    weight: Tensor | None = None
    changes: dict[str, Tensor] = field(default_factory=dict)


def with_lora(model: FluxTransformer, loras: Sequence[LoraUse]) -> tuple[FluxTransformer, Report]:
    """A copy of the transformer with the LoRAs attached, and what became of their keys.

    It shares the base's parameters, whatever form they are stored in; LoRAs of a model that has some already
    are stacked on those. A control LoRA widens `img_in`, and the copy's spec says so. Raises ValueError for a
    file that is made for the transformer and of which nothing fits, and for `blocks` that cannot be read.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    plans: dict[str, _Plan] = {}
    files = []
    for use in loras:
        blocks = parse_blocks(use.blocks, transformer_modules(model.spec))
        misfits = []
        for entry in use.file.entries:
            if entry.part == TRANSFORMER:
                strength = use.strength * blocks.of(entry.module)
                misfits += _plan(entry, entry.module, modules, strength, plans)
        files.append(FileReport(use.file, frozenset({TRANSFORMER}), tuple(misfits)).checked())
    twin = _carried_out(model, plans)
    inputs = int(cast(Any, twin.img_in).in_features)
    twin.spec = replace(model.spec, in_channels=inputs)
    return twin, Report(tuple(files))


def with_text_lora(encoders: TextEncoders, loras: Sequence[LoraUse]) -> tuple[TextEncoders, Report]:
    """A copy of the text encoders with the LoRAs attached, and what became of their keys.

    As `with_lora`, with `text_strength`. A LoRA without text encoders changes nothing here, and is no error.
    """
    models: dict[str, nn.Module] = {CLIP: encoders.clip, T5: encoders.t5}
    modules = {part: dict(model.named_modules()) for part, model in models.items()}
    plans: dict[str, dict[str, _Plan]] = {part: {} for part in models}
    files = []
    for use in loras:
        misfits = []
        for entry in use.file.entries:
            if entry.part in models:
                inside = modules[entry.part]
                nested = f"text_model.{entry.module}"  # transformers 4 wraps CLIP, 5 does not
                name = nested if nested in inside else entry.module
                misfits += _plan(entry, name, inside, use.text_strength, plans[entry.part])
        files.append(FileReport(use.file, frozenset(models), tuple(misfits)).checked())
    twin = copy.copy(encoders)
    twin.clip = cast(Any, _carried_out(models[CLIP], plans[CLIP]))
    twin.t5 = cast(Any, _carried_out(models[T5], plans[T5]))
    return twin, Report(tuple(files))


# What is to be done


def _plan(
    entry: Entry, name: str, modules: dict[str, nn.Module], strength: float, plans: dict[str, _Plan]
) -> list[Misfit]:
    """Add an entry to the plans; a list of one Misfit where it does not fit the module of that name."""
    module = modules.get(name)
    why = why_not(entry, *(_sizes(module) if module is not None else (None, None)))
    if module is None or why is not None:
        return [Misfit(entry.part, entry.keys, why or "")]
    if strength == 0.0:
        return []
    plan = plans.setdefault(name, _Plan())
    if is_linear(module):
        plan.weight = entry.roles.get("set_weight", plan.weight)
        if entry.adapter is not None or entry.bias is not None:
            plan.parts.append(Part(entry.adapter, entry.rows, entry.bias, strength))
        return []
    for role, parameter in (("diff", _main(module)), ("diff_b", "bias"), ("set_weight", _main(module))):
        if role in entry.roles:
            own = module.get_parameter(parameter)
            value = entry.roles[role].float().reshape(own.shape).to(own.device)
            old = plan.changes.get(parameter, own.float())
            plan.changes[parameter] = value if role == "set_weight" else old + strength * value
    return []


def _sizes(module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of a module's weight (a norm's one vector) and of its bias."""
    if is_linear(module):
        out, width = int(cast(Any, module).out_features), int(cast(Any, module).in_features)
        return (out, width), (out,)
    bias = getattr(module, "bias", None)
    return tuple(module.get_parameter(_main(module)).shape), None if bias is None else tuple(bias.shape)


def _main(module: nn.Module) -> str:
    """The name of a norm's one vector."""
    return "scale" if hasattr(module, "scale") else "weight"


# Doing it


def _carried_out(model: Module, plans: dict[str, _Plan]) -> Module:
    """A copy of the module tree in which the plans are carried out."""
    twin = shallow_copy(model)
    default = cast(Any, model).dtype
    for name, plan in plans.items():
        module = twin.get_submodule(name)
        parent_name, _, last = name.rpartition(".")
        for parameter, value in plan.changes.items():
            old = module.get_parameter(parameter)
            new = nn.Parameter(value.to(old.device, old.dtype), requires_grad=False)
            module.register_parameter(parameter, new)
        weight = getattr(module, "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) and _computes(weight) else default
        if plan.weight is not None:
            module = _with_weight(module, plan.weight, dtype)
        if plan.parts:
            module = AdaptedLinear(module, plan.parts, dtype)
        if is_linear(module):
            setattr(twin.get_submodule(parent_name), last, module.train(model.training))
    return twin


def _computes(tensor: Tensor) -> bool:
    """Whether torch can multiply in the tensor's dtype; 8-bit floats can only be stored."""
    return tensor.is_floating_point() and tensor.dtype.itemsize >= 2


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
