"""How much memory there is, and how much of it weights may take."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

GIB = 1 << 30
KEPT_FREE = 5 * GIB // 2
"""Bytes that `auto` leaves to the pictures."""
LIMITS = ("auto", "none", *(f"{n} GB" for n in (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32)))
"""Choices of a memory limit; a GB has 2^30 bytes."""


def limit_of(choice: str, device: torch.device | str) -> int | None:
    """Bytes of weights for one of LIMITS; None for no limit. Raises ValueError for another text.

    `auto` is what is free on the device, less KEPT_FREE; no limit where the system does not tell.
    """
    if choice not in LIMITS:
        raise ValueError(f"a memory limit must be one of {', '.join(LIMITS)}, got {choice!r}")
    if choice == "none":
        return None
    if choice != "auto":
        return int(choice.removesuffix(" GB")) * GIB
    free = free_memory(torch.device(device))
    return None if free is None else max(0, free - KEPT_FREE)


def fits(model: nn.Module, device: torch.device | str) -> bool:
    """Whether a device has room for a model's weights, and for pictures beside them."""
    limit = limit_of("auto", device)
    return limit is None or sum(t.nbytes for t in (*model.parameters(), *model.buffers())) <= limit


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, None where the system does not tell.

    On a CPU: what Linux could give without swapping, within the limit of a container.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    told = [_available(), _container()] if device.type == "cpu" else []
    return min((bytes_ for bytes_ in told if bytes_ is not None), default=None)


def _available(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """What the system says is available, pages of files among it."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves besides pages of files; None without a limit."""
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        stat = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
        return None if limit == "max" else max(0, int(limit) - int(stat["anon"]))
    except (OSError, ValueError, KeyError):
        return None
