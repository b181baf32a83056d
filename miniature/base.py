"""The stage `base`: the miniature's transformer, trained as a rectified flow on the data set's latents."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ..flux_core.model.spec import FluxSpec
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.train.flow import FlowRecipe, FlowWithRepaLoss, initialize, train_flow
from ..flux_core.train.loop import TrainingRun
from .data import CELLS, LatentSet
from .scene import COLORS, SHAPES

MINI = FluxSpec(hidden_size=192, num_heads=3, depth=2, depth_single=5, context_in=192, vec_in=192)


class RepaHead(nn.Module):
    """Predicts from hidden states what each image token shows: shape, color and coverage.

    REPA (Yu et al. 2024, arXiv:2410.06940) aligns a diffusion transformer's hidden states with features of an
    image encoder; here the scene itself supplies labels (data.token_labels).
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.classes = (1 + len(SHAPES), 1 + len(COLORS))
        self.read = nn.Linear(hidden, sum(self.classes) + CELLS * CELLS)  # its name in checkpoints

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of states [B, N, hidden] against token labels uint8 [B, N, 2 + CELLS * CELLS]."""
        shape, color, cover = self.read(states).float().split([*self.classes, CELLS * CELLS], dim=-1)
        return (
            F.cross_entropy(shape.flatten(0, 1), labels[..., 0].flatten().long())
            + F.cross_entropy(color.flatten(0, 1), labels[..., 1].flatten().long())
            + F.binary_cross_entropy_with_logits(cover, labels[..., 2:].float() / 255)
        )


def new_flow(spec: FluxSpec) -> FlowWithRepaLoss:
    """An untrained transformer with its training head."""
    model = FluxTransformer(spec)
    initialize(model)
    return FlowWithRepaLoss(model, RepaHead(spec.hidden_size))


def train_base(
    run: TrainingRun,
    latents: Path,
    encoders: TextEncoders,
    recipe: FlowRecipe,
    spec: FluxSpec = MINI,
) -> None:
    """Train a transformer on the file `latents` and write run.out; see train.loop for resuming and errors."""
    train_flow(run, LatentSet(latents), encoders, partial(new_flow, spec), recipe)
