"""The loop around every training of a transformer: learning rate, average, checkpoints, preview, progress.

A training brings a function that does one update; the loop does the rest. It may be killed at any moment and
resumes from its last checkpoint with the same result.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..model.spec import Conditioning
from ..weights import read_metadata
from .checkpoint import TrainingState, load_checkpoint, save_checkpoint, write_safetensors
from .muon import Muon
from .progress import ProgressLine, Smooth

Function = TypeVar("Function", bound=Callable[..., Any])

Losses = dict[str, Tensor]
"""Losses of an update by name; the first must stay finite."""
Preview = Callable[[dict[str, Tensor]], np.ndarray]
"""From averaged weights to an image uint8 [H, W, 3] that shows what they generate."""


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


@dataclass(frozen=True)
class TrainingRun:
    """Where a training writes its model, how many steps it takes, its seed, and an optional preview.

    `out`.checkpoint is the checkpoint, from which a run of the same `out` resumes.
    """

    out: Path
    steps: int
    seed: int = 0
    preview: Preview | None = None

    def seeded(self) -> random.Random:
        """Seed torch's generator; returns Python's, seeded alike."""
        torch.manual_seed(self.seed)
        return random.Random(self.seed)


def device() -> torch.device:
    """A CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware() -> str:
    """The CUDA device's name, or the number of CPU threads."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def autocast(recipe: Recipe) -> torch.autocast:
    """The context in which losses are computed: bfloat16 matrix multiplications if the recipe says so."""
    return torch.autocast(device().type, torch.bfloat16, enabled=recipe.bf16)


def compiled(function: Function, recipe: Recipe) -> Function:
    """The module or function, compiled if the recipe says so: once for every image size."""
    # torch.compile is typed as returning a plain callable; it is called as `function` is
    return torch.compile(function, dynamic=False) if recipe.compiled else function  # type: ignore[return-value]


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for modulations, embeddings, norms and biases."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        modulation = "_mod." in name or ".modulation." in name
        inner = parameter.ndim == 2 and "_blocks." in name and not modulation
        (matrices if inner else rest).append(parameter)
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    return [
        Muon(matrices, recipe.lr, weight_decay=0.01, dtype=dtype),
        torch.optim.AdamW(rest, recipe.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def descend(loss: Tensor, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """One update of a module by its optimizers, with the gradient's norm clipped to 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def repeat_text(text: Conditioning, times: int) -> Conditioning:
    """The conditioning with its batch repeated."""
    pooled = None if text.pooled is None else text.pooled.repeat(times, 1)
    return replace(text, txt=text.txt.repeat(times, 1, 1), pooled=pooled)


def concat_text(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditionings as one batch, with the guidance of the first."""
    pooled = None
    if first.pooled is not None and second.pooled is not None:
        pooled = torch.cat([first.pooled, second.pooled])
    return replace(first, txt=torch.cat([first.txt, second.txt]), pooled=pooled)


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """Learning rate as a fraction of its peak: warm-up, plateau, linear decay over the last `decay_share`."""
    decay = (steps - step) / max(recipe.decay_share * steps, 1)
    return min(1.0, (step + 1) / recipe.warmup, decay)


def set_rate(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Give all optimizers one learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def check_finite(loss: Tensor, step: int) -> None:
    """Raise ValueError for a loss of NaN or inf, before such weights are saved over good ones."""
    if not math.isfinite(loss.item()):
        raise ValueError(
            f"the loss of step {step} is {loss.item()}: the training diverged; run it again with a "
            "lower learning rate, it resumes from its last checkpoint"
        )


def train(run: TrainingRun, recipe: Recipe, state: TrainingState, update: Callable[[], Losses]) -> None:
    """Call `update` run.steps times and write run.out, the averaged weights; resume from run.out.checkpoint.

    The learning rate's schedule has run.steps: resuming with more of them lengthens the plateau, with fewer
    begins the decay. At each save the preview is written beside run.out. Raises ValueError for a loss that
    is not finite and OSError when the disk is full; the last checkpoint stays. The metadata of run.out hold
    steps, samples, seconds of all runs up to here, and hardware.
    """
    out, steps = run.out, run.steps
    checkpoint = out.with_name(out.name + ".checkpoint")
    step, spent = 0, 0.0
    if checkpoint.exists():
        step = load_checkpoint(checkpoint, state)
        spent = float(read_metadata(out).get("seconds", 0)) if out.exists() else 0.0
    line, smooth = ProgressLine(steps, step), Smooth()
    while step < steps:
        set_rate(state.optimizers, recipe.lr * rate(step, steps, recipe))
        losses = update()
        state.average.update()
        step += 1
        check_finite(next(iter(losses.values())), step)
        smooth.update({name: loss.item() for name, loss in losses.items()})
        if step % recipe.save_every == 0 or step == steps:
            header = {
                "steps": str(step),
                "samples": str(step * recipe.batch),
                "seconds": f"{spent + line.seconds():.0f}",
                "hardware": hardware(),
            }
            write_safetensors(out, state.average.values, header)
            save_checkpoint(checkpoint, step, state)
            if run.preview is not None:
                Image.fromarray(run.preview(state.average.values)).save(out.with_suffix(".png"))
        line.update(step, f"{smooth}, {line.per_second(step) * recipe.batch:.0f} samples/s")
