"""A transformer of two blocks with text encoders and data to train it on, all small."""

from __future__ import annotations

import random
import zlib

import torch
from rectiflux.flux_core import FluxSpec, FluxTransformer
from rectiflux.flux_core.model.spec import Conditioning
from rectiflux.flux_core.train.data import LatentBatch

TINY = FluxSpec(hidden_size=64, num_heads=1, depth=1, depth_single=1, context_in=24, vec_in=24)


def network(seed: int = 0, spec: FluxSpec = TINY) -> FluxTransformer:
    torch.manual_seed(seed)
    return FluxTransformer(spec)


def inputs(batch: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Noisy latents, sigmas and text."""
    torch.manual_seed(seed)
    text = Conditioning(torch.randn(batch, 5, TINY.context_in), torch.randn(batch, TINY.vec_in))
    return torch.randn(batch, 16, 4, 8), torch.rand(batch), text


class Encoders:
    """Text encoders whose embeddings are noise seeded by the text."""

    def encode(self, texts: list[str]) -> Conditioning:
        generator = torch.Generator()
        rows = [
            torch.randn(6, TINY.vec_in, generator=generator.manual_seed(zlib.crc32(text.encode())))
            for text in texts
        ]
        both = torch.stack(rows)
        return Conditioning(both[:, 1:], both[:, 0])


class Latents:
    """Four latents with captions; a batch's labels are the latents' own tokens' means."""

    def __init__(self) -> None:
        self.latents = torch.randn(4, 16, 4, 8, generator=torch.Generator().manual_seed(7))

    def batch(self, size: int, rng: random.Random, empty_share: float) -> LatentBatch:
        picks = [rng.randrange(4) for _ in range(size)]
        captions = ["" if rng.random() < empty_share else f"latent {pick}" for pick in picks]
        latents = self.latents[picks]
        return LatentBatch(latents, captions, latents.unflatten(2, (2, 2)).mean((1, 3)).reshape(size, 8, 2))
