"""The interface between a training and its data."""

from __future__ import annotations

import random
from typing import NamedTuple, Protocol

from torch import Tensor


class LatentBatch(NamedTuple):
    """Latents [B, 16, h, w] float32 in model space, a caption of each, and labels of their image tokens.

    `labels` [B, N, ...] are the targets of a head on the hidden states (flow.FlowWithRepaLoss).
    """

    latents: Tensor
    captions: list[str]
    labels: Tensor


class CaptionedLatents(Protocol):
    """A data set of encoded images with captions."""

    def batch(self, size: int, rng: random.Random, empty_share: float) -> LatentBatch:
        """A random batch, all of one size, in which about `empty_share` of the captions are empty."""
        ...
