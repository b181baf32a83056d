"""The decoder's training: conversions, PSNR, resuming, and that it learns."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rectiflux.flux_core import load_autoencoder, read_state_dict
from rectiflux.flux_core.model.autoencoder import AutoEncoder
from rectiflux.flux_core.train.loop import TrainingRun
from rectiflux.flux_core.weights import read_metadata
from rectiflux.miniature import autoencoder
from rectiflux.miniature.autoencoder import draw_batch, from_uint8, psnr, to_uint8


def test_uint8_survives_a_round_trip() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 8, 32, 1).repeat(3, axis=3)
    images = from_uint8(levels)
    assert images.shape == (1, 3, 8, 32) and images.min() == -1 and images.max() == 1
    assert np.array_equal(to_uint8(images), levels)
    assert to_uint8(torch.tensor([[[[-9.0]], [[0.0]], [[9.0]]]])).tolist() == [[[[0, 128, 255]]]]


def test_psnr_is_its_formula() -> None:
    """An error of 0.02 in a range of 2 is 10 log10(2^2 / 0.02^2) = 40 dB."""
    target = torch.zeros(1, 3, 4, 4)
    assert psnr(target + 0.02, target) == pytest.approx(40.0, abs=1e-3)


def train(model: AutoEncoder, out: Path, steps: int, save_every: int = 2) -> dict[str, torch.Tensor]:
    recipe = autoencoder.DecoderRecipe(batch=1, images=6, save_every=save_every)
    autoencoder.train_decoder(model, TrainingRun(out, steps), recipe)
    return {name: value.clone() for name, value in read_state_dict(out).items()}


@pytest.mark.slow
def test_a_killed_training_resumes_as_if_unbroken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_autoencoder: Callable[[], AutoEncoder]
) -> None:
    """It is killed in step 3 of 4, after the checkpoint of step 2."""
    unbroken = train(new_autoencoder(), tmp_path / "a.safetensors", 4)
    check = autoencoder.check_finite

    def killed(loss: torch.Tensor, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        check(loss, step)

    with monkeypatch.context() as patched:
        patched.setattr(autoencoder, "check_finite", killed)
        with pytest.raises(KeyboardInterrupt):
            train(new_autoencoder(), tmp_path / "b.safetensors", 4)
    resumed = train(new_autoencoder(), tmp_path / "b.safetensors", 4)
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


@pytest.mark.slow
def test_it_learns(tmp_path: Path, new_autoencoder: Callable[[], AutoEncoder]) -> None:
    """Held-out images gain 3 dB within 25 steps, and the encoder does not change."""
    first = train(new_autoencoder(), tmp_path / "a.safetensors", 2)
    before = float(read_metadata(tmp_path / "a.safetensors")["held_out_psnr_db"])
    last = train(new_autoencoder(), tmp_path / "b.safetensors", 25, save_every=25)
    after = float(read_metadata(tmp_path / "b.safetensors")["held_out_psnr_db"])
    assert after > before + 3
    kept = [name for name in first if name.startswith("encoder.")]
    assert kept and all(torch.equal(first[name], last[name]) for name in kept)
    images = draw_batch(2, random.Random(1))
    with torch.no_grad():
        model = load_autoencoder(tmp_path / "b.safetensors", dtype=torch.float32)
        assert psnr(model.decode(model.encode(images)), images) > before
