"""Checkpoints of a training, and the moving average of its weights.

Checkpoints are safetensors files, written under a temporary name and then renamed, so that a training killed
at any moment resumes from a complete one. They hold the states of the random generators too: a resumed
training draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..weights import read_metadata, read_state_dict


class WeightAverage:
    """Exponential moving average of a module's parameters, warmed up so that early steps do not linger.

    After n updates the decay is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, module: nn.Module, decay: float = 0.9995) -> None:
        self.module, self.decay = module, decay
        self.updates = 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's parameters as they are now."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for value, parameter in zip(self.values.values(), self.module.parameters(), strict=True):
            value.lerp_(parameter, weight)


@dataclass(frozen=True)
class TrainingState:
    """What a training changes and a checkpoint holds, besides the state of torch's own generator.

    `modules` has every trained module under its name in the checkpoint; `average` is that of the model which
    the training writes.
    """

    modules: dict[str, nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    rng: random.Random
    average: WeightAverage


def save_checkpoint(path: Path, step: int, state: TrainingState) -> None:
    """Write what `load_checkpoint` restores. Raises OSError."""
    tensors: dict[str, Tensor] = {"random/torch": torch.get_rng_state()}
    for key, module in state.modules.items():
        tensors |= {f"{key}/{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"average/{name}": value for name, value in state.average.values.items()}
    for k, optimizer in enumerate(state.optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer{k}/{index}/{name}": torch.as_tensor(value) for name, value in values.items()
            }
    header = {"step": step, "updates": state.average.updates, "random": state.rng.getstate()}
    write_safetensors(path, tensors, {"training": json.dumps(header)})


def load_checkpoint(path: Path, state: TrainingState) -> int:
    """Restore a training from `save_checkpoint`'s file; returns the number of steps done.

    Raises ValueError when the file is damaged or belongs to another model.
    """
    tensors, metadata = read_state_dict(path), read_metadata(path)
    try:
        header = json.loads(metadata["training"])
        for key, module in state.modules.items():
            module.load_state_dict(_below(tensors, f"{key}/"))
        state.average.updates = header["updates"]
        for name, value in _below(tensors, "average/").items():
            state.average.values[name].copy_(value)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path.name} is no checkpoint of this model; move it away to begin a new training"
        ) from error
    for k, optimizer in enumerate(state.optimizers):
        values: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(tensors, f"optimizer{k}/").items():
            index, field = name.split("/")
            values.setdefault(int(index), {})[field] = value.clone()  # a mapped one would hold the file
        optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
    if "random/torch" in tensors:  # checkpoints of older versions lack it
        version, internal, gauss = header["random"]
        state.rng.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(tensors["random/torch"].clone())
    return header["step"]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Save tensors; `path` is always either the old file or the complete new one. Raises OSError."""
    temporary = _temporary(path)
    contiguous = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    try:
        save_file(contiguous, str(temporary), metadata)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}); is the disk full?") from error
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Save a text, UTF-8, as `write_safetensors` saves tensors. Raises OSError."""
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def _temporary(path: Path) -> Path:
    """Where a file is written before it gets its name; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".part")
