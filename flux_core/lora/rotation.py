"""Orthogonal fine-tuning: the outputs of a layer turned, in blocks (OFT) or in butterfly stages (BOFT)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .terms import RotationTerm, Terms, rotated


@dataclass(frozen=True, eq=False)
class Rotation:
    """gain * R W instead of W: `blocks` [k, n, n] for OFT, [m, k, n, n] for BOFT, `gain` [rows] or None.

    Each block X makes Q = X - X^T and, by Cayley, (I + Q)(I - Q)^-1 (arXiv:2306.07280, section 3.2). LyCORIS
    applies OFT's transposed (diag_oft.py make_weight) and BOFT's as it is. `constraint`, above 0, bounds the
    length of Q by constraint * rows. Only W turns, not the bias. At strength s the change is s times the
    whole change. (LyCORIS leaves `gain` outside of s; ComfyUI takes s squared for OFT, and no gain.)
    """

    blocks: Tensor
    gain: Tensor | None = None
    constraint: float = 0.0
    rank = None

    @property
    def butterfly(self) -> bool:
        return self.blocks.ndim == 4

    @property
    def kind(self) -> str:
        return "BOFT" if self.butterfly else "OFT"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and 0 for any number of inputs."""
        return self.blocks.shape[-3] * self.blocks.shape[-1], 0

    def stages(self) -> Tensor:
        """The orthogonal factors [m, k, n, n], float32, ready to multiply outputs."""
        x = self.blocks.float()
        q = x - x.mT
        if self.constraint > 0:
            q = q * (self.constraint * self.shape[0] / (torch.linalg.vector_norm(q) + 1e-8)).clamp(max=1.0)
        eye = torch.eye(q.shape[-1])
        r = torch.linalg.solve(eye - q, eye + q)  # both factors are functions of Q, so they commute
        return r if self.butterfly else r.mT[None]

    def delta(self, weight: Tensor) -> Tensor:
        turned = rotated(weight.float().mT, self.stages(), self.butterfly).mT
        if self.gain is not None:
            turned = self.gain.float()[:, None] * turned
        return (turned - weight.float()).to(weight.dtype)

    def terms(self, strength: float, weight: Callable[[], Tensor]) -> Terms:
        gain = None if self.gain is None else self.gain.float()
        return Terms(rotation=(RotationTerm(self.stages(), self.butterfly, gain, strength),))
