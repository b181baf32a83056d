"""Training the miniature's autoencoder: FLUX.1's architecture, small, on the project's own pictures.

The encoder is written down, not trained (pca.py says how and why), already in FLUX.1's scale. The decoder
learns to draw the picture from latents with a little noise on them, so that the small errors of a sampler do
not show.
"""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..flux_core.model.autoencoder import SCALE, AutoEncoder, AutoEncoderSpec
from ..flux_core.train.checkpoint import (
    TrainingState,
    WeightAverage,
    load_checkpoint,
    save_checkpoint,
    write_safetensors,
)
from ..flux_core.train.loop import check_finite, set_rate
from ..flux_core.train.muon import Muon
from ..flux_core.train.progress import ProgressLine
from .draw import draw
from .pca import encode_fast, linear_code, write_encoder
from .scene import random_scene

MINI_VAE = AutoEncoderSpec(ch=16, ch_mult=(1, 1, 4, 8), num_res_blocks=1)
WORLD_SEED = 0
"""Seed of the pictures that the encoder's principal components are taken from."""


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Images [B, 3, H, W], float32 in -1..1, of pictures uint8 [B, H, W, 3]."""
    return rearrange(torch.from_numpy(pictures).float() / 127.5 - 1, "b h w c -> b c h w")


def to_pictures(images: Tensor) -> np.ndarray:
    """Pictures uint8 [B, H, W, 3] of images [B, 3, H, W] in -1..1."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(levels, "b c h w -> b h w c").numpy()


def psnr(images: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in -1..1."""
    return -10 * math.log10(((images.clamp(-1, 1) - target) ** 2).mean().item() / 4)


def draw_batch(count: int, rng: random.Random) -> Tensor:
    """Images [count, 3, 128, 128] in -1..1 of random scenes."""
    return to_tensor(np.stack([draw(random_scene(rng), rng) for _ in range(count)]))


def new_autoencoder(seed: int = WORLD_SEED) -> AutoEncoder:
    """The miniature's autoencoder with its encoder written and its decoder untrained."""
    torch.manual_seed(seed)
    model = AutoEncoder(MINI_VAE)
    write_encoder(model, draw_batch(300, random.Random(seed)))
    return model


def train_decoder(
    model: AutoEncoder,
    out: Path,
    steps: int,
    *,
    seed: int = 0,
    batch: int = 4,
    lr: float = 3e-3,
    noise: float = 0.2,
    pictures: int = 3000,
    save_every: int = 100,
) -> None:
    """Train the decoder for `steps` and write the whole autoencoder to `out`, with averaged weights.

    `noise` is the largest spread, in model space, of what is added to latents. Resumes from `out`.checkpoint.
    Each of the `pictures` is drawn when it is first used.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    code = linear_code(model)
    held_out = draw_batch(16, rng)

    @functools.cache
    def picture(number: int) -> Tensor:
        return draw_batch(1, random.Random(seed * 1_000_003 + number))

    decoder = model.decoder
    for parameter in decoder.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    kernels = [p for name, p in decoder.named_parameters() if p.ndim == 4 and not name.startswith("conv_")]
    rest = [p for p in decoder.parameters() if all(p is not kernel for kernel in kernels)]
    optimizers = [Muon(kernels, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]
    state = TrainingState({"decoder": decoder}, optimizers, rng, WeightAverage(decoder, 0.995))
    checkpoint = out.with_name(out.name + ".checkpoint")
    step = 0
    if checkpoint.exists():
        step = load_checkpoint(checkpoint, state)
    line, quality = ProgressLine(steps, step), math.nan
    while step < steps:
        set_rate(optimizers, lr * min(1.0, (step + 1) / 50, (steps - step) / (0.5 * steps)))
        images = torch.cat([picture(number) for number in torch.randint(pictures, (batch,)).tolist()])
        latents = encode_fast(images, code)
        spread = noise / SCALE * torch.rand(batch, 1, 1, 1)
        decoded = decoder(
            (latents + spread * torch.randn_like(latents)).to(memory_format=torch.channels_last)
        )
        error = F.mse_loss(decoded, images)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (error + 0.1 * F.l1_loss(decoded, images)).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        state.average.update()
        step += 1
        check_finite(error, step)
        if step % save_every == 0 or step == steps:
            quality = save_autoencoder(model, state.average, held_out, out, step)
            save_checkpoint(checkpoint, step, state)
        known = "" if math.isnan(quality) else f", held-out pictures at {quality:.2f} dB"
        line.update(step, f"pixel error {error.item():.5f}{known}")


@torch.no_grad()
def save_autoencoder(
    model: AutoEncoder, average: WeightAverage, held_out: Tensor, out: Path, step: int
) -> float:
    """Write encoder and averaged decoder; returns the PSNR in dB of held-out pictures, coded and decoded."""
    tensors = model.state_dict() | {f"decoder.{name}": value for name, value in average.values.items()}
    shadow = AutoEncoder(model.spec)
    shadow.load_state_dict(tensors)
    quality = psnr(shadow.decode(shadow.encode(held_out)), held_out)
    write_safetensors(out, tensors, {"held_out_psnr_db": f"{quality:.2f}", "steps": str(step)})
    return quality
