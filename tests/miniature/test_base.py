"""The base's training: its head on hidden states, and a training on a file of latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from rectiflux.flux_core import FluxSpec, load_transformer
from rectiflux.flux_core.model.autoencoder import AutoEncoder
from rectiflux.flux_core.train.flow import FlowRecipe
from rectiflux.flux_core.train.loop import TrainingRun
from rectiflux.miniature.base import RepaHead, train_base
from rectiflux.miniature.data import write_latents
from rectiflux.miniature.scene import COLORS, SHAPES
from rectiflux.miniature.text_encoders import WIDTH, make_encoders


def test_a_head_that_knows_has_no_loss_and_one_that_guesses_has_the_entropy() -> None:
    """Logits of 30 for what the labels say; zero weights give ln 8 + ln 8 + ln 2 (7 of each, or none)."""
    head = RepaHead(4)
    torch.nn.init.zeros_(head.read.weight)
    torch.nn.init.zeros_(head.read.bias)
    labels = torch.zeros(1, 2, 18, dtype=torch.uint8)
    labels[..., 0], labels[..., 1], labels[..., 2:] = 3, 5, 255
    guess = math.log(1 + len(SHAPES)) + math.log(1 + len(COLORS)) + math.log(2)
    assert abs(head(torch.zeros(1, 2, 4), labels).item() - guess) < 1e-5
    head.read.bias.data[[3, 8 + 5]] = 30.0
    head.read.bias.data[16:] = 30.0
    assert head(torch.zeros(1, 2, 4), labels).item() < 1e-6


def test_it_trains_on_a_file_of_latents(tmp_path: Path, new_autoencoder: Callable[[], AutoEncoder]) -> None:
    latents, out = tmp_path / "latents.safetensors", tmp_path / "base.safetensors"
    write_latents(latents, new_autoencoder(), 8, workers=1, sizes=((64, 32, 1.0),))
    spec = FluxSpec(hidden_size=64, num_heads=1, depth=1, depth_single=2, context_in=WIDTH, vec_in=WIDTH)
    recipe = FlowRecipe(batch=4, warmup=2, compiled=False)
    train_base(TrainingRun(out, 1), latents, make_encoders(), recipe, spec)
    assert load_transformer(out).spec == spec
