"""Which parts of a transformer stay resident within a memory limit, and which are offloaded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..model.transformer import FluxTransformer
from .disk_offload import DiskOffloader
from .host_offload import HostOffloader
from .limits import free_memory
from .streaming import WeightStreamer, weight_slots, weights_of


def stream(model: FluxTransformer, device: torch.device | str, limit: int | None) -> FluxTransformer:
    """The model, prepared to compute on `device` with about `limit` bytes of its weights resident there.

    It must be on the CPU, best as `load_transformer` maps it. Embedders and the last layer are always
    resident, whatever the limit, and so are two blocks: the one that computes and the one that is prefetched.
    Where everything fits, or without a limit, the model is simply moved. So is every model on a CPU under
    another system than Linux, where only the operating system decides which pages stay in memory.
    """
    device = torch.device(device)
    everything = [*model.parameters(), *model.buffers()]
    if limit is None or _bytes(everything) <= limit or (device.type == "cpu" and sys.platform != "linux"):
        return model.to(device)
    blocks, modulations = [*model.double_blocks, *model.single_blocks], model.modulations()
    parts = [*blocks, *modulations]
    sizes = [_bytes(weights_of(part)) for part in parts]
    left = limit - (_bytes(everything) - sum(sizes)) - 2 * max(sizes)
    resident = resident_parts(sizes[: len(blocks)], sizes[len(blocks) :], left)
    offloaded = [tensor for i, part in enumerate(parts) if i not in resident for tensor in weights_of(part)]
    if device.type == "cpu":
        model.streaming = WeightStreamer(DiskOffloader(offloaded))
        return model
    offloaded_ids = {id(tensor) for tensor in offloaded}
    for module in [model, *modulations]:
        for slot in weight_slots(module):
            if id(slot.tensor) not in offloaded_ids:
                slot.put(slot.tensor.to(device))
    host_memory = free_memory(torch.device("cpu")) or 0
    cache_limit = host_memory // 2  # the other half is for pages of files and for other processes
    model.streaming = WeightStreamer(HostOffloader(device, cache_limit))
    return model


def resident_parts(blocks: Sequence[int], modulations: Sequence[int], limit: int) -> set[int]:
    """Indices of the parts (blocks, then modulations) of these sizes that stay resident within `limit` bytes.

    Blocks first, spread evenly, and then whatever still fits.
    """
    resident, used, seen = set[int](), 0, 0
    share = min(1.0, limit / sum(blocks))
    for index, size in enumerate(blocks):
        seen += size
        if used + size <= share * seen:
            resident.add(index)
            used += size
    for index, size in enumerate([*blocks, *modulations]):
        if index not in resident and used + size <= limit:
            resident.add(index)
            used += size
    return resident


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
