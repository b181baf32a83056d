"""What a model's file costs a process: seconds to load it and to step, and the memory held meanwhile."""

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
class Memory:
    """Bytes that a process holds: of its own, of mapped files, and swapped out."""

    anonymous: int = 0
    mapped: int = 0
    swapped: int = 0


def held() -> Memory:
    """What this process holds now; zeros where the system does not tell (elsewhere than on Linux)."""
    if not STATUS.exists():
        return Memory()
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    values = [int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssFile", "VmSwap")]
    return Memory(*values)


class Watch:
    """Looks at the process's memory every `period` seconds and keeps the most of each kind."""

    def __init__(self, period: float = 0.05) -> None:
        self.most, self._period = held(), period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
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
                now = held()
                most = self.most
                self.most = Memory(
                    max(now.anonymous, most.anonymous),
                    max(now.mapped, most.mapped),
                    max(now.swapped, most.swapped),
                )


@torch.no_grad()
def measure(path: Path, sides: Sequence[int], limit: str, device: torch.device) -> dict[str, float]:
    """Figures of one file: seconds (load; at each side prepare, the first step, the second), bytes.

    Raises ValueError where a velocity is not finite, and what `load_transformer` raises.
    """
    before = held()
    figures: dict[str, float] = {"file": sum(p.stat().st_size for p in _files(path))}
    with Watch() as watch:
        start = time.perf_counter()
        model = load_transformer(path, device=device, limit=limit_of(limit, device))
        figures["load"] = time.perf_counter() - start
        figures["loaded_anonymous"] = held().anonymous - before.anonymous
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
                finite = bool(result.isfinite().all())  # waits for the device, too
                figures[f"{name}_{side}"] = time.perf_counter() - start
                if not finite:
                    raise ValueError(f"{path.name} gives velocities that are not finite at {side} x {side}")
    figures["anonymous"] = watch.most.anonymous
    figures["mapped"] = watch.most.mapped
    figures["swapped"] = watch.most.swapped
    if device.type == "cuda":
        figures["device"] = torch.cuda.max_memory_allocated(device)
    return figures


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
