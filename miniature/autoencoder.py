"""The miniature's autoencoder: FLUX.1's architecture, small; its decoder is trained on rendered scenes.

The encoder is not trained: its weights are set to a principal component analysis (pca.py), in FLUX.1's
scale. The decoder is trained on latents with a little noise, so that small errors of a sampler do not show.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..flux_core.model.autoencoder import SCALE, AutoEncoder, AutoEncoderSpec
from ..flux_core.train.checkpoint import (
    TrainingState,
    WeightAverage,
    load_checkpoint,
    save_checkpoint,
    write_safetensors,
)
from ..flux_core.train.loop import TrainingRun, check_finite, descend, set_rate
from ..flux_core.train.muon import Muon
from ..flux_core.train.progress import ProgressLine
from .draw import draw
from .pca import encode_linear, linear_code, set_pca_encoder
from .scene import random_scene

MINI_VAE = AutoEncoderSpec(ch=16, ch_mult=(1, 1, 4, 8), num_res_blocks=1)
PCA_SEED = 0
"""Seed of the images whose principal components the encoder computes."""


def from_uint8(images: np.ndarray) -> Tensor:
    """Images [B, 3, H, W], float32 in -1..1, from uint8 [B, H, W, 3]."""
    return rearrange(torch.from_numpy(images).float() / 127.5 - 1, "b h w c -> b c h w")


def to_uint8(images: Tensor) -> np.ndarray:
    """Images uint8 [B, H, W, 3] from [B, 3, H, W] in -1..1."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(levels, "b c h w -> b h w c").numpy()


def psnr(images: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in -1..1."""
    return -10 * math.log10(((images.clamp(-1, 1) - target) ** 2).mean().item() / 4)


def draw_batch(count: int, rng: random.Random) -> Tensor:
    """Images [count, 3, 128, 128] in -1..1 of random scenes."""
    return from_uint8(np.stack([draw(random_scene(rng), rng) for _ in range(count)]))


def new_autoencoder(seed: int = PCA_SEED) -> AutoEncoder:
    """The miniature's autoencoder with the encoder set and the decoder untrained."""
    torch.manual_seed(seed)
    model = AutoEncoder(MINI_VAE)
    set_pca_encoder(model, draw_batch(300, random.Random(seed)))
    return model


@dataclass(frozen=True)
class DecoderRecipe:
    """Settings of the decoder's training.

    `noise` is the largest spread, in model space, of the noise added to latents; each of the `images` is
    drawn when it is first used.
    """

    batch: int = 4
    lr: float = 3e-3
    noise: float = 0.2
    images: int = 3000
    save_every: int = 100


def decoder_optimizers(decoder: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner convolutions, AdamW for the first and last one, norms and biases."""
    kernels = [p for name, p in decoder.named_parameters() if p.ndim == 4 and not name.startswith("conv_")]
    rest = [p for p in decoder.parameters() if all(p is not kernel for kernel in kernels)]
    return [Muon(kernels, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]


def train_decoder(model: AutoEncoder, run: TrainingRun, recipe: DecoderRecipe = DecoderRecipe()) -> None:
    """Train the decoder and write the autoencoder with averaged weights; resume from run.out.checkpoint.

    Raises ValueError for a loss that is not finite, and OSError when the disk is full.
    """
    rng, out, steps = run.seeded(), run.out, run.steps
    code = linear_code(model)
    held_out = draw_batch(16, rng)

    @functools.cache
    def image(index: int) -> Tensor:
        return draw_batch(1, random.Random(run.seed * 1_000_003 + index))

    decoder = model.decoder.to(memory_format=torch.channels_last)
    optimizers = decoder_optimizers(decoder, recipe.lr)
    state = TrainingState({"decoder": decoder}, optimizers, rng, WeightAverage(decoder, 0.995))

    def update() -> Tensor:
        """The mean squared error of a batch before its update."""
        images = torch.cat([image(index) for index in torch.randint(recipe.images, (recipe.batch,)).tolist()])
        latents = encode_linear(images, code)
        spread = recipe.noise / SCALE * torch.rand(recipe.batch, 1, 1, 1)
        noisy = latents + spread * torch.randn_like(latents)
        decoded = decoder(noisy.to(memory_format=torch.channels_last))
        error = F.mse_loss(decoded, images)
        descend(error + 0.1 * F.l1_loss(decoded, images), decoder, optimizers)
        return error.detach()

    checkpoint = out.with_name(out.name + ".checkpoint")
    step = load_checkpoint(checkpoint, state) if checkpoint.exists() else 0
    line, quality = ProgressLine(steps, step), math.nan
    while step < steps:
        set_rate(optimizers, recipe.lr * min(1.0, (step + 1) / 50, (steps - step) / (0.5 * steps)))
        error = update()
        state.average.update()
        step += 1
        check_finite(error, step)
        if step % recipe.save_every == 0 or step == steps:
            quality = save_autoencoder(model, state.average, held_out, out, step)
            save_checkpoint(checkpoint, step, state)
        known = "" if math.isnan(quality) else f", held-out images at {quality:.2f} dB"
        line.update(step, f"pixel error {error.item():.5f}{known}")


@torch.no_grad()
def save_autoencoder(
    model: AutoEncoder, average: WeightAverage, held_out: Tensor, out: Path, step: int
) -> float:
    """Write encoder and averaged decoder; returns the PSNR in dB of held-out images after a round trip."""
    tensors = model.state_dict() | {f"decoder.{name}": value for name, value in average.values.items()}
    averaged = AutoEncoder(model.spec)
    averaged.load_state_dict(tensors)
    quality = psnr(averaged.decode(averaged.encode(held_out)), held_out)
    write_safetensors(out, tensors, {"held_out_psnr_db": f"{quality:.2f}", "steps": str(step)})
    return quality
