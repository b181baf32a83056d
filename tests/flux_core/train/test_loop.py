"""The training loop: learning rate, optimizers, resuming after a kill, stopping at a loss of NaN."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rectiflux.flux_core import FluxTransformer, load_transformer, read_state_dict
from rectiflux.flux_core.train import loop
from rectiflux.flux_core.train.checkpoint import TrainingState, WeightAverage
from rectiflux.flux_core.weights import read_metadata

from .tiny import TINY


def test_every_parameter_is_trained_by_one_optimizer() -> None:
    """Also under another module, whose name may hold anything."""
    holder = torch.nn.Module()
    holder.model = model = FluxTransformer(TINY)
    muon, adam = loop.make_optimizers(holder, loop.Recipe())
    groups = [{id(p) for group in o.param_groups for p in group["params"]} for o in (muon, adam)]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in model.parameters()}
    single, double = model.single_blocks[0], model.double_blocks[0]
    assert {id(single.linear1.weight), id(double.img_attn.qkv.weight)} <= groups[0]
    others = (model.img_in.weight, single.modulation.lin.weight, double.txt_mod.lin.weight)
    assert {id(p) for p in others} <= groups[1]


def test_the_rate_warms_up_stays_and_descends() -> None:
    recipe = loop.Recipe(warmup=10, decay_share=0.25)
    rates = [loop.rate(step, 100, recipe) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9:76] == [1.0] * 67
    assert rates[76:101] == pytest.approx([(100 - step) / 25 for step in range(76, 101)])


class Task:
    """A training that pulls all weights to a drawn target; `fail_at` gives that update's loss as NaN."""

    def __init__(self, fail_at: int = 0) -> None:
        torch.manual_seed(0)
        self.model = FluxTransformer(TINY)
        self.rng = random.Random(0)
        self.recipe = loop.Recipe(batch=4, warmup=2, save_every=3, compiled=False)
        self.optimizers = loop.make_optimizers(self.model, self.recipe)
        self.updates, self.fail_at = 0, fail_at

    def update(self) -> loop.Losses:
        self.updates += 1
        goal = self.rng.random() + torch.rand(())
        loss = torch.stack([((p - goal) ** 2).mean() for p in self.model.parameters()]).sum()
        loop.descend(loss, self.model, self.optimizers)
        return {"loss": loss.detach() * (float("nan") if self.updates == self.fail_at else 1.0)}

    def run(self, out: Path, steps: int, preview: loop.Preview | None = None) -> dict[str, torch.Tensor]:
        average = WeightAverage(self.model, self.recipe.average)
        state = TrainingState({"model": self.model}, self.optimizers, self.rng, average)
        loop.train(loop.TrainingRun(out, steps, preview=preview), self.recipe, state, self.update)
        return {name: value.clone() for name, value in read_state_dict(out).items()}


def test_a_killed_training_resumes_as_if_unbroken(tmp_path: Path) -> None:
    """It dies in step 5 of 8, after the checkpoint of step 3; the weights are the same, bit for bit."""
    unbroken = Task().run(tmp_path / "a.safetensors", 8)
    broken = Task(fail_at=5)
    with pytest.raises(ValueError, match="step 5 is nan"):
        broken.run(tmp_path / "b.safetensors", 8)
    again = Task()
    resumed = again.run(tmp_path / "b.safetensors", 8)
    assert again.updates == 5  # steps 4 to 8
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


def test_a_loss_of_nan_keeps_the_last_good_weights(tmp_path: Path) -> None:
    good = Task().run(tmp_path / "a.safetensors", 3)
    with pytest.raises(ValueError, match="step 5 is nan"):
        Task(fail_at=2).run(tmp_path / "a.safetensors", 8)
    kept = read_state_dict(tmp_path / "a.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in good.items())


def test_it_writes_a_model_and_its_preview(tmp_path: Path) -> None:
    shown: list[set[str]] = []

    def preview(weights: dict[str, torch.Tensor]) -> np.ndarray:
        shown.append(set(weights))
        return np.full((8, 8, 3), 7, dtype=np.uint8)

    task = Task()
    task.run(tmp_path / "a.safetensors", 4, preview=preview)
    assert load_transformer(tmp_path / "a.safetensors", dtype=torch.float32).spec == TINY
    assert shown == [{name for name, _ in task.model.named_parameters()}] * 2  # after steps 3 and 4
    with Image.open(tmp_path / "a.png") as image:
        assert image.getpixel((0, 0)) == (7, 7, 7)


def test_metadata_say_how_the_file_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds add up over the runs of a training; each clock here starts anew and counts readings."""
    out, made = tmp_path / "a.safetensors", []
    for steps in (3, 6):
        ticks = itertools.count()
        monkeypatch.setattr(time, "monotonic", lambda ticks=ticks: float(next(ticks)))
        Task().run(out, steps)
        made.append(read_metadata(out))
    assert [(m["steps"], m["samples"]) for m in made] == [("3", "12"), ("6", "24")]
    first, both = (int(m["seconds"]) for m in made)
    assert 0 < first < both == 2 * first
    assert made[0]["hardware"] == f"CPU, {torch.get_num_threads()} threads"
