"""The stage `reflow`: a flow trained on pairs that its guided teacher's own ODE makes, and so straightened.

Liu et al. 2022, arXiv:2209.03003, section 2.2; emphasis on both ends of the path and a loss between square
and absolute after Lee et al. 2024, arXiv:2405.20320. The student has no guidance embedder: the teacher's
guidance is in its pictures, and it begins as mini-dev at that guidance, which is near already.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...miniature.data import SHAPES_OF_PICTURES
from ...miniature.evaluate import Sampling, draw_latents
from ...miniature.scene import Scene
from ...miniature.text_encoders import random_caption
from ..model.layers import sinusoidal_embedding
from ..model.spec import Conditioning
from ..model.text_encoders import TextEncoders
from ..model.transformer import FluxTransformer
from ..pipeline import draw_noise
from ..weights import read_state_dict
from .checkpoint import ProgressLine, write_safetensors
from .flow import predict
from .loop import Losses, Recipe, autocast, compiled, descend, device, make_optimizers, train

CHUNK = 256
"""Pairs in one file: what a killed run loses at most."""
TEACHER = Sampling(16, cfg_scale=3.5)
"""How the teacher, the undistilled network, paints the pairs."""


@dataclass(frozen=True)
class ReflowRecipe(Recipe):
    """Settings of the reflow: `huber` is the root mean square error where square turns to absolute."""

    lr: float = 1e-3
    huber: float = 0.1


def fold_guidance(teacher: FluxTransformer, guidance: float) -> FluxTransformer:
    """The teacher at one guidance scale, as a network without a guidance embedder, [schnell]'s wiring.

    Exact: the embedding of a fixed scale is a constant, which joins the bias of the pooled vector's embedder.
    """
    student = FluxTransformer(replace(teacher.spec, guidance_embed=False))
    student.load_state_dict(teacher.state_dict(), strict=False)
    if teacher.guidance_in is not None:
        with torch.no_grad():
            embedding = sinusoidal_embedding(torch.tensor([guidance], device=teacher.device))
            student.vector_in.out_layer.bias += teacher.guidance_in(embedding.to(teacher.dtype))[0].cpu()
    return student


def write_pairs(
    folder: Path,
    teacher: FluxTransformer,
    encoders: TextEncoders,
    count: int,
    seed: int = 0,
    sampling: Sampling = TEACHER,
    batch: int = 64,
    bf16: bool = False,
    ask: Callable[[random.Random], tuple[Scene, str]] = random_caption,
    tell: Callable[[Scene, Tensor], str] | None = None,
) -> None:
    """Write `count` pairs, noise and the picture that the teacher makes of it, to files of CHUNK in `folder`.

    Each file holds noise and latents [CHUNK, 16, h, w] in model space, float16, of one size of pictures, and
    the captions, which `ask` draws. Where `tell` is given, the teacher is told what it makes of the scene and
    its noise [16, h, w] instead. Files that exist are kept: a killed run goes on where it was. With `bf16`
    the teacher multiplies in bfloat16, which moves its pictures by 1.4 % of their spread.
    """
    empty = encoders.encode([""])
    line = ProgressLine(count)
    for number in range((count + CHUNK - 1) // CHUNK):
        path = folder / f"{number:05}.safetensors"
        if not path.exists():
            rng = random.Random(seed * 1_000_003 + number)
            width, height, _ = rng.choices(SHAPES_OF_PICTURES, [share for *_, share in SHAPES_OF_PICTURES])[0]
            scenes, captions = zip(*(ask(rng) for _ in range(CHUNK)), strict=True)
            noise = draw_noise(seed * 1_000_003 + number, CHUNK, height // 8, width // 8)
            asked = list(captions if tell is None else map(tell, scenes, noise))
            latents = []
            for start in range(0, CHUNK, batch):
                text = encoders.encode(asked[start : start + batch])
                with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
                    drawn = draw_latents(teacher, text, empty, sampling, noise[start : start + batch])
                latents.append(drawn.float().cpu())
            texts = torch.zeros(CHUNK, 256, dtype=torch.uint8)
            for row, text in zip(texts, captions, strict=True):
                code = text.encode()[:256]
                row[: len(code)] = torch.tensor(list(code), dtype=torch.uint8)
            pairs = {"noise": noise.half(), "latents": torch.cat(latents).half(), "captions": texts}
            write_safetensors(path, pairs, {})
        line.update(min((number + 1) * CHUNK, count), "pairs made by the teacher")


class PairSet:
    """The pairs of `write_pairs`, drawn at random. Raises ValueError for a folder without any."""

    def __init__(self, folder: Path) -> None:
        self.files = [read_state_dict(path) for path in sorted(folder.glob("*.safetensors"))]
        if not self.files:
            raise ValueError(f"{folder} holds no pairs; run the stage pairs first")

    def batch(self, size: int, rng: random.Random) -> tuple[Tensor, Tensor, list[str]]:
        """(noise, latents [size, 16, h, w] float32 in model space, captions), all of one file."""
        file = rng.choice(self.files)
        picks = torch.tensor([rng.randrange(len(file["noise"])) for _ in range(size)])
        captions = [
            bytes(row).rstrip(b"\0").decode(errors="ignore") for row in file["captions"][picks].tolist()
        ]
        return file["noise"][picks].float(), file["latents"][picks].float(), captions


def end_heavy_sigmas(count: int) -> Tensor:
    """Noise levels [count] in (0, 1) with a density that rises to both ends, most to noise.

    A tenth at 1 exactly, where a picture in one step begins; else sigma = sin^2(pi u / 2), the arcsine law.
    """
    sigmas = torch.sin(torch.rand(count) * torch.pi / 2) ** 2
    return torch.where(torch.rand(count) < 0.1, torch.ones(()), sigmas.clamp(1e-3, 1.0))


def pseudo_huber(error: Tensor, turn: float) -> Tensor:
    """Mean over the batch of sqrt(mean(error^2) + turn^2) - turn, for errors [B, ...] (arXiv:2310.14189)."""
    return ((error.float() ** 2).flatten(1).mean(dim=1) + turn**2).sqrt().sub(turn).mean()


class ReflowLesson(nn.Module):
    """The student, and the loss of a batch of pairs."""

    def __init__(self, student: FluxTransformer, turn: float) -> None:
        super().__init__()
        self.student, self.turn = student, turn

    def forward(self, latents: Tensor, noise: Tensor, sigmas: Tensor, text: Conditioning) -> Tensor:
        s = sigmas[:, None, None, None]
        velocity = predict(self.student, (1 - s) * latents + s * noise, sigmas, text)
        return pseudo_huber(velocity - (noise - latents), self.turn)


def train_reflow(
    out: Path,
    pairs: Path,
    encoders: TextEncoders,
    student: FluxTransformer,
    steps: int,
    *,
    seed: int = 0,
    recipe: ReflowRecipe = ReflowRecipe(),
    picture: Callable[[dict[str, Tensor]], np.ndarray] | None = None,
) -> None:
    """Train for `steps` and write `out` (averaged weights); see loop.train for resuming and errors."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    data = PairSet(pairs)
    lesson = ReflowLesson(student, recipe.huber).to(device())
    optimizers = make_optimizers(student, recipe.lr, torch.bfloat16 if recipe.bf16 else torch.float32)
    loss_of = compiled(lesson, recipe)

    def update() -> Losses:
        noise, latents, captions = data.batch(recipe.batch, rng)
        with autocast(recipe):
            inputs = (x.to(device()) for x in (latents, noise, end_heavy_sigmas(recipe.batch)))
            loss = loss_of(*inputs, encoders.encode(captions))
        descend(loss, student, optimizers)
        return {"loss": loss.detach()}

    train(out, steps, student, {"student": student}, optimizers, rng, recipe, update, picture)
