"""The parts of a model one after the other, each with its weights near while it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from torch import Tensor, nn

from ..model.layers import Modulation

Part = TypeVar("Part", bound=nn.Module)
Place = tuple[dict[str, Tensor | None], str, Tensor]
"""Where a tensor is kept: a module's parameters or buffers, and its name there."""


class Mover(Protocol):
    """Brings the weights of one part of a model near, and lets them go."""

    def is_far(self, part: nn.Module) -> bool:
        """Whether the part's weights are anywhere else than where it computes."""
        ...

    def start(self, part: nn.Module) -> None:
        """Begin to bring the weights of a far part; returns at once."""

    def finish(self, part: nn.Module) -> None:
        """Return once they are there, whether they were on their way or not."""

    def drop(self, part: nn.Module) -> None:
        """The part has computed."""


class Streaming:
    """Hands out the parts of a model, and has a mover bring those that are far."""

    def __init__(self, mover: Mover) -> None:
        self.mover = mover

    def each(self, parts: Sequence[Part], then: Sequence[nn.Module] = ()) -> Iterator[Part]:
        """The parts in order. The next far one is always on its way; after the last, the first of `then`."""
        far = [part for part in (*parts, *then) if self.mover.is_far(part)]
        for part in parts:
            if not far or part is not far[0]:
                yield part
                continue
            far.pop(0)
            self.mover.finish(part)
            if far:
                self.mover.start(far[0])
            try:
                yield part
            finally:
                self.mover.drop(part)


def places(part: nn.Module) -> Iterator[Place]:
    """Where a part keeps its weights. A block's modulations are no part of it, but parts themselves."""
    for holder in _modules(part):
        for kept in (holder._parameters, holder._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    yield kept, name, tensor  # type: ignore[misc]  # a dict of Parameters


def weights_of(part: nn.Module) -> list[Tensor]:
    """The tensors of `places`."""
    return [tensor for *_, tensor in places(part)]


def put(place: Place, tensor: Tensor) -> None:
    """Keep another tensor in a place."""
    kept, name, old = place
    kept[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor


def _modules(part: nn.Module) -> Iterator[nn.Module]:
    yield part
    for child in part.children():
        if not isinstance(child, Modulation):
            yield from _modules(child)
