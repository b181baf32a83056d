"""Training the miniature's transformer: rectified flow.

Liu et al. 2022, arXiv:2209.03003; its noise levels after Esser et al. 2024, arXiv:2403.03206.

The network learns the velocity noise - image at points (1 - sigma) image + sigma noise, with sigma
logit-normal. The text encoders and the autoencoder are finished and frozen; pictures are encoded once, into a
file of latents.
"""

from __future__ import annotations

import math
import os
import random
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning import TextEncoders
from ..spec import Conditioning, FluxSpec
from ..transformer import FluxTransformer, pack
from ..vae import AutoEncoder, to_model_space
from ..weights import read_state_dict
from .autoencoder import to_tensor
from .checkpoint import (
    Average,
    ProgressLine,
    load_checkpoint,
    refuse_nan,
    save_checkpoint,
    set_rate,
    write_safetensors,
)
from .muon import Muon
from .pca import encode_fast, linear_code
from .scenes import ATTRIBUTES, Scene, caption, draw

MINI = FluxSpec(hidden_size=128, num_heads=2, depth=2, depth_single=5, context_in=128, vec_in=128)


@dataclass(frozen=True)
class Recipe:
    """Settings of a training."""

    batch: int = 32
    lr: float = 2e-3
    sigma_mean: float = 0.7
    sigma_std: float = 1.2
    uniform_share: float = 0.1
    empty_share: float = 0.1
    warmup: int = 200
    decay_share: float = 0.3
    average: float = 0.999


def write_latents(
    path: Path,
    vae: AutoEncoder,
    count: int,
    seed: int = 0,
    width: int = 128,
    height: int = 128,
    workers: int | None = None,
) -> None:
    """Draw `count` random scenes; write their latents (model space, float16) and attributes to `path`.

    The encoder must be write_encoder's (pca.py), whose linear code makes this as quick as the drawing,
    which `workers` processes do: as many as there are cores, unless told; with 1 it is done in this one.
    """
    code = linear_code(vae)
    latents, attributes = [], []
    line = ProgressLine(count)
    jobs = [
        (seed * 1_000_003 + start, min(64, count - start), width, height) for start in range(0, count, 64)
    ]
    workers = workers or os.cpu_count() or 1
    with ExitStack() as stack:
        spread = map if workers == 1 else stack.enter_context(ProcessPoolExecutor(workers)).map
        for scenes, pictures in spread(_draw_some, jobs):
            latents.append(to_model_space(encode_fast(to_tensor(pictures), code)).half())
            attributes += [[ATTRIBUTES[k].index(v) for k, v in asdict(scene).items()] for scene in scenes]
            line.update(len(attributes), "pictures drawn and encoded")
    write_safetensors(
        path, {"latents": torch.cat(latents), "attributes": torch.tensor(attributes)}, {"seed": str(seed)}
    )


def _draw_some(job: tuple[int, int, int, int]) -> tuple[list[Scene], np.ndarray]:
    """Scenes and their pictures [count, height, width, 3] for one (seed, count, width, height)."""
    seed, count, width, height = job
    rng = random.Random(seed)
    scenes = [Scene.random(rng) for _ in range(count)]
    return scenes, np.stack([draw(scene, rng, width, height) for scene in scenes])


class LatentSet:
    """Latents with the scenes they show, from `write_latents`' file."""

    def __init__(self, path: Path) -> None:
        tensors = read_state_dict(path)
        if "latents" not in tensors or "attributes" not in tensors:
            raise ValueError(f"{path.name} is no file of latents; run the stage 'latents' again")
        self.latents = tensors["latents"]
        self.attributes: list[list[int]] = tensors["attributes"].tolist()

    def batch(self, size: int, rng: random.Random, empty_share: float) -> tuple[Tensor, list[str]]:
        """(latents [size, 16, h, w] float32, captions), at random.

        A caption tells shape and colour and, of the rest, anything from nothing to all: people write short
        prompts. Some captions are empty, for guidance.
        """
        picks = [rng.randrange(len(self.attributes)) for _ in range(size)]
        captions = []
        for pick in picks:
            words = {
                k: values[i] for (k, values), i in zip(ATTRIBUTES.items(), self.attributes[pick], strict=True)
            }
            told = Scene(**words).told(rng, keep=rng.random())
            captions.append("" if rng.random() < empty_share else caption(told, rng))
        return self.latents[picks].float(), captions


