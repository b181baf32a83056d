"""Muon: momentum whose matrices are orthogonalized before they are applied (Jordan et al. 2024).

Newton-Schulz iteration and its quintic coefficients: Keller Jordan's description of Muon; the step's size is
matched to AdamW's as in Liu et al. 2025, arXiv:2502.16982, section 2.2. The iteration may run in bfloat16,
where the processor supports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The matrices [..., rows, columns] with all singular values close to 1 (0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices and convolution kernels; give everything else to AdamW."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; matrices of equal shape are orthogonalized together. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append((parameter, parameter.grad))
            for pairs in by_shape.values():
                updates = torch.stack([self._momentum(p, g, group["momentum"]).flatten(1) for p, g in pairs])
                orthogonal = orthogonalize(updates.to(self.dtype)).to(updates.dtype)
                size = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5
                for (parameter, _), update in zip(pairs, orthogonal.unbind(), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                        update.view(parameter.shape), alpha=size
                    )
        return loss

    def _momentum(self, parameter: nn.Parameter, gradient: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, state["momentum"], momentum)
