"""Weights offloaded to host memory, copied into two device buffers: one computes while the other is filled.

A thread gathers a part's weights from the file's pages into pinned memory, and a CUDA stream of its own
copies them to the device, both while another part computes. Where the host has room, the gathered weights
are cached in pinned memory, so that from the second step on only the copy to the device remains.

A step then takes the longer of two times: its arithmetic, or the offloaded bytes over the bus's rate. At
1024 x 1024 with 512 text tokens the arithmetic is 74.4 TFLOP and FLUX.1 [dev]'s blocks in bfloat16, without
modulations, are 17.4 GB. Of these 11.4 GB are offloaded on a card of 8 GB with 6 GB for weights, .9 s at
13 GB/s (PCIe 4.0 with 8 lanes). A card of 60 TFLOP/s computes 1.2 s, and nothing is lost; one of 400 computes
.19 s and waits for the bus, at a fifth of its speed. There fp8 halves the bytes. At 512 x 512 the arithmetic
is 21.5 TFLOP, so that the first card waits, too.
"""

from __future__ import annotations

import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layers import Modulation
from .streaming import WeightSlot, weight_slots

ALIGNMENT = 256
"""A tensor begins at a multiple of this many bytes in a buffer, as CUDA's own allocations do."""


@dataclass
class _Buffer:
    """Memory on the device, pinned memory on the host, and the part whose weights they hold."""

    device: Tensor
    pinned: Tensor
    part: nn.Module | None = None
    pending: Future[None] | None = None
    copied: Any = None
    """Event of the copying stream: the weights have arrived."""
    used: Any = None
    """Event of the computing stream: the weights are not needed any more."""
    views: list[tuple[WeightSlot, Tensor]] = field(default_factory=list)


@dataclass
class _Gathered:
    """A part's weights one after the other in pinned memory, and weak references to where they came from."""

    pinned: Tensor
    sources: list[weakref.ref[Tensor]]

    def is_of(self, slots: list[WeightSlot]) -> bool:
        return len(self.sources) == len(slots) and all(
            source() is slot.tensor for source, slot in zip(self.sources, slots, strict=True)
        )

    @property
    def is_stale(self) -> bool:
        """Whether a tensor is gone: that of a LoRA, as a rule, whose address another may have by now."""
        return any(source() is None for source in self.sources)


class HostOffloader:
    """Copies the weights of parts that are not on the device to it, part by part.

    Up to `cache_limit` bytes of gathered block weights stay in pinned memory.
    """

    def __init__(self, device: torch.device, cache_limit: int = 0) -> None:
        self._device = device
        self._cache_left = cache_limit
        self._cache: list[_Gathered] = []
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._thread = ThreadPoolExecutor(1, "host-offload")
        self._buffers = [_Buffer(_bytes(0, device), _bytes(0)) for _ in range(2)]
        self._in_use: _Buffer | None = None

    @property
    def device_bytes(self) -> int:
        """Size of the two buffers on the device."""
        return sum(buffer.device.nbytes for buffer in self._buffers)

    def is_offloaded(self, part: nn.Module) -> bool:
        return any(self.is_elsewhere(slot.tensor) for slot in weight_slots(part))

    def is_elsewhere(self, tensor: Tensor) -> bool:
        """Whether a tensor must be copied to the device."""
        return tensor.device.type not in (self._device.type, "meta")

    def prefetch(self, part: nn.Module) -> None:
        buffer = next(buffer for buffer in self._buffers if buffer is not self._in_use)
        if buffer.pending is not None:  # left by an interrupted run
            buffer.pending.result()
        slots = [slot for slot in weight_slots(part) if self.is_elsewhere(slot.tensor)]
        cacheable = not isinstance(part, Modulation)  # which is used once a run
        buffer.part, buffer.pending = part, self._thread.submit(self._fill, buffer, slots, cacheable)

    def wait(self, part: nn.Module) -> None:
        buffer = next((buffer for buffer in self._buffers if buffer.part is part), None)
        if buffer is None:
            self.prefetch(part)
            return self.wait(part)
        pending, buffer.pending = buffer.pending, None
        if pending is not None:
            pending.result()
        if buffer.copied is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(buffer.copied)
            buffer.device.record_stream(computing)  # else it could be reallocated while kernels read it
        self._in_use = buffer
        for slot, view in buffer.views:
            slot.put(view)

    def evict(self, part: nn.Module) -> None:
        """Restore the offloaded tensors; the buffer is refilled once the device has computed with it."""
        buffer, self._in_use = self._in_use, None
        if buffer is None:
            return
        for slot, _ in buffer.views:
            slot.restore()
        if self._cuda:
            buffer.used = torch.cuda.current_stream(self._device).record_event()
        buffer.part, buffer.views = None, []

    def _fill(self, buffer: _Buffer, slots: list[WeightSlot], cacheable: bool) -> None:
        """In the thread: copy the weights into the buffer."""
        starts, size = [], 0
        for slot in slots:
            starts.append(size)
            size += -(-slot.tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if buffer.device.numel() < size:
            if buffer.used is not None:
                buffer.used.synchronize()
            buffer.device = self._allocate(size)
        buffer.views = [
            (slot, _view(buffer.device, start, slot.tensor))
            for slot, start in zip(slots, starts, strict=True)
        ]
        gathered = self._gather(buffer, slots, starts, size, cacheable)
        if self._stream is None:
            buffer.device[:size].copy_(gathered[:size])
            return
        with torch.cuda.stream(self._stream):
            if buffer.used is not None:
                self._stream.wait_event(buffer.used)
            buffer.device[:size].copy_(gathered[:size], non_blocking=True)
            buffer.copied = self._stream.record_event()

    def _allocate(self, size: int) -> Tensor:
        """Device memory of the copying stream: kernels may still read what the computing one has freed."""
        if self._stream is None:
            return _bytes(size, self._device)
        with torch.cuda.stream(self._stream):
            return _bytes(size, self._device)

    def _gather(
        self, buffer: _Buffer, slots: list[WeightSlot], starts: list[int], size: int, cacheable: bool
    ) -> Tensor:
        """Pinned memory with the weights one after the other, from the cache or gathered now."""
        for entry in [entry for entry in self._cache if entry.is_stale]:
            self._cache.remove(entry)
            self._cache_left += entry.pinned.nbytes
        cached = next((entry for entry in self._cache if entry.is_of(slots)), None)
        if cached is not None:
            return cached.pinned
        if cacheable and size <= self._cache_left:
            self._cache_left -= size
            pinned = _bytes(size, pinned=self._cuda)
            self._cache.append(_Gathered(pinned, [weakref.ref(slot.tensor) for slot in slots]))
        else:
            if buffer.copied is not None:
                buffer.copied.synchronize()  # the pinned memory is read until then
            if buffer.pinned.numel() < size:
                buffer.pinned = _bytes(size, pinned=self._cuda)
            pinned = buffer.pinned
        for slot, start in zip(slots, starts, strict=True):
            _view(pinned, start, slot.tensor).copy_(slot.tensor.detach())
        return pinned


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes of a buffer from `start` on as a tensor of another's dtype and shape."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _bytes(count: int, device: torch.device | str = "cpu", pinned: bool = False) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device, pin_memory=pinned)
