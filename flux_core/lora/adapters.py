"""The kinds of adapters: what each adds to a linear layer's weight W [rows, in], and its cheapest arithmetic.

  LowRank     s B A                          LoRA, arXiv:2106.09685
  Hadamard    s (B1 A1) * (B2 A2)            LoHa, FedPara, arXiv:2108.06098, proposition 2
  Kronecker   s C (x) D                      LoKr, arXiv:2212.10650; LyCORIS, arXiv:2309.14859
  Dense       D                              a whole difference (`.diff`)
  Decomposed  g * (W + delta) - W            DoRA, arXiv:2402.09353, equation 5
  Rotation    R^T W - W                      OFT, arXiv:2306.07280, and BOFT, arXiv:2311.06243

s is alpha / rank. How they are stored is LyCORIS' (lycoris/modules). Several adapters of one layer add up:
each is a change of the base's weight, whatever else is attached, so that their order does not matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .rotation import Rotation
from .terms import HadamardTerm, KroneckerTerm, Terms

Weight = Callable[[], Tensor]
"""Gives the base's rows [rows, in], float32, when an adapter needs them."""


class Adapter(Protocol):
    """A change of a weight. `kind` is its usual name, `rank` None where it has none."""

    @property
    def kind(self) -> str: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    def delta(self, weight: Tensor) -> Tensor:
        """What is added at strength 1 to `weight` [rows, in], in its dtype."""
        ...

    def terms(self, strength: float, weight: Weight) -> Terms:
        """How to add it to a layer's output without a merged weight."""
        ...


class Additive(ABC):
    """An adapter whose change does not depend on the base's weight."""

    @abstractmethod
    def change(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The change [rows, in] at strength 1, computed in `dtype`."""

    def delta(self, weight: Tensor) -> Tensor:
        return self.change(torch.float32).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class LowRank(Additive):
    """s B A with `up` B [rows, r] and `down` A [r, in]."""

    down: Tensor
    up: Tensor
    scale: float = 1.0
    kind = "LoRA"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def change(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.scale * (self.up.to(dtype) @ self.down.to(dtype))

    def terms(self, strength: float, weight: Weight) -> Terms:
        return Terms(low_rank=((self.down.float(), strength * self.scale * self.up.float()),))


@dataclass(frozen=True, eq=False)
class Hadamard(Additive):
    """s (up1 down1) * (up2 down2), elementwise, with ups [rows, r] and downs [r, in]."""

    down1: Tensor
    up1: Tensor
    down2: Tensor
    up2: Tensor
    scale: float = 1.0
    kind = "LoHa"

    @property
    def rank(self) -> int:
        return self.down1.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up1.shape[0], self.down1.shape[1]

    def change(self, dtype: torch.dtype = torch.float32) -> Tensor:
        first = self.up1.to(dtype) @ self.down1.to(dtype)
        return self.scale * first * (self.up2.to(dtype) @ self.down2.to(dtype))

    def terms(self, strength: float, weight: Weight) -> Terms:
        up1 = strength * self.scale * self.up1.float()
        return Terms(hadamard=(HadamardTerm(self.down1.float(), up1, self.down2.float(), self.up2.float()),))


@dataclass(frozen=True, eq=False)
class Kronecker(Additive):
    """s first (x) second, with `first` [r1, c1], `second` [r2, c2], r1 r2 = rows, c1 c2 = in."""

    first: Tensor
    second: Tensor
    scale: float = 1.0
    rank: int | None = None
    kind = "LoKr"

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = self.first.shape, self.second.shape
        return a * c, b * d

    def change(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.scale * torch.kron(self.first.to(dtype), self.second.to(dtype))

    def terms(self, strength: float, weight: Weight) -> Terms:
        term = KroneckerTerm(self.first.float(), strength * self.scale * self.second.float())
        return Terms(kronecker=(term,))


@dataclass(frozen=True, eq=False)
class Dense(Additive):
    """A whole difference [rows, in]."""

    difference: Tensor
    kind = "full difference"
    rank = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.difference.shape[0], self.difference.shape[1]

    def change(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.difference.to(dtype)

    def terms(self, strength: float, weight: Weight) -> Terms:
        return Terms(dense=(strength * self.difference.float(),))


Inner = LowRank | Hadamard | Kronecker | Dense


@dataclass(frozen=True, eq=False)
class Decomposed:
    """DoRA: the merged weight's rows or columns get the lengths `magnitude`, [rows, 1] or [1, in].

    The lengths that are replaced are the merged weight's, as in the paper, LyCORIS and PEFT. (ComfyUI takes
    the base's for [rows, 1].) A strength between 0 and 1 goes straight from W to the result, as in ComfyUI.
    """

    inner: Inner
    magnitude: Tensor

    @property
    def kind(self) -> str:
        return f"DoRA of {self.inner.kind}"

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def gain(self, weight: Tensor) -> Tensor:
        """magnitude / length [rows, 1] or [1, in], float32."""
        merged = weight.float() + self.inner.change()
        axis = 1 if self.magnitude.shape[1] == 1 and self.magnitude.shape[0] == merged.shape[0] else 0
        length = torch.linalg.vector_norm(merged, dim=axis, keepdim=True)
        return self.magnitude.float() / (length + torch.finfo(torch.float32).eps)

    def delta(self, weight: Tensor) -> Tensor:
        merged = weight.float() + self.inner.change()
        return (self.gain(weight) * merged - weight.float()).to(weight.dtype)

    def terms(self, strength: float, weight: Weight) -> Terms:
        """The inner terms with the gain multiplied in, and a gain of s (g - 1) on the base's own product."""
        gain = self.gain(weight())
        flat = gain.flatten()
        inner = self.inner.terms(strength, weight)
        if gain.shape[0] == self.shape[0] and gain.shape[1] == 1:
            return replace(inner.scaled_outputs(flat), output_gain=strength * (flat - 1))
        return replace(inner.scaled_inputs(flat), input_gain=strength * (flat - 1))


__all__ = ["Adapter", "Decomposed", "Dense", "Hadamard", "Kronecker", "LowRank", "Rotation"]
