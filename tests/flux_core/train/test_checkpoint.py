"""Averages, checkpoints, and files that appear complete or not at all."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core.train import checkpoint
from rectiflux.flux_core.train.checkpoint import (
    TrainingState,
    WeightAverage,
    load_checkpoint,
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
    average = WeightAverage(module, decay=0.5)
    expected = 0.0
    for n in range(1, 30):
        module.weight.data.fill_(float(n))
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert average.values["weight"].item() == pytest.approx(expected, rel=1e-6)


def trained(steps: int) -> TrainingState:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), 0.1)
    state = TrainingState({"model": module}, [optimizer], random.Random(0), WeightAverage(module, 0.9))
    train(state, steps)
    return state


def train(state: TrainingState, steps: int) -> None:
    (optimizer,) = state.optimizers
    for _ in range(steps):
        optimizer.zero_grad()
        (state.modules["model"](torch.randn(4, 3)) * state.rng.random()).square().sum().backward()
        optimizer.step()
        state.average.update()


def test_a_resumed_training_is_the_unbroken_one(tmp_path: Path) -> None:
    """Weights, average, optimizer and both random generators, bit for bit."""
    unbroken, path = trained(9), tmp_path / "a.checkpoint"
    save_checkpoint(path, 5, trained(5))
    resumed = trained(0)
    assert load_checkpoint(path, resumed) == 5
    train(resumed, 4)
    for found, expected in zip(
        resumed.modules["model"].parameters(), unbroken.modules["model"].parameters(), strict=True
    ):
        assert torch.equal(found, expected)
    values = resumed.average.values
    assert all(torch.equal(values[name], value) for name, value in unbroken.average.values.items())
    assert resumed.average.updates == 9


@pytest.mark.parametrize("other", [nn.Linear(3, 3), nn.Conv2d(1, 1, 1)], ids=["wider", "another"])
def test_another_models_checkpoint_is_refused(tmp_path: Path, other: nn.Module) -> None:
    path = tmp_path / "a.checkpoint"
    save_checkpoint(path, 1, trained(1))
    with pytest.raises(ValueError, match=r"a\.checkpoint"):
        load_checkpoint(path, replace(trained(0), modules={"model": other}))


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.checkpoint"
    save_checkpoint(path, 1, trained(1))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.checkpoint"):
        load_checkpoint(path, trained(0))


def test_files_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half-way leaves the old file, under its name."""
    path = tmp_path / "new" / "a.safetensors"
    write_safetensors(path, {"x": torch.ones(2)}, {})
    old = path.read_bytes()

    def fails(tensors: object, beside: str, metadata: object) -> None:
        Path(beside).write_bytes(b"half of it")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match="No space left on device"):
        write_safetensors(path, {"x": torch.zeros(2)}, {})
    assert path.read_bytes() == old
    write_text(tmp_path / "a.json", "grün\n")
    assert (tmp_path / "a.json").read_bytes() == "grün\n".encode()
    assert not list(tmp_path.rglob("*.part"))
