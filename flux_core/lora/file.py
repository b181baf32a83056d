"""A LoRA file or state dict, in any convention, as changes of FLUX.1's modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..model.names import layer_names
from ..model.spec import FluxSpec
from ..weights import Checkpoint
from .conventions import TRANSFORMER, find_target, label_of, parse_key
from .dora import DoRA
from .entry import Entry, read_entry
from .foreign import describe_contents, foreign_model
from .metadata import CONFIG_FILE, TrainerSettings

MAX_CONFIG_BYTES = 1 << 20
_RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Tensors whose first dim is the rank that alpha is divided by."""


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA as changes of modules; `unmatched` are the keys that mean nothing in FLUX.1.

    `notices` say which settings in its metadata were used, and which cannot be.
    """

    name: str
    convention: str
    entries: tuple[Entry, ...]
    unmatched: tuple[str, ...]
    notices: tuple[str, ...] = ()

    def parts(self) -> set[str]:
        """The parts that it changes: "transformer", "clip_l", "t5xxl"."""
        return {entry.part for entry in self.entries}

    def check_finite(self, applied: Sequence[Entry]) -> None:
        """Raise ValueError where entries that are to be applied contain NaN or inf."""
        damaged = [entry.not_finite[0] for entry in applied if entry.not_finite]
        if damaged:
            raise ValueError(
                f"{self.name} has NaN or inf in {len(damaged)} of its {len(self.entries)} layers, first in "
                f"{damaged[0][:120]}: its training diverged or the file is damaged; choose another LoRA"
            )


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
        metadata, name = _peft_config(Path(source)) | file.metadata, name or file.name
    if (other := foreign_model(tensors, spec)) is not None:
        raise ValueError(f"{name} is {other}, not for FLUX.1; choose a LoRA that was made for FLUX.1")
    layers, unmatched = _by_layer(tensors)
    settings, modules = TrainerSettings(metadata or {}), frozenset(layer_names(spec))
    entries: list[Entry] = []
    for layer, keys in layers.items():
        target = find_target(layer, spec)
        entry = None
        if target is not None and (target.part != TRANSFORMER or target.module in modules):
            roles = {role: tensors[key] for role, key in keys.items()}
            roles = _with_metadata_alpha(roles, layer, target.part, settings)
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
    for part in sorted({entry.part for entry in entries}):
        has_magnitudes = any(isinstance(e.adapter, DoRA) for e in entries if e.part == part)
        settings.note_of_part(part, has_magnitudes)
    return LoraFile(name, label_of(tensors), tuple(entries), tuple(unmatched), settings.notices())


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


def _with_metadata_alpha(
    roles: dict[str, Tensor], layer: str, part: str, settings: TrainerSettings
) -> dict[str, Tensor]:
    """The roles with the alpha of the file's metadata, where no tensor gives one."""
    factor = next((roles[role] for role in _RANKED if role in roles), None)
    if "alpha" in roles or factor is None or not factor.ndim:
        return roles
    alpha = settings.alpha_of(layer, part, factor.shape[0])
    return roles if alpha is None else {**roles, "alpha": torch.tensor(alpha)}


def _peft_config(file: Path) -> dict[str, str]:
    """PEFT's settings beside the file that it writes, under the key that metadata has for them."""
    config = file.with_name(CONFIG_FILE)
    if file.name != "adapter_model.safetensors" or not config.is_file():
        return {}
    with config.open("rb") as stream:
        return {"adapter_config": stream.read(MAX_CONFIG_BYTES).decode(errors="replace")}
