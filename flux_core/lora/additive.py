"""Adapters whose change does not depend on the base weight: LoRA, LoHa, LoKr and full differences.

  LoRA            s B A                    arXiv:2106.09685
  LoHa            s (B1 A1) * (B2 A2)      FedPara, arXiv:2108.06098, proposition 2
  LoKr            s C (x) D                arXiv:2212.10650; LyCORIS, arXiv:2309.14859
  FullDifference  D                        `.diff`

s is alpha / rank, 1 without an alpha. Roles and their meaning are those of LyCORIS (lycoris/modules).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter, Roles, Weight, alpha_of, check_rank, matrix, need


class Additive(Adapter):
    """An adapter that changes every weight of its shape alike; attached, it is one of its own class."""

    name: ClassVar[str]
    alpha: float | None = None

    @property
    def kind(self) -> str:
        return self.name

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @abstractmethod
    def change(self) -> Tensor:
        """The change [rows, in] at strength 1, float32."""

    def delta(self, weight: Tensor) -> Tensor:
        return self.change().to(weight.dtype)


class LoRA(Additive):
    """s B A with `up` B [rows, r] and `down` A [r, in]."""

    name = "LoRA"
    roles = frozenset({"lora_down.weight", "lora_up.weight"})
    rowwise = ("up",)
    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, alpha: float | None = None) -> None:
        super().__init__(down=down, up=up)
        self.alpha = alpha

    @classmethod
    def read(cls, roles: Roles) -> LoRA:
        down, up = (matrix(need(roles, name)) for name in ("lora_down.weight", "lora_up.weight"))
        check_rank(down, up)
        return cls(down, up, alpha_of(roles))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def change(self) -> Tensor:
        return self.scale * (self.up.float() @ self.down.float())

    def attached(self, strength: float, weight: Weight) -> LoRA:
        return LoRA(self.down.float(), strength * self.scale * self.up.float())

    def forward(self, x: Tensor, wx: Tensor | None) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class LoHa(Additive):
    """s (up1 down1) * (up2 down2), elementwise, with ups [rows, r] and downs [r, in]."""

    name = "LoHa"
    roles = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})
    rowwise = ("up1", "up2")
    down1: Tensor
    up1: Tensor
    down2: Tensor
    up2: Tensor

    def __init__(
        self, down1: Tensor, up1: Tensor, down2: Tensor, up2: Tensor, alpha: float | None = None
    ) -> None:
        super().__init__(down1=down1, up1=up1, down2=down2, up2=up2)
        self.alpha = alpha

    @classmethod
    def read(cls, roles: Roles) -> LoHa:
        up1, down1, up2, down2 = (need(roles, f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if "hada_t1" in roles or "hada_t2" in roles:
            up1, up2 = tucker(up1, need(roles, "hada_t1")), tucker(up2, need(roles, "hada_t2"))
        up1, down1, up2, down2 = (matrix(tensor) for tensor in (up1, down1, up2, down2))
        check_rank(down1, up1)
        check_rank(down2, up2)
        if (up1.shape[0], down1.shape[1]) != (up2.shape[0], down2.shape[1]):
            raise ValueError("the two factors of a LoHa must have one shape")
        return cls(down1, up1, down2, up2, alpha_of(roles))

    @property
    def rank(self) -> int:
        return self.down1.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up1.shape[0], self.down1.shape[1]

    def change(self) -> Tensor:
        first = self.up1.float() @ self.down1.float()
        return self.scale * first * (self.up2.float() @ self.down2.float())

    def attached(self, strength: float, weight: Weight) -> LoHa:
        up1 = strength * self.scale * self.up1.float()
        return LoHa(self.down1.float(), up1, self.down2.float(), self.up2.float())

    def forward(self, x: Tensor, wx: Tensor | None) -> Tensor:
        """By two thin matrix multiplications where they are less work than one with the dense change.

        The change has rank r1 r2 at most, by the Khatri-Rao products of its rows and of its columns. Either
        form is computed at every call, because it is many times as large as the four factors.
        """
        down1, up1, down2, up2 = (t.to(x.dtype) for t in (self.down1, self.up1, self.down2, self.up2))
        rank, (rows, width) = down1.shape[0] * down2.shape[0], self.shape
        if rank * (rows + width) >= rows * width:
            return x @ ((up1 @ down1) * (up2 @ down2)).mT
        down = (down1[:, None] * down2[None]).flatten(0, 1)
        up = (up1[:, :, None] * up2[:, None]).flatten(1)
        return x @ down.mT @ up.mT


class LoKr(Additive):
    """s w1 (x) w2, the Kronecker product of w1 [r1, c1] and w2 [r2, c2], r1 r2 = rows, c1 c2 = in.

    Each factor is `a`, or `a b` where b is not None. The scale is 1 where both are whole.
    """

    name = "LoKr"
    roles = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})
    rowwise = ("w1_a",)
    w1_a: Tensor
    w1_b: Tensor | None
    w2_a: Tensor
    w2_b: Tensor | None

    def __init__(
        self,
        w1: tuple[Tensor, Tensor | None],
        w2: tuple[Tensor, Tensor | None],
        alpha: float | None = None,
    ) -> None:
        super().__init__(w1_a=w1[0], w1_b=w1[1], w2_a=w2[0], w2_b=w2[1])
        self.alpha = alpha

    @classmethod
    def read(cls, roles: Roles) -> LoKr:
        return cls(_factor(roles, "lokr_w1"), _factor(roles, "lokr_w2", "lokr_t2"), alpha_of(roles))

    @property
    def rank(self) -> int | None:
        b = self.w1_b if self.w2_b is None else self.w2_b
        return None if b is None else b.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        (r1, c1), (r2, c2) = (
            (a.shape[0], (a if b is None else b).shape[1])
            for a, b in ((self.w1_a, self.w1_b), (self.w2_a, self.w2_b))
        )
        return r1 * r2, c1 * c2

    def factors(self) -> tuple[Tensor, Tensor]:
        """w1 [r1, c1] and w2 [r2, c2], float32."""
        w1, w2 = self.w1_a.float(), self.w2_a.float()
        return (
            w1 if self.w1_b is None else w1 @ self.w1_b.float(),
            w2 if self.w2_b is None else w2 @ self.w2_b.float(),
        )

    def change(self) -> Tensor:
        return self.scale * torch.kron(*self.factors())

    def attached(self, strength: float, weight: Weight) -> LoKr:
        w1, w2 = self.factors()
        return LoKr((w1, None), (strength * self.scale * w2, None))

    def forward(self, x: Tensor, wx: Tensor | None) -> Tensor:
        """By reshaping, the cheaper factor first."""
        w1, w2 = self.w1_a.to(x.dtype), self.w2_a.to(x.dtype)
        (r1, c1), (r2, c2) = w1.shape, w2.shape
        grid = x.unflatten(-1, (c1, c2))
        if c1 * c2 * r2 + c1 * r1 * r2 <= c1 * c2 * r1 + c2 * r1 * r2:
            return (w1 @ (grid @ w2.mT)).flatten(-2)
        return ((w1 @ grid) @ w2.mT).flatten(-2)


class FullDifference(Additive):
    """D [rows, in], or the difference [n] of a norm's scale, which is not attached but added to it."""

    name = "full difference"
    roles = frozenset({"diff"})
    rowwise = ("difference",)
    difference: Tensor

    def __init__(self, difference: Tensor) -> None:
        super().__init__(difference=difference)

    @classmethod
    def read(cls, roles: Roles) -> FullDifference:
        difference = need(roles, "diff")
        return cls(difference if difference.ndim == 1 else matrix(difference))

    @property
    def shape(self) -> tuple[int, int]:
        return self.difference.shape[0], 1 if self.difference.ndim == 1 else self.difference.shape[1]

    def change(self) -> Tensor:
        return self.difference.float()

    def attached(self, strength: float, weight: Weight) -> FullDifference:
        return FullDifference(strength * self.difference.float())

    def forward(self, x: Tensor, wx: Tensor | None) -> Tensor:
        return F.linear(x, self.difference.to(x.dtype))


def _factor(roles: Roles, name: str, core: str = "") -> tuple[Tensor, Tensor | None]:
    """One factor of a Kronecker product."""
    if name in roles:
        return matrix(roles[name]), None
    up, down = need(roles, f"{name}_a"), matrix(need(roles, f"{name}_b"))
    up = tucker(up, roles[core]) if core in roles else matrix(up)
    check_rank(down, up)
    return up, down


def tucker(up: Tensor, core: Tensor) -> Tensor:
    """[rows, r] from LyCORIS' Tucker pair, `up` [r, rows] and `core` [r, r, 1, 1] (rebuild_tucker)."""
    core = core.float().flatten(1)
    if core.shape[0] != up.shape[0]:
        raise ValueError(f"a Tucker core of {core.shape[0]} does not fit a factor of {up.shape[0]}")
    return matrix(up).float().mT @ core
