"""A LoRA's file or state dict, in whatever convention, as changes to FLUX.1's own modules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..model.spec import FluxSpec
from ..weights import read_metadata, read_state_dict
from .adapters import Adapter
from .foreign import seems_for, what_it_is
from .keys import parse_key
from .names import TRANSFORMER, Rows, Target, find_target
from .roles import bias_change, build_adapter, swap_halves

CONVENTIONS: tuple[tuple[str, str], ...] = (
    (r"lora_transformer[._]", "OneTrainer, diffusers' names"),
    (r".*(qkv|linear1)\.[0-3]\.", "OneTrainer, BFL's names with q, k, v apart"),
    (r"lycoris_", "LyCORIS as SimpleTuner writes it"),
    (r"lora_unet_(double|single)_blocks_", "kohya"),
    (r"lora_unet_", "kohya's format with diffusers' names"),
    (r".*\.processor\.(qkv|proj)_lora", "XLabs"),
    (r"img_in\.lora_A\.", "BFL control LoRA"),
    (r".*\b(double|single)_blocks\.", "BFL's names (ai-toolkit and others)"),
    (r".*transformer_blocks\.", "diffusers (PEFT)"),
    (r"lora_te|text_encoder|clip_l|t5", "text encoders only"),
)
"""Patterns that begin a key, and the convention; the first that any key matches is named."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What the file does to one module: its tensors by role (roles.py), and the keys that they came from."""

    part: str
    module: str
    rows: Rows | None
    roles: Mapping[str, Tensor]
    keys: tuple[str, ...]

    @cached_property
    def adapter(self) -> Adapter | None:
        return build_adapter(self.roles)

    @cached_property
    def bias(self) -> Tensor | None:
        return bias_change(self.roles)


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA as changes to modules; `unmatched` are the keys that mean nothing in this model."""

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

    The convention is told by the keys. Tensors stay as they are, mapped from the file. Raises what
    `read_state_dict` raises, and ValueError, which says what the file seems to be, for a file of another
    model and one of which nothing matches.
    """
    if isinstance(source, Mapping):
        tensors, name = source, name or "this state dict"
    else:
        tensors, metadata = read_state_dict(source, prefixes=()), read_metadata(source)
        name = name or Path(source).name
    if (other := seems_for(tensors, spec)) is not None:
        raise ValueError(f"{name} is {other}, not for FLUX.1; choose a LoRA that was made for FLUX.1")
    stems, unmatched = _by_stem(tensors)
    settings = _peft_settings(metadata or {})
    entries: list[Entry] = []
    for stem, keys in stems.items():
        target = find_target(stem, spec)
        entry = None if target is None else _entry(target, stem, keys, tensors, settings)
        if entry is None:
            unmatched += keys.values()
        else:
            entries.append(entry)
    if not _changes_anything(entries):
        first = f" (its first key is {next(iter(tensors))[:100]})" if tensors else ""
        raise ValueError(
            f"no key of {name} belongs to FLUX.1: it is {what_it_is(tensors)}{first}; "
            "choose a LoRA that was made for FLUX.1"
        )
    order = {key: i for i, key in enumerate(tensors)}
    unmatched.sort(key=order.__getitem__)
    return LoraFile(name, _convention(tensors), tuple(entries), tuple(unmatched))


def _changes_anything(entries: list[Entry]) -> bool:
    """Whether there is more than norms under a model's own names, which a whole model has too."""
    keys = (key for entry in entries for key in entry.keys if "set_weight" in entry.roles)
    plain = sum(key.endswith((".scale", ".weight")) for key in keys)
    return plain < sum(len(entry.keys) for entry in entries)


def _by_stem(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys by layer, as the file names it, and role; and the keys whose ending means nothing."""
    stems: dict[str, dict[str, str]] = {}
    strange: list[str] = []
    for key in tensors:
        parsed = parse_key(key)
        if parsed is None or parsed[1] in stems.get(parsed[0], {}):
            strange.append(key)
        else:
            stems.setdefault(parsed[0], {})[parsed[1]] = key
    return stems, strange


def _entry(
    target: Target,
    stem: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, object],
) -> Entry | None:
    """The entry, or None where the tensors make no adapter that is known."""
    roles = {role: tensors[key] for role, key in keys.items()}
    try:
        if "alpha" not in roles and "lora_down.weight" in roles:
            alpha = _peft_alpha(stem, roles["lora_down.weight"].shape[0], settings)
            if alpha is not None:
                roles["alpha"] = torch.tensor(alpha)
        if target.swapped:
            roles = swap_halves(roles)
        entry = Entry(target.part, target.module, target.rows, roles, tuple(keys.values()))
        useful = entry.adapter is not None or entry.bias is not None or {"diff", "set_weight"} & roles.keys()
    except (ValueError, IndexError, RuntimeError):
        return None
    return entry if useful and not ("set_weight" in roles and target.rows) else None


def _peft_settings(metadata: Mapping[str, str]) -> dict[str, object]:
    """PEFT's settings as diffusers stores them, by name with the part in front ("transformer.lora_alpha")."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _peft_alpha(stem: str, rank: int, settings: Mapping[str, object]) -> float | None:
    """alpha of a layer, such that alpha / rank is PEFT's scale, or None where the settings give none."""
    part = next(
        (p for p in ("transformer", "text_encoder_2", "text_encoder") if stem.startswith(f"{p}.")), ""
    )
    part = part or ("transformer" if re.match(r"(single_)?transformer_blocks\.", stem) else "")

    def get(name: str) -> object:
        return settings.get(f"{part}.{name}", settings.get(name) if part in ("", "transformer") else None)

    alpha, pattern = get("lora_alpha"), get("alpha_pattern")
    if isinstance(pattern, dict):
        for layer, own in pattern.items():
            if stem == layer or stem.endswith(f".{layer}"):
                alpha = own
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        return None
    return float(alpha) * (math.sqrt(rank) if get("use_rslora") is True else 1.0)


def _convention(tensors: Mapping[str, Tensor]) -> str:
    for pattern, name in CONVENTIONS:
        match = re.compile(pattern).match
        if any(match(key) for key in tensors):
            return name
    return "layers named without a prefix"


__all__ = ["TRANSFORMER", "Entry", "LoraFile", "read_lora"]
