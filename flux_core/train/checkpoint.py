"""What every training of this package shares: a moving average of the weights, checkpoints, a progress line.

Checkpoints are safetensors files, written beside their final name and then renamed, so that a training killed
at any moment resumes from a whole one. They hold the state of the random numbers too: a resumed training
draws what the unbroken one would have drawn.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..weights import read_metadata, read_state_dict


class Average:
    """Exponential moving average of a module's parameters, warmed up so that early steps do not linger.

    After n updates the decay is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, module: nn.Module, decay: float = 0.9995) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for value, parameter in zip(self.values.values(), module.parameters(), strict=True):
            value.lerp_(parameter, weight)


def save_checkpoint(
    path: Path,
    step: int,
    modules: dict[str, nn.Module],
    average: Average | None,
    optimizers: Iterable[torch.optim.Optimizer],
    rng: random.Random,
) -> None:
    """Write what `load_checkpoint` restores: modules, optimizers, average, the states of both generators."""
    tensors: dict[str, Tensor] = {"random/torch": torch.get_rng_state()}
    for key, module in modules.items():
        tensors |= {f"{key}/{name}": value for name, value in module.state_dict().items()}
    if average is not None:
        tensors |= {f"average/{name}": value for name, value in average.values.items()}
    for k, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer{k}/{index}/{name}": torch.as_tensor(value) for name, value in state.items()
            }
    header = {"step": step, "updates": average.updates if average else 0, "random": rng.getstate()}
    write_safetensors(path, tensors, {"training": json.dumps(header)})


def load_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    average: Average | None,
    optimizers: Iterable[torch.optim.Optimizer],
    rng: random.Random,
) -> int:
    """Restore a training from `save_checkpoint`'s file; returns the number of steps it has behind it.

    Raises ValueError when the file is damaged, or holds the training of another model.
    """
    tensors, metadata = read_state_dict(path), read_metadata(path)
    try:
        header = json.loads(metadata["training"])
        for key, module in modules.items():
            module.load_state_dict(_below(tensors, f"{key}/"))
        if average is not None:
            average.updates = header["updates"]
            for name, value in _below(tensors, "average/").items():
                average.values[name].copy_(value)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path.name} is no checkpoint of this model; move it away to begin a new training"
        ) from error
    for k, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(tensors, f"optimizer{k}/").items():
            index, field = name.split("/")
            state.setdefault(int(index), {})[field] = value.clone()  # a mapped one would hold the file
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if "random/torch" in tensors:  # else the draws begin anew
        version, numbers, gauss = header["random"]
        rng.setstate((version, tuple(numbers), gauss))
        torch.set_rng_state(tensors["random/torch"].clone())
    return header["step"]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Save tensors so that `path` is always either the old file or the whole new one. Raises OSError."""
    beside = _beside(path)
    contiguous = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    try:
        save_file(contiguous, str(beside), metadata)
    except SafetensorError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}); is the disk full?") from error
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """Save a text, UTF-8, as `write_safetensors` saves tensors. Raises OSError."""
    beside = _beside(path)
    beside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(beside, path)


def _beside(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".part")


def set_rate(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Give all optimizers one learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def refuse_nan(loss: Tensor, step: int) -> None:
    """Raise ValueError when the loss is no number, before such weights are saved over good ones."""
    if not math.isfinite(loss.item()):
        raise ValueError(
            f"the loss of step {step} is {loss.item()}: the training ran away; run the stage again with a "
            "lower learning rate, it resumes from its last checkpoint"
        )


class Smooth:
    """Numbers by name, averaged over about the last hundred updates."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def update(self, values: dict[str, float]) -> None:
        for name, new in values.items():
            self.values[name] = 0.99 * self.values.get(name, new) + 0.01 * new

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.values.items())


class ProgressLine:
    """One line on standard error that says where a training is: every second, or every ten into a file."""

    def __init__(self, total: int, start: int = 0) -> None:
        self.total, self.start = total, start
        self.began = self.shown = time.monotonic()
        self.on_terminal = sys.stderr.isatty()
        self.every = 1.0 if self.on_terminal else 10.0
        self.width = 0

    def per_second(self, step: int) -> float:
        """Steps a second since this line began."""
        return (step - self.start) / max(self.seconds(), 1e-9)

    def seconds(self) -> float:
        """Seconds since this line began."""
        return time.monotonic() - self.began

    def update(self, step: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.shown < self.every and step < self.total:
            return
        self.shown = now
        done = max(step - self.start, 1)
        left = (now - self.began) / done * (self.total - step)
        bar = "#" * (24 * step // max(self.total, 1))
        text = f"[{bar:<24}] {step}/{self.total}  {left / 60:5.1f} min left  {note}"
        end = "\r" if self.on_terminal and step < self.total else "\n"
        sys.stderr.write(f"{text:<{self.width}}{end}")  # blanks over what a longer line left
        sys.stderr.flush()
        self.width = len(text) if self.on_terminal else 0
