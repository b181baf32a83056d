"""Averages, checkpoints and what a training says."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core.train import checkpoint
from rectiflux.flux_core.train.checkpoint import (
    Average,
    ProgressLine,
    load_checkpoint,
    refuse_nan,
    save_checkpoint,
    write_safetensors,
    write_text,
)
from safetensors import SafetensorError
from torch import nn


def test_the_average_follows_its_formula() -> None:
    """Decay (1 + n) / (10 + n) for the n-th update until it reaches the one asked for."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = Average(module, decay=0.5)
    expected = 0.0
    for n in range(1, 30):
        module.weight.data.fill_(float(n))
        average.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert average.values["weight"].item() == pytest.approx(expected, rel=1e-6)


def trained(steps: int) -> tuple[nn.Module, Average, torch.optim.Optimizer, random.Random]:
    torch.manual_seed(0)
    module, rng = nn.Linear(3, 2), random.Random(0)
    average, optimizer = Average(module, 0.9), torch.optim.AdamW(module.parameters(), 0.1)
    train(module, average, optimizer, rng, steps)
    return module, average, optimizer, rng


def train(
    module: nn.Module, average: Average, optimizer: torch.optim.Optimizer, rng: random.Random, steps: int
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (module(torch.randn(4, 3)) * rng.random()).square().sum().backward()
        optimizer.step()
        average.update(module)


def test_a_resumed_training_is_the_unbroken_one(tmp_path: Path) -> None:
    """Weights, average, optimizer and both random generators, bit for bit."""
    unbroken, whole_average, _, _ = trained(9)
    module, average, optimizer, rng = trained(5)
    path = tmp_path / "a.checkpoint"
    save_checkpoint(path, 5, {"model": module}, average, [optimizer], rng)
    module, average, optimizer, rng = trained(0)
    assert load_checkpoint(path, {"model": module}, average, [optimizer], rng) == 5
    train(module, average, optimizer, rng, 4)
    for found, expected in zip(module.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert all(torch.equal(average.values[name], whole_average.values[name]) for name in average.values)
    assert average.updates == 9


@pytest.mark.parametrize("other", [nn.Linear(3, 3), nn.Conv2d(1, 1, 1)], ids=["wider", "another"])
def test_another_models_checkpoint_is_refused(tmp_path: Path, other: nn.Module) -> None:
    module, average, optimizer, rng = trained(1)
    path = tmp_path / "a.checkpoint"
    save_checkpoint(path, 1, {"model": module}, average, [optimizer], rng)
    with pytest.raises(ValueError, match="a.checkpoint is no checkpoint of this model; move it away"):
        load_checkpoint(path, {"model": other}, None, [], rng)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    module, average, optimizer, rng = trained(1)
    path = tmp_path / "a.checkpoint"
    save_checkpoint(path, 1, {"model": module}, average, [optimizer], rng)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.checkpoint"):
        load_checkpoint(path, {"model": module}, average, [optimizer], rng)


def test_files_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half-way leaves the old file, under its name."""
    path = tmp_path / "new" / "a.safetensors"
    write_safetensors(path, {"x": torch.ones(2)}, {})
    old = path.read_bytes()

    def fails(tensors: object, beside: str, metadata: object) -> None:
        Path(beside).write_bytes(b"half of it")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match="No space left on device.*is the disk full"):
        write_safetensors(path, {"x": torch.zeros(2)}, {})
    assert path.read_bytes() == old
    write_text(tmp_path / "a.json", "grün\n")
    assert (tmp_path / "a.json").read_bytes() == "grün\n".encode()
    assert not list(tmp_path.rglob("*.part"))


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    refuse_nan(torch.tensor(1.0), 3)
    with pytest.raises(ValueError, match="the loss of step 3 is nan: the training ran away"):
        refuse_nan(torch.tensor(float("nan")), 3)


def test_the_progress_line_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    line = ProgressLine(10, start=5)
    line.update(6, "not yet")
    line.update(10, "loss 0.1")
    assert stream.getvalue().splitlines() == ["[########################] 10/10    0.0 min left  loss 0.1"]
