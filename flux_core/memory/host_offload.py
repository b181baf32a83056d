"""Weights in host memory, copied into two buffers on the device: one is computed with, the other is filled.

A thread gathers a part's weights from the file's pages into pinned memory, and a CUDA stream of its own
carries them over, both while another part computes. Where the host has room, what was gathered stays, so that
from the second step on there is only the carrying.

A step then takes the longer of two times: its arithmetic, or the far weights' bytes over the bus's rate. At
1024 x 1024 with 512 text tokens the arithmetic is 74.4 TFLOP and FLUX.1 [dev]'s blocks in bfloat16, without
modulations, are 17.4 GB. Of these 11.4 GB are far on a card of 8 GB with 6 GB for weights, .9 s at 13 GB/s
(PCIe 4.0 with 8 lanes). A card of 60 TFLOP/s computes 1.2 s, and nothing is lost; one of 400 computes .19 s
and waits for the bus, at a fifth of its speed. There fp8 halves the bytes, and at 512 x 512 the arithmetic
is 21.5 TFLOP, so that the first card waits, too.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layers import Modulation
from .streaming import Place, places, put

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
    """Copies the weights of parts that are not on the device there, part by part.

    Up to `keep` bytes of what was gathered for blocks stay in pinned memory.
    """

    def __init__(self, device: torch.device, keep: int = 0) -> None:
        self._device = device
        self._room = keep
        self._kept: dict[tuple[int, ...], Tensor] = {}
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
        keep = not isinstance(part, Modulation)  # which is used once a run
        slot.part, slot.coming = part, self._thread.submit(self._fill, slot, far, keep)

    def finish(self, part: nn.Module) -> None:
        slot = next((slot for slot in self._slots if slot.part is part), None)
        if slot is None:
            self.start(part)
            return self.finish(part)
        coming, slot.coming = slot.coming, None
        if coming is not None:
            coming.result()
        if slot.copied is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(slot.copied)
            slot.near.record_stream(computing)  # else it could be given away while kernels read it
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

    def _fill(self, slot: _Slot, far: list[Place], keep: bool) -> None:
        """In the thread: the weights into the slot."""
        starts, size = [], 0
        for *_, tensor in far:
            starts.append(size)
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        if slot.near.numel() < size:
            if slot.used is not None:
                slot.used.synchronize()
            slot.near = self._room_near(size)
        slot.views = [
            (place, _view(slot.near, start, place[2])) for place, start in zip(far, starts, strict=True)
        ]
        gathered = self._gathered(slot, far, starts, size, keep)
        if self._stream is None:
            slot.near[:size].copy_(gathered[:size])
            return
        with torch.cuda.stream(self._stream):
            if slot.used is not None:
                self._stream.wait_event(slot.used)
            slot.near[:size].copy_(gathered[:size], non_blocking=True)
            slot.copied = self._stream.record_event()

    def _room_near(self, size: int) -> Tensor:
        """Memory of the copying stream: what the computing one has freed may still be read by its kernels."""
        if self._stream is None:
            return _bytes(size, self._device)
        with torch.cuda.stream(self._stream):
            return _bytes(size, self._device)

    def _gathered(self, slot: _Slot, far: list[Place], starts: list[int], size: int, keep: bool) -> Tensor:
        """Pinned memory with the weights, one after the other: what was kept, or gathered now."""
        key = tuple(place[2].data_ptr() for place in far)
        if key in self._kept:
            return self._kept[key]
        if keep and size <= self._room:
            self._room -= size
            pinned = self._kept[key] = _bytes(size, pinned=self._cuda)
        else:
            if slot.copied is not None:
                slot.copied.synchronize()  # the pinned memory is read until then
            if slot.pinned.numel() < size:
                slot.pinned = _bytes(size, pinned=self._cuda)
            pinned = slot.pinned
        for place, start in zip(far, starts, strict=True):
            _view(pinned, start, place[2]).copy_(place[2].detach())
        return pinned


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes of a buffer from `start` on as a tensor of another's dtype and shape."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _bytes(count: int, device: torch.device | str = "cpu", pinned: bool = False) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device, pin_memory=pinned)
