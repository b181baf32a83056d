"""A file's tensors for each kind of adapter, and the weight that they should make of W.

The formulas are the published ones, written here once more, with LyCORIS' scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rectiflux.benchmarks.reference.models import SPEC
from torch import Tensor

LAYER = "single_blocks.1.linear2"
ROWS, WIDTH = SPEC.hidden_size, SPEC.hidden_size + SPEC.mlp_size
"""A layer that is not square: [64, 320]."""


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """Tensors by role, and the merged weight at strength 1."""

    tensors: dict[str, Tensor]
    merge: Callable[[Tensor], Tensor]


def lora() -> Case:
    """Hu et al., arXiv:2106.09685, section 4.1: W + (alpha / r) B A."""
    b, a = draw(1, ROWS, 4), draw(2, 4, WIDTH, scale=0.1)
    tensors = {"lora_up.weight": b, "lora_down.weight": a, "alpha": torch.tensor(6.0)}
    return Case(tensors, lambda w: w + 6.0 / 4 * b @ a)


def lora_as_convolution() -> Case:
    """The same as 1x1 convolutions."""
    case = lora()
    tensors = {k: t if k == "alpha" else t[:, :, None, None] for k, t in case.tensors.items()}
    return Case(tensors, case.merge)


def loha(rank: int = 2) -> Case:
    """FedPara, arXiv:2108.06098: (A1 B1) * (A2 B2), times alpha / rank (LyCORIS loha.py)."""
    a1, b1, a2, b2 = (
        draw(i, *shape, scale=0.5)
        for i, shape in enumerate(((ROWS, rank), (rank, WIDTH), (ROWS, rank), (rank, WIDTH)))
    )
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
    return Case(tensors, lambda w: w + (a1 @ b1) * (a2 @ b2) / rank)


def loha_tucker() -> Case:
    """LyCORIS loha.py with use_tucker: each factor is sum_ij t[i, j] a[i, row] b[j, column]."""
    a1, a2 = draw(1, 3, ROWS, scale=0.5), draw(2, 3, ROWS, scale=0.5)
    b1, b2 = draw(3, 3, WIDTH, scale=0.5), draw(4, 3, WIDTH, scale=0.5)
    t1, t2 = draw(5, 3, 3), draw(6, 3, 3)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    tensors |= {"hada_t1": t1[..., None, None], "hada_t2": t2[..., None, None], "alpha": torch.tensor(6.0)}

    def merge(w: Tensor) -> Tensor:
        first = torch.einsum("ij,ir,jc->rc", t1, a1, b1)
        return w + 2.0 * first * torch.einsum("ij,ir,jc->rc", t2, a2, b2)

    return Case(tensors, merge)


def kron(c: Tensor, d: Tensor) -> Tensor:
    """The Kronecker product, by its definition: block (i, j) is c[i, j] d."""
    return torch.cat([torch.cat([value * d for value in row], dim=1) for row in c], dim=0)


def lokr_whole() -> Case:
    """LyCORIS lokr.py: with both factors whole the scale is 1, whatever alpha says."""
    c, d = draw(1, 4, 5), draw(2, ROWS // 4, WIDTH // 5, scale=0.1)
    return Case({"lokr_w1": c, "lokr_w2": d, "alpha": torch.tensor(1e10)}, lambda w: w + kron(c, d))


def lokr_wide() -> Case:
    """A first factor that is the larger one."""
    c, d = draw(1, ROWS // 2, WIDTH // 4, scale=0.1), draw(2, 2, 4)
    return Case({"lokr_w1": c, "lokr_w2": d, "alpha": torch.tensor(3.0)}, lambda w: w + kron(c, d))


def lokr_factored() -> Case:
    """The second factor as a product of rank 2: the scale is alpha / 2."""
    c, a, b = draw(1, 4, 5), draw(2, ROWS // 4, 2), draw(3, 2, WIDTH // 5, scale=0.1)
    tensors = {"lokr_w1": c, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(5.0)}
    return Case(tensors, lambda w: w + 2.5 * kron(c, a @ b))


def lokr_both_factored() -> Case:
    c1, c2, a, b = draw(1, 4, 2), draw(4, 2, 5), draw(2, ROWS // 4, 2), draw(3, 2, WIDTH // 5, scale=0.1)
    tensors = {"lokr_w1_a": c1, "lokr_w1_b": c2, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    return Case(tensors, lambda w: w + 0.5 * kron(c1 @ c2, a @ b))


def lokr_tucker() -> Case:
    """LyCORIS lokr.py with use_tucker: the second factor is sum_ij t[i, j] a[i, row] b[j, column]."""
    c, a, b, t = draw(1, 4, 5), draw(2, 3, ROWS // 4), draw(3, 3, WIDTH // 5, scale=0.1), draw(4, 3, 3)
    tensors = {"lokr_w1": c, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t[..., None, None]}
    tensors["alpha"] = torch.tensor(6.0)
    return Case(tensors, lambda w: w + 2.0 * kron(c, torch.einsum("ij,ir,jc->rc", t, a, b)))


def dora(inner: Callable[[], Case], axis: int, flat: bool = False) -> Case:
    """Liu et al., arXiv:2402.09353, equation 5: m (W + delta) / |W + delta|, lengths of rows or of columns.

    LyCORIS stores m as [1, in] or, with wd_on_out, as [out, 1]; PEFT as a vector [out].
    """
    case = inner()
    m = 0.5 + draw(9, *((ROWS, 1) if axis else (1, WIDTH))).abs()
    tensors = case.tensors | {"dora_scale": m.flatten() if flat else m}

    def merge(w: Tensor) -> Tensor:
        v = case.merge(w)
        return m * v / (v**2).sum(dim=axis, keepdim=True).sqrt()

    return Case(tensors, merge)


def cayley(x: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 of Q = X - X^T."""
    q, eye = x - x.T, torch.eye(len(x))
    return (eye + q) @ torch.linalg.inv(eye - q)


