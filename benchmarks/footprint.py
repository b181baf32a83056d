"""Seconds to load a checkpoint and to take steps with it, and the process memory that this takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from ..flux_core.memory import limit_of
from ..flux_core.model.spec import Conditioning
from ..flux_core.pipeline import VelocityRequest, draw_noise, guided_velocity
from ..flux_core.weights import load_transformer

STATUS = Path("/proc/self/status")
SIGMAS = (1.0, 0.5)


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of a process: its own (anonymous) memory, mapped files that are resident, and swapped out."""

    anonymous: int = 0
    mapped: int = 0
    swapped: int = 0


def process_memory() -> ProcessMemory:
    """The memory of this process now; zeros on systems other than Linux."""
    if not STATUS.exists():
        return ProcessMemory()
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    values = [int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssFile", "VmSwap")]
    return ProcessMemory(*values)


class MemoryPeak:
    """Samples the process's memory every `period` seconds in a `with` block; `highest` of each kind."""

    def __init__(self, period: float = 0.05) -> None:
        self.highest, self._period = process_memory(), period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            with suppress(OSError):
                now, highest = process_memory(), self.highest
                self.highest = ProcessMemory(
                    max(now.anonymous, highest.anonymous),
                    max(now.mapped, highest.mapped),
                    max(now.swapped, highest.swapped),
                )


@torch.no_grad()
def measure(path: Path, sides: Sequence[int], limit: str, device: torch.device) -> dict[str, float]:
    """Seconds (load; at each side prepare, first step, second step) and bytes of one checkpoint.

    Raises ValueError where a velocity is not finite, and what `load_transformer` raises.
    """
    before = process_memory()
    figures: dict[str, float] = {"file": sum(p.stat().st_size for p in _files(path))}
    with MemoryPeak() as peak:
        start = time.perf_counter()
        model = load_transformer(path, device=device, limit=limit_of(limit, device))
        figures["load"] = time.perf_counter() - start
        figures["loaded_anonymous"] = process_memory().anonymous - before.anonymous
        figures["streamed"] = float(model.streaming is not None)
        spec = model.spec
        generator = torch.Generator().manual_seed(0)
        txt = torch.randn(1, spec.txt_length, spec.context_in, generator=generator)
        prompt = Conditioning(txt, torch.randn(1, spec.vec_in, generator=generator), 3.5)
        for side in sides:
            h = w = side // 8
            noise = draw_noise(0, 1, h, w).to(device)
            start = time.perf_counter()
            velocity = guided_velocity(model, VelocityRequest(prompt, SIGMAS, h, w, 1))
            figures[f"prepare_{side}"] = time.perf_counter() - start
            for name, sigma in zip(("first", "second"), SIGMAS, strict=True):
                start = time.perf_counter()
                result = velocity(noise, sigma)
                finite = bool(result.isfinite().all())  # also waits for the device
                figures[f"{name}_{side}"] = time.perf_counter() - start
                if not finite:
                    raise ValueError(f"{path.name} gives velocities that are not finite at {side} x {side}")
    figures["anonymous"] = peak.highest.anonymous
    figures["mapped"] = peak.highest.mapped
    figures["swapped"] = peak.highest.swapped
    if device.type == "cuda":
        figures["device"] = torch.cuda.max_memory_allocated(device)
    return figures


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
