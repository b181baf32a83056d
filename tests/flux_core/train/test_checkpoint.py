"""Averages, checkpoints, and files that appear complete or not at all."""

from __future__ import annotations

import random
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


def state_of(module: nn.Module) -> TrainingState:
    optimizer = torch.optim.AdamW(module.parameters(), 0.1)
    return TrainingState({"model": module}, [optimizer], random.Random(0), WeightAverage(module))


@pytest.mark.parametrize("case", ["wider", "another", "truncated"])
def test_a_wrong_or_damaged_checkpoint_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.checkpoint"
    save_checkpoint(path, 1, state_of(nn.Linear(3, 2)))
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    models = {"wider": nn.Linear(3, 3), "another": nn.Conv2d(1, 1, 1), "truncated": nn.Linear(3, 2)}
    with pytest.raises(ValueError, match=r"a\.checkpoint"):
        load_checkpoint(path, state_of(models[case]))


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
