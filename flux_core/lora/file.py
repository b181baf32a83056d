"""A LoRA file or state dict, in any convention, as changes of FLUX.1's modules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..model.names import layer_names
from ..model.spec import FluxSpec
from ..weights import Checkpoint
from .conventions import TRANSFORMER, find_target, label_of, parse_key
from .entry import Entry, read_entry
from .foreign import describe_contents, foreign_model


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA as changes of modules; `unmatched` are the keys that mean nothing in FLUX.1."""

    name: str
    convention: str
    entries: tuple[Entry, ...]
    unmatched: tuple[str, ...]

    def parts(self) -> set[str]:
        """The parts that it changes: "transformer", "clip_l", "t5xxl"."""
        return {entry.part for entry in self.entries}


def read_lora(
    source: str | Path | Mapping[str, Tensor],
    spec: FluxSpec,
    metadata: Mapping[str, str] | None = None,
    name: str | None = None,
) -> LoraFile:
    """The LoRA in a safetensors file or a state dict, for a transformer of these sizes and its encoders.

    The convention is detected from the keys. Tensors stay mapped from the file. Raises what `Checkpoint.open`
    raises, and ValueError for a file of another model, and for one with no key of FLUX.1.
    """
    if isinstance(source, Mapping):
        tensors, name = source, name or "this state dict"
    else:
        file = Checkpoint.open(source).part()
        tensors = {key: tensor for key, tensor in file.tensors.items() if isinstance(tensor, Tensor)}
        metadata, name = file.metadata, name or file.name
    if (other := foreign_model(tensors, spec)) is not None:
        raise ValueError(f"{name} is {other}, not for FLUX.1; choose a LoRA that was made for FLUX.1")
    layers, unmatched = _by_layer(tensors)
    settings, modules = _peft_settings(metadata or {}), frozenset(layer_names(spec))
    entries: list[Entry] = []
    for layer, keys in layers.items():
        roles = _with_peft_alpha({role: tensors[key] for role, key in keys.items()}, layer, settings)
        target = find_target(layer, spec)
        entry = None
        if target is not None and (target.part != TRANSFORMER or target.module in modules):
            entry = read_entry(target, roles, [*keys.values()])
        if entry is None:
            unmatched += keys.values()
        else:
            entries.append(entry)
    if not _is_more_than_norms(entries):
        first = f" (its first key is {next(iter(tensors))[:100]})" if tensors else ""
        raise ValueError(
            f"no key of {name} belongs to FLUX.1: it is {describe_contents(tensors)}{first}; "
            "choose a LoRA that was made for FLUX.1"
        )
    order = {key: i for i, key in enumerate(tensors)}
    unmatched.sort(key=order.__getitem__)
    return LoraFile(name, label_of(tensors), tuple(entries), tuple(unmatched))


def _is_more_than_norms(entries: list[Entry]) -> bool:
    """Whether anything is changed but norms under a model's own names, which a whole model has too."""
    return any(
        entry.replacement is None or not all(key.endswith((".scale", ".weight")) for key in entry.keys)
        for entry in entries
    )


def _by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys by the layer's name in the file and by role; and the keys with unknown or repeated endings."""
    layers: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for key in tensors:
        parsed = parse_key(key)
        if parsed is None or parsed[1] in layers.get(parsed[0], {}):
            unknown.append(key)
        else:
            layers.setdefault(parsed[0], {})[parsed[1]] = key
    return layers, unknown


# PEFT's settings, in a file's metadata


def _peft_settings(metadata: Mapping[str, str]) -> dict[str, object]:
    """PEFT's settings as diffusers stores them, by name after the part's ("transformer.lora_alpha")."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _with_peft_alpha(
    roles: dict[str, Tensor], layer: str, settings: Mapping[str, object]
) -> dict[str, Tensor]:
    """The roles with the alpha of PEFT's settings, where no tensor gives one."""
    down = roles.get("lora_down.weight")
    if settings and "alpha" not in roles and down is not None and down.ndim:
        alpha = _peft_alpha(layer, down.shape[0], settings)
        if alpha is not None:
            return {**roles, "alpha": torch.tensor(alpha)}
    return roles


def _peft_alpha(layer: str, rank: int, settings: Mapping[str, object]) -> float | None:
    """alpha of a layer, such that alpha / rank is PEFT's scale, or None where the settings give none."""
    part = next(
        (p for p in ("transformer", "text_encoder_2", "text_encoder") if layer.startswith(f"{p}.")), ""
    )
    part = part or ("transformer" if re.match(r"(single_)?transformer_blocks\.", layer) else "")

    def get(name: str) -> object:
        return settings.get(f"{part}.{name}", settings.get(name) if part in ("", "transformer") else None)

    alpha, pattern = get("lora_alpha"), get("alpha_pattern")
    if isinstance(pattern, dict):
        for name, own in pattern.items():
            if layer == name or layer.endswith(f".{name}"):
                alpha = own
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        return None
    return float(alpha) * (math.sqrt(rank) if get("use_rslora") is True else 1.0)
