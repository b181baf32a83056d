"""Yields the parts of a model in turn, each while its weights are resident."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor, nn

from ..model.layers import Modulation

Part = TypeVar("Part", bound=nn.Module)


class Offloader(Protocol):
    """Makes the weights of one part of a model resident, and evicts them."""

    def is_offloaded(self, part: nn.Module) -> bool:
        """Whether any of the part's weights is offloaded."""
        ...

    def prefetch(self, part: nn.Module) -> None:
        """Start to make the weights of an offloaded part resident; returns at once."""

    def wait(self, part: nn.Module) -> None:
        """Return once the weights are resident, prefetched or not."""

    def evict(self, part: nn.Module) -> None:
        """Release what `wait` made resident."""


class WeightStreamer:
    """Yields the parts of a model; an offloader prefetches those that are offloaded."""

    def __init__(self, offloader: Offloader) -> None:
        self.offloader = offloader

    def each(self, parts: Sequence[Part], then: Sequence[nn.Module] = ()) -> Iterator[Part]:
        """The parts in order, the next offloaded one being prefetched; after the last, that of `then`."""
        offloaded = [part for part in (*parts, *then) if self.offloader.is_offloaded(part)]
        for part in parts:
            if not offloaded or part is not offloaded[0]:
                yield part
                continue
            offloaded.pop(0)
            self.offloader.wait(part)
            if offloaded:
                self.offloader.prefetch(offloaded[0])
            try:
                yield part
            finally:
                self.offloader.evict(part)


@dataclass(frozen=True)
class WeightSlot:
    """A parameter or buffer of a module: the module's dict, the name in it, the tensor found there."""

    container: dict[str, Tensor | None]
    name: str
    tensor: Tensor

    def put(self, tensor: Tensor) -> None:
        """Assign another tensor: as a parameter if this slot's is one."""
        is_parameter = isinstance(self.tensor, nn.Parameter)
        self.container[self.name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor

    def restore(self) -> None:
        """Assign this slot's own tensor again."""
        self.container[self.name] = self.tensor


def weight_slots(part: nn.Module) -> Iterator[WeightSlot]:
    """The parameters and buffers of a part, without a block's modulations, which are parts of their own."""
    for module in _modules(part):
        for container in (module._parameters, module._buffers):
            for name, tensor in container.items():
                if tensor is not None:
                    yield WeightSlot(container, name, tensor)  # type: ignore[arg-type]  # a dict of Parameters


def weights_of(part: nn.Module) -> list[Tensor]:
    """The tensors of `weight_slots`."""
    return [slot.tensor for slot in weight_slots(part)]


def _modules(part: nn.Module) -> Iterator[nn.Module]:
    yield part
    for child in part.children():
        if not isinstance(child, Modulation):
            yield from _modules(child)