def draw_sigmas(count: int, recipe: Recipe) -> Tensor:
    """Noise levels [count] in (0, 1): logit-normal (arXiv:2403.03206, section 3.1), and some uniform.

    The logit-normal alone hardly reaches the ends, where sampling begins and ends.
    """
    normal = torch.sigmoid(recipe.sigma_mean + recipe.sigma_std * torch.randn(count))
    return torch.where(torch.rand(count) < recipe.uniform_share, torch.rand(count), normal)


def velocity_loss(
    model: FluxTransformer, latents: Tensor, noise: Tensor, sigmas: Tensor, text: Conditioning
) -> Tensor:
    """Mean squared error of the velocity, over [B, N, 64], for latents [B, 16, h, w] in model space."""
    s = sigmas[:, None, None, None]
    tokens = pack((1 - s) * latents + s * noise)
    txt = model.project_text(text.txt)
    modulations = model.modulate(model.embed_time(sigmas, None, text.pooled))
    rope = model.rope(txt.shape[1], *latents.shape[-2:])
    return F.mse_loss(model.blocks(tokens, txt, modulations, rope), pack(noise - latents))


def initialise(model: FluxTransformer) -> None:
    """adaLN-zero: every block starts as the identity, and the first velocity is zero."""
    for name, parameter in model.named_parameters():
        if "_mod.lin" in name or ".modulation.lin" in name or name.startswith("final_layer"):
            nn.init.zeros_(parameter)


def make_optimizers(
    model: FluxTransformer, lr: float, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Muon (in `dtype`) for the blocks' matrices, AdamW for modulations, embeddings, norms and biases."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "_blocks." in name and "mod" not in name
        (matrices if inner else rest).append(parameter)
    return [
        Muon(matrices, lr, weight_decay=0.01, dtype=dtype),
        torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """Learning rate as a part of its peak: warm-up, plateau, linear descent over the last `decay_share`."""
    descent = (steps - step) / max(recipe.decay_share * steps, 1)
    return min(1.0, (step + 1) / recipe.warmup, descent)


def train_flow(
    out: Path,
    latents: Path,
    encoders: TextEncoders,
    steps: int,
    *,
    seed: int = 0,
    recipe: Recipe = Recipe(),
    spec: FluxSpec = MINI,
    save_every: int = 500,
    compiled: bool = True,
    bf16: bool = False,
) -> None:
    """Train for `steps` and write `out` (averaged weights). Resumes from `out`.checkpoint after a kill.

    The schedule's length is `steps`; giving a larger number on resuming lengthens the plateau, a smaller one
    begins the descent. `bf16` computes matrix products in bfloat16; weights and their average stay float32.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    data = LatentSet(latents)
    model = FluxTransformer(spec)
    initialise(model)
    optimizers = make_optimizers(model, recipe.lr, torch.bfloat16 if bf16 else torch.float32)
    average = Average(model, recipe.average)
    checkpoint = out.with_name(out.name + ".checkpoint")
    step = 0
    if checkpoint.exists():
        step = load_checkpoint(checkpoint, {"model": model}, average, optimizers, rng)
    loss_of = torch.compile(velocity_loss) if compiled else velocity_loss
    line, smooth = ProgressLine(steps, step), math.nan
    while step < steps:
        set_rate(optimizers, recipe.lr * rate(step, steps, recipe))
        images, captions = data.batch(recipe.batch, rng, recipe.empty_share)
        text = encoders.encode(captions)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(model, images, torch.randn_like(images), draw_sigmas(recipe.batch, recipe), text)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(model)
        step += 1
        refuse_nan(loss, step)
        smooth = loss.item() if math.isnan(smooth) else 0.99 * smooth + 0.01 * loss.item()
        if step % save_every == 0 or step == steps:
            write_safetensors(out, average.values, {"steps": str(step), "samples": str(step * recipe.batch)})
            save_checkpoint(checkpoint, step, {"model": model}, average, optimizers, rng)
        line.update(step, f"loss {smooth:.4f}")
