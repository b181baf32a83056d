"""Pairs of noise and the latent that a teacher's ODE makes of it, in files, for reflow and distillation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import read_state_dict
from .checkpoint import write_safetensors
from .progress import ProgressLine

CHUNK = 256
"""Pairs in one file: what a killed run loses at most."""
CAPTION_BYTES = 256
"""Longest caption that a file holds, in UTF-8 bytes; longer ones are cut."""


class PairInputs(NamedTuple):
    """Noise [B, 16, h, w], the captions kept with the pairs, and the prompts that the teacher is given."""

    noise: Tensor
    captions: Sequence[str]
    prompts: Sequence[str]


Generate = Callable[[Sequence[str], Tensor], Tensor]
"""A teacher: from prompts and noise [B, 16, h, w] to latents [B, 16, h, w] in model space."""


def write_pairs(
    folder: Path,
    count: int,
    draw: Callable[[int, int], PairInputs],
    generate: Generate,
    *,
    batch: int = 64,
    chunk: int = CHUNK,
) -> None:
    """Write `count` pairs to files of up to `chunk` pairs in `folder`.

    `draw(k, size)` returns the inputs of file k. A file holds noise and latents [size, 16, h, w] in float16,
    and captions. Files that exist are kept: a killed run resumes.
    """
    line = ProgressLine(count)
    for k, first in enumerate(range(0, count, chunk)):
        path = folder / f"{k:05}.safetensors"
        size = min(chunk, count - first)
        if not path.exists():
            noise, captions, prompts = draw(k, size)
            latents = [
                generate(prompts[start : start + batch], noise[start : start + batch]).float().cpu()
                for start in range(0, size, batch)
            ]
            pairs = {"noise": noise.half(), "latents": torch.cat(latents).half()}
            write_safetensors(path, pairs | {"captions": _to_bytes(captions)}, {})
        line.update(first + size, "pairs made by the teacher")


def _to_bytes(captions: Sequence[str]) -> Tensor:
    """UTF-8 of the captions, uint8 [B, CAPTION_BYTES], padded with zeros."""
    rows = torch.zeros(len(captions), CAPTION_BYTES, dtype=torch.uint8)
    for row, caption in zip(rows, captions, strict=True):
        code = caption.encode()[:CAPTION_BYTES]
        row[: len(code)] = torch.tensor(list(code), dtype=torch.uint8)
    return rows


class PairSet:
    """The pairs of `write_pairs`, drawn at random. Raises ValueError for a folder without any."""

    def __init__(self, folder: Path) -> None:
        self.files = [read_state_dict(path) for path in sorted(folder.glob("*.safetensors"))]
        if not self.files:
            raise ValueError(f"{folder} holds no pairs; write some first")

    def batch(self, size: int, rng: random.Random) -> tuple[Tensor, Tensor, list[str]]:
        """(noise, latents [size, 16, h, w] float32 in model space, captions), all from one file."""
        file = rng.choice(self.files)
        picks = torch.tensor([rng.randrange(len(file["noise"])) for _ in range(size)])
        captions = [
            bytes(row).rstrip(b"\0").decode(errors="ignore") for row in file["captions"][picks].tolist()
        ]
        return file["noise"][picks].float(), file["latents"][picks].float(), captions
