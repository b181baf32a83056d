"""The loop around every training of a transformer: learning rate, average, checkpoints, a preview, progress.

A stage (flow.py, guidance.py, reflow.py, schnell.py) brings a function that does one update; the loop does
the rest, alike for all. It may be killed at any moment and goes on from its last checkpoint as if it had not
been.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..model.spec import Conditioning
from ..model.transformer import FluxTransformer
from ..weights import read_metadata
from .checkpoint import (
    Average,
    ProgressLine,
    Smooth,
    load_checkpoint,
    refuse_nan,
    save_checkpoint,
    set_rate,
    write_safetensors,
)
from .muon import Muon

Function = TypeVar("Function", bound=Callable[..., Any])

Losses = dict[str, Tensor]
"""What an update reports: its losses by name, the first of them the one that must stay finite."""


@dataclass(frozen=True)
class Recipe:
    """Settings that every training of a transformer has."""

    batch: int = 32
    lr: float = 2e-3
    warmup: int = 200
    decay_share: float = 0.3
    average: float = 0.999
    save_every: int = 500
    compiled: bool = True
    bf16: bool = False


def device() -> torch.device:
    """A CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware() -> str:
    """What trains: the CUDA device's name, or how many threads of a CPU."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def autocast(recipe: Recipe) -> torch.autocast:
    """The context in which losses are computed: bfloat16 matrix products where the recipe asks for them."""
    return torch.autocast(device().type, torch.bfloat16, enabled=recipe.bf16)


def compiled(function: Function, recipe: Recipe) -> Function:
    """The module or function, compiled where the recipe asks for it: once for every size of picture."""
    # compile's type is a plain callable; what it returns is called as the function is
    return torch.compile(function, dynamic=False) if recipe.compiled else function  # type: ignore[return-value]


def make_optimizers(
    model: nn.Module, lr: float, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Muon (in `dtype`) for the blocks' matrices, AdamW for modulations, embeddings, norms and biases."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        modulation = "_mod." in name or ".modulation." in name
        inner = parameter.ndim == 2 and "_blocks." in name and not modulation
        (matrices if inner else rest).append(parameter)
    return [
        Muon(matrices, lr, weight_decay=0.01, dtype=dtype),
        torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def descend(loss: Tensor, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """One update of a module by its optimizers, with the gradient's norm cut at 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def repeat_text(text: Conditioning, times: int) -> Conditioning:
    """The conditioning with its batch repeated."""
    return Conditioning(text.txt.repeat(times, 1, 1), text.pooled.repeat(times, 1), text.guidance)


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """Learning rate as a part of its peak: warm-up, plateau, linear descent over the last `decay_share`."""
    descent = (steps - step) / max(recipe.decay_share * steps, 1)
    return min(1.0, (step + 1) / recipe.warmup, descent)


def train(
    out: Path,
    steps: int,
    model: FluxTransformer,
    trained: dict[str, nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    rng: random.Random,
    recipe: Recipe,
    update: Callable[[], Losses],
    picture: Callable[[dict[str, Tensor]], np.ndarray] | None = None,
) -> None:
    """Update `steps` times and write `out`, the averaged weights of `model`; resume from `out`.checkpoint.

    `trained` names every module whose state is to be kept; `model` is one of them or a part of one. The
    schedule's length is `steps`: a larger number on resuming lengthens the plateau, a smaller one begins the
    descent. `picture` shows what averaged weights paint: at each save it is written beside `out`. Raises
    ValueError when a loss is no number, and OSError when the disk is full; the last checkpoint stays. The
    metadata of `out` hold the steps, the samples, the seconds of all runs up to here, and the hardware.
    """
    average = Average(model, recipe.average)
    checkpoint = out.with_name(out.name + ".checkpoint")
    step, spent = 0, 0.0
    if checkpoint.exists():
        step = load_checkpoint(checkpoint, trained, average, optimizers, rng)
        spent = float(read_metadata(out).get("seconds", 0)) if out.exists() else 0.0
    line, smooth = ProgressLine(steps, step), Smooth()
    while step < steps:
        set_rate(optimizers, recipe.lr * rate(step, steps, recipe))
        losses = update()
        average.update(model)
        step += 1
        refuse_nan(next(iter(losses.values())), step)
        smooth.update({name: loss.item() for name, loss in losses.items()})
        if step % recipe.save_every == 0 or step == steps:
            header = {
                "steps": str(step),
                "samples": str(step * recipe.batch),
                "seconds": f"{spent + line.seconds():.0f}",
                "hardware": hardware(),
            }
            write_safetensors(out, average.values, header)
            save_checkpoint(checkpoint, step, trained, average, optimizers, rng)
            if picture is not None:
                Image.fromarray(picture(average.values)).save(out.with_suffix(".png"))
        line.update(step, f"{smooth}, {line.per_second(step) * recipe.batch:.0f} samples/s")
