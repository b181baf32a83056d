"""What all kinds of adapters have in common, and the checks of the tensors that they are read from."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

Roles = Mapping[str, Tensor]
"""The tensors of one layer by role (conventions.py)."""

Weight = Callable[[], Tensor]
"""Returns the base weight [rows, in], float32, for the adapters that need it."""


class OutputChange(nn.Module, ABC):
    """A term that is added to the output W x of a linear layer.

    Tensors are buffers that are not saved: they follow the layer to its device and dtype.
    """

    reads_output = False
    """Whether `forward` uses W x."""

    def __init__(self, **tensors: Tensor | None) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @abstractmethod
    def forward(self, x: Tensor, wx: Tensor | None) -> Tensor:
        """The term [n, rows] for inputs x [n, in] and, where it is used, W x [n, rows] without the bias."""


class Adapter(OutputChange):
    """A change of a linear layer's weight W [rows, in], with the tensors of its file.

    A layer computes with what `attached` returns, never with the adapter itself.
    """

    rowwise: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors whose first dim is that of the rows, or of equal groups of them."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Its usual name."""

    @property
    def rank(self) -> int | None:
        return None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and inputs; 0 inputs where any number fits."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """What is added at strength 1 to `weight` [rows, in], in its dtype."""

    @abstractmethod
    def attached(self, strength: float, weight: Weight) -> OutputChange:
        """The term of a layer's output, float32, with the strength multiplied in."""

    def swapped(self) -> Adapter:
        """The same change of a layer that has the two halves of its rows in the other order.

        Raises ValueError where the adapter mixes the halves.
        """
        twin = copy.copy(self)
        twin._buffers = {
            name: swap_halves(tensor) if tensor is not None and name in self.rowwise else tensor
            for name, tensor in self._buffers.items()
        }
        return twin

    def forward(self, x: Tensor, wx: Tensor | None) -> Tensor:
        raise NotImplementedError(f"{self.kind} has to be attached to a layer first")


# Reading and checking tensors


def need(roles: Roles, name: str) -> Tensor:
    """The tensor of a role. Raises ValueError where it is missing or a scalar."""
    if name not in roles or not roles[name].ndim:
        raise ValueError(f"{name} is missing")
    return roles[name]


def matrix(tensor: Tensor) -> Tensor:
    """[rows, in], from a matrix or a 1x1 convolution."""
    if tensor.ndim < 2 or not tensor.numel():
        raise ValueError(f"expected a matrix, got shape {[*tensor.shape]}")
    return tensor.flatten(1)


def scalar(tensor: Tensor) -> float:
    """The value of a tensor of one element."""
    if tensor.numel() != 1:
        raise ValueError(f"alpha must have one element, got shape {[*tensor.shape]}")
    return float(tensor.float())


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or inf."""
    if not tensor.is_floating_point():
        return True
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # fp8 has no sum
    # a finite sum has finite terms, and needs no tensor of booleans
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def alpha_of(roles: Roles) -> float | None:
    """alpha, or None where the file has none."""
    return scalar(roles["alpha"]) if "alpha" in roles else None


def check_rank(down: Tensor, up: Tensor) -> None:
    """Raise ValueError unless down [r, in] and up [rows, r] have one rank."""
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"ranks differ: {down.shape[0]} down, {up.shape[1]} up")


def swap_halves(tensor: Tensor) -> Tensor:
    """The tensor with the halves of its first dim swapped."""
    if tensor.shape[0] % 2:
        raise ValueError(f"{tensor.shape[0]} rows cannot be halved")
    return torch.cat(tensor.chunk(2)[::-1])
