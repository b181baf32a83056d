"""Weights in host memory, copied into two buffers on the device: one is computed with, the other is filled.

A thread gathers a part's weights from the file's pages into pinned memory, and a CUDA stream of its own
carries them over, both while another part computes.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .parts import Place, places, put

ALIGNED = 256
"""Bytes to a multiple of which a tensor begins in a buffer: what CUDA's own allocations keep."""


@dataclass
class _Slot:
    """A buffer on the device with one in pinned host memory, and what is in them."""

    near: Tensor
    pinned: Tensor
    part: nn.Module | None = None
    coming: Future[None] | None = None
    copied: Any = None
    """Event of the copying stream: the weights are there."""
    used: Any = None
    """Event of the computing stream: the weights are no longer needed."""
    views: list[tuple[Place, Tensor]] = field(default_factory=list)


class Stager:
    """Copies the weights of parts that are not on the device there, part by part."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._thread = ThreadPoolExecutor(1, "stager")
        self._slots = [_Slot(_bytes(0, device), _bytes(0)) for _ in range(2)]
        self._in_use: _Slot | None = None

    def is_far(self, part: nn.Module) -> bool:
        return any(self._is_far(place) for place in places(part))

    def start(self, part: nn.Module) -> None:
        slot = next(slot for slot in self._slots if slot is not self._in_use)
        if slot.coming is not None:  # of a run that was interrupted
            slot.coming.result()
        far = [place for place in places(part) if self._is_far(place)]
        slot.part, slot.coming = part, self._thread.submit(self._fill, slot, far)

    def finish(self, part: nn.Module) -> None:
        slot = next((slot for slot in self._slots if slot.part is part), None)
        if slot is None:
            self.start(part)
            return self.finish(part)
        coming, slot.coming = slot.coming, None
        if coming is not None:
            coming.result()
        if slot.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.copied)
        self._in_use = slot
        for place, view in slot.views:
            put(place, view)

    def drop(self, part: nn.Module) -> None:
        """Put back what was far; the buffer is filled again once the device has computed with it."""
        slot, self._in_use = self._in_use, None
        if slot is None:
            return
        for (kept, name, old), _ in slot.views:
            kept[name] = old
        if self._cuda:
            slot.used = torch.cuda.current_stream(self._device).record_event()
        slot.part, slot.views = None, []

    def _is_far(self, place: Place) -> bool:
        return place[2].device.type not in (self._device.type, "meta")

    def _fill(self, slot: _Slot, far: list[Place]) -> None:
        """In the thread: the weights into the slot."""
        if slot.copied is not None:
            slot.copied.synchronize()  # the pinned memory is read until then
        starts, size = [], 0
        for *_, tensor in far:
            starts.append(size)
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        if slot.near.numel() < size:
            if slot.used is not None:
                slot.used.synchronize()
            slot.near, slot.pinned = _bytes(size, self._device), _bytes(size, pinned=self._cuda)
        slot.views = []
        for place, start in zip(far, starts, strict=True):
            tensor = place[2].detach()
            stretch = slice(start, start + tensor.nbytes)
            slot.pinned[stretch].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            slot.views.append((place, slot.near[stretch].view(tensor.dtype).view(tensor.shape)))
        if self._stream is None:
            slot.near[:size].copy_(slot.pinned[:size])
            return
        with torch.cuda.stream(self._stream):
            if slot.used is not None:
                self._stream.wait_event(slot.used)
            slot.near[:size].copy_(slot.pinned[:size], non_blocking=True)
            slot.copied = self._stream.record_event()


def _bytes(count: int, device: torch.device | str = "cpu", pinned: bool = False) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device, pin_memory=pinned)
