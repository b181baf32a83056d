"""Which parts of a transformer stay near within a memory limit, and which are streamed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..model.transformer import FluxTransformer
from .limits import free_memory
from .disk_offload import Pager
from .host_offload import Stager
from .streaming import Streaming, places, put, weights_of


def stream(model: FluxTransformer, device: torch.device | str, limit: int | None) -> FluxTransformer:
    """The model, made to compute on `device` with about `limit` bytes of its weights kept there.

    It must lie on the CPU, best as `load_transformer` maps it. What is no block stays near whatever the limit
    says, and two blocks more. Where all of it fits, or without a limit, it is simply moved; so is, on a CPU
    of another system than Linux, every model: there the system alone decides which pages stay.
    """
    device = torch.device(device)
    everything = [*model.parameters(), *model.buffers()]
    if limit is None or _bytes(everything) <= limit or (device.type == "cpu" and sys.platform != "linux"):
        return model.to(device)
    blocks, modulations = [*model.double_blocks, *model.single_blocks], model.modulations()
    parts = [*blocks, *modulations]
    sizes = [_bytes(weights_of(part)) for part in parts]
    left = limit - (_bytes(everything) - sum(sizes)) - 2 * max(sizes)
    near = near_parts(sizes[: len(blocks)], sizes[len(blocks) :], left)
    far = [tensor for i, part in enumerate(parts) if i not in near for tensor in weights_of(part)]
    if device.type == "cpu":
        model.streaming = Streaming(Pager(far))
        return model
    away = {id(tensor) for tensor in far}
    for module in [model, *modulations]:
        for place in places(module):
            if id(place[2]) not in away:
                put(place, place[2].to(device))
    room = free_memory(torch.device("cpu")) or 0
    model.streaming = Streaming(Stager(device, keep=room // 2))  # the rest is the pages' and everybody's
    return model


def near_parts(blocks: Sequence[int], modulations: Sequence[int], room: int) -> set[int]:
    """Which of the parts, blocks and then modulations, of these bytes fit in `room` bytes, by number.

    Blocks first, evenly spread, and then what still fits.
    """
    near, kept, seen = set[int](), 0, 0
    share = min(1.0, room / sum(blocks))
    for number, size in enumerate(blocks):
        seen += size
        if kept + size <= share * seen:
            near.add(number)
            kept += size
    for number, size in enumerate([*blocks, *modulations]):
        if number not in near and kept + size <= room:
            near.add(number)
            kept += size
    return near


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
