"""LoRA files of known values in every convention, and the merged weights.

A `Change` is a low-rank change of one of BFL's layers, or of a piece of it. Each writer below puts changes
into a state dict as one trainer does; `merged` adds s * (alpha / rank) * B A to a copy's weights.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rectiflux.flux_core.model.transformer import FluxTransformer
from torch import Tensor, nn


@dataclass(frozen=True)
class Change:
    """scale * up @ down on rows of the layer `module`, under the trainer's name `name`."""

    name: str
    module: str
    rows: slice
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]


def make_change(
    model: nn.Module, name: str, module: str, rows: slice = slice(None), *, rank: int = 3, seed: int = 0
) -> Change:
    """A random change, as large as the layer's own weight, with an alpha that is not the rank."""
    layer = model.get_submodule(module)
    assert isinstance(layer, nn.Linear)
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    out = len(range(*rows.indices(layer.out_features)))
    down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
    up = 0.3 * torch.randn(out, rank, generator=generator)
    return Change(name, module, rows, down, up, alpha=2.0 * rank + 1)


def merged(model: FluxTransformer, changes: Sequence[Change], strength: float = 1.0) -> FluxTransformer:
    """A deep copy of the model with the changes added to its weights."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for change in changes:
            weight = twin.get_submodule(change.module).weight
            weight[change.rows] += strength * change.scale * (change.up @ change.down)
    return twin


def kohya(changes: Sequence[Change], prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """kohya-ss/sd-scripts: all dots of the name as underscores, and an alpha."""
    tensors: dict[str, Tensor] = {}
    for change in changes:
        stem = prefix + change.name.replace(".", "_")
        tensors[f"{stem}.alpha"] = torch.tensor(change.alpha)
        tensors[f"{stem}.lora_down.weight"] = change.down
        tensors[f"{stem}.lora_up.weight"] = change.up
    return tensors


def peft(changes: Sequence[Change], prefix: str, alpha: bool = False) -> dict[str, Tensor]:
    """PEFT's names; without an alpha its scale is 1, so that it is multiplied into B."""
    tensors: dict[str, Tensor] = {}
    for change in changes:
        stem = prefix + change.name
        tensors[f"{stem}.lora_A.weight"] = change.down
        tensors[f"{stem}.lora_B.weight"] = change.up if alpha else change.scale * change.up
        if alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(change.alpha)
    return tensors


def dotted(changes: Sequence[Change], prefix: str = "") -> dict[str, Tensor]:
    """Names with dots and kohya's endings (OneTrainer's newer files)."""
    tensors: dict[str, Tensor] = {}
    for change in changes:
        tensors[f"{prefix}{change.name}.lora_down.weight"] = change.down
        tensors[f"{prefix}{change.name}.lora_up.weight"] = change.up
        tensors[f"{prefix}{change.name}.alpha"] = torch.tensor(change.alpha)
    return tensors


def xlabs(changes: Sequence[Change], prefix: str = "") -> dict[str, Tensor]:
    """XLabs' attention processors, with no alpha."""
    tensors: dict[str, Tensor] = {}
    for change in changes:
        tensors[f"{prefix}{change.name}.down.weight"] = change.down
        tensors[f"{prefix}{change.name}.up.weight"] = change.scale * change.up
    return tensors
