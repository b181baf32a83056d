"""How much memory a device has free, and how much of it weights may take."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

GIB = 1 << 30
ACTIVATION_RESERVE = 5 * GIB // 2
"""Bytes that `auto` leaves free for activations."""
LIMITS = ("auto", "none", *(f"{n} GB" for n in (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32)))
"""Choices of a memory limit; a GB has 2^30 bytes."""


def limit_of(choice: str, device: torch.device | str) -> int | None:
    """Bytes of weights for one of LIMITS; None for no limit. Raises ValueError for another text.

    `auto` is the device's free memory less ACTIVATION_RESERVE, or no limit where that is unknown.
    """
    if choice not in LIMITS:
        raise ValueError(f"a memory limit must be one of {', '.join(LIMITS)}, got {choice!r}")
    if choice == "none":
        return None
    if choice != "auto":
        return int(choice.removesuffix(" GB")) * GIB
    free = free_memory(torch.device(device))
    return None if free is None else max(0, free - ACTIVATION_RESERVE)


def fits(model: nn.Module, device: torch.device | str) -> bool:
    """Whether a device has room for a model's weights and for activations beside them."""
    limit = limit_of("auto", device)
    return limit is None or sum(t.nbytes for t in (*model.parameters(), *model.buffers())) <= limit


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device, None where they are unknown.

    On a CPU: what Linux can provide without swapping, within the limit of a container.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    known = [free for free in (system_memory(), container_memory()) if free is not None]
    return min(known, default=None)


def system_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that Linux reports as available, reclaimable pages of files included; None elsewhere."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def container_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a container's limit leaves besides pages of files; None without a limit."""
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        lines = (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = dict(line.split() for line in lines)
        return None if limit == "max" else max(0, int(limit) - int(stat["anon"]))
    except (OSError, ValueError, KeyError):
        return None