def oft(rescale: bool = False, constraint: float = 0.0) -> Case:
    """Qiu et al., arXiv:2306.07280: blocks rotate the outputs. LyCORIS diag_oft.py multiplies by R^T.

    With a constraint (stored as alpha) the length of Q is bounded by constraint * out.
    """
    blocks, gain = draw(1, 8, ROWS // 8, ROWS // 8, scale=0.1), 1 + draw(2, ROWS, 1, scale=0.1)
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(constraint)}
    if rescale:
        tensors["rescale"] = gain
    q = blocks - blocks.mT
    factor = min(1.0, constraint * ROWS / float((q**2).sum().sqrt())) if constraint else 1.0

    def merge(w: Tensor) -> Tensor:
        r = torch.block_diag(*(cayley(factor * block) for block in blocks))
        return (gain if rescale else 1.0) * (r.T @ w)

    return Case(tensors, merge)


def boft() -> Case:
    """Liu et al., arXiv:2311.06243: stage i joins outputs that lie 2^i b/2 apart (LyCORIS boft.py).

    Here every stage is a whole matrix P^T diag(R) P, with the permutation P written out.
    """
    stages, b = 3, 4
    blocks = draw(1, stages, ROWS // b, b, b, scale=0.1)

    def merge(w: Tensor) -> Tensor:
        for i in range(stages):
            k = 2**i * b // 2
            starts = range(0, ROWS, 2 * k)
            order = [start + half * k + j for start in starts for j in range(k) for half in (0, 1)]
            p = torch.eye(ROWS)[order]
            w = p.T @ torch.block_diag(*(cayley(block) for block in blocks[i])) @ p @ w
        return w

    return Case({"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, merge)


def full() -> Case:
    """`.diff`: the whole difference."""
    d = draw(1, ROWS, WIDTH, scale=0.1)
    return Case({"diff": d}, lambda w: w + d)


CASES: dict[str, Callable[[], Case]] = {
    "LoRA": lora,
    "LoRA as 1x1 convolution": lora_as_convolution,
    "LoHa": loha,
    "LoHa of a rank that is not thin": lambda: loha(8),
    "LoHa, Tucker": loha_tucker,
    "LoKr": lokr_whole,
    "LoKr, first factor larger": lokr_wide,
    "LoKr, second factor of low rank": lokr_factored,
    "LoKr, both of low rank": lokr_both_factored,
    "LoKr, Tucker": lokr_tucker,
    "DoRA by rows": lambda: dora(lora, 1),
    "DoRA by rows, PEFT": lambda: dora(lora, 1, flat=True),
    "DoRA by columns": lambda: dora(lora, 0),
    "DoRA of LoHa by rows": lambda: dora(loha, 1),
    "DoRA of LoKr by rows": lambda: dora(lokr_factored, 1),
    "DoRA of LoKr by columns": lambda: dora(lokr_factored, 0),
    "DoRA of a full difference by columns": lambda: dora(full, 0),
    "OFT": oft,
    "OFT with rescale": lambda: oft(rescale=True),
    "OFT with a constraint that binds": lambda: oft(constraint=0.002),
    "OFT with a constraint that does not": lambda: oft(constraint=10.0),
    "BOFT": boft,
    "full difference": full,
}
