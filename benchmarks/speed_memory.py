"""Case of `bench speed`: peak memory of a step, a decode and a whole image above the weights.

On the CPU each side runs in its own process, so that it cannot reuse memory that the other side freed, and
the process's own (anonymous) memory counts. On CUDA the memory that torch allocated counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..flux_core.backends.cpu_pack import pack_weights
from ..flux_core.memory.tiling import decode
from ..flux_core.model.autoencoder import AutoEncoder, AutoEncoderSpec
from ..flux_core.pipeline import Models
from ..flux_core.weights import load_autoencoder, load_text_encoders, load_transformer
from .footprint import STATUS, MemoryPeak, process_memory
from .generate import check_files, model_files
from .interleaved import Ratio, Run
from .reference.models import diffusers_autoencoder, diffusers_pipeline, diffusers_transformer, randomize
from .speed_inputs import FULL, QUICK, Inputs, diffusers_twin, random_model
from .speed_models import our_image, their_image
from .speed_settings import TIME_IS_UP, Note, Outcome, Settings, Skipped

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("ours", "theirs")
PERIOD = 0.002
"""Seconds between samples of a process's memory."""
REPEATED = 2.0
"""Seconds for which short runs are repeated, so that a sample meets the peak."""


def step(side: str, settings: Settings) -> Run:
    """1 double and 2 single blocks of FLUX.1's width at 512 px, fp32."""
    model = random_model(QUICK if settings.quick else FULL, torch.float32, settings.device)
    inputs = Inputs(model, 64, 16) if settings.quick else Inputs(model, 512, 512)
    if side == "theirs":
        return inputs.their_step(diffusers_twin(model))
    pack_weights(model)
    return inputs.our_step(model)


def decoding(pixels: int) -> Callable[[str, Settings], Run]:
    """A decode to `pixels` squared by FLUX.1's autoencoder with random weights, fp32, by either side."""

    def build(side: str, settings: Settings) -> Run:
        spec = AutoEncoderSpec(ch=32) if settings.quick else AutoEncoderSpec()
        model = AutoEncoder(spec).eval().requires_grad_(False)
        randomize(model)
        edge = (64 if settings.quick else pixels) // 8
        latent = torch.randn(1, 16, edge, edge).to(settings.device)
        if side == "theirs":
            twin: Any = diffusers_autoencoder(model).to(settings.device)
            return lambda: twin.decode(latent).sample
        model = model.to(settings.device)
        return lambda: decode(model, latent)

    return build


def image(side: str, settings: Settings) -> Run:
    """An image by mini-dev, text encoding included."""
    files, steps = model_files(settings.models, "dev"), 2
    check_files(files)
    options = {"dtype": torch.float32, "device": settings.device}
    encoders = load_text_encoders(files.clip, files.t5, **options)
    transformer = load_transformer(files.transformer, **options)
    vae = load_autoencoder(files.vae, **options)
    if side == "theirs":
        twins = diffusers_transformer(transformer), diffusers_autoencoder(vae)
        pipeline = diffusers_pipeline(*twins).to(settings.device)
        return lambda: their_image(pipeline, encoders, steps)
    pack_weights(transformer)
    models = Models(encoders, transformer, vae)
    return lambda: our_image(models, steps)


LARGE = "decode-2048"
SUBJECTS: dict[str, Callable[[str, Settings], Run]] = {
    "step-512": step,
    "decode-512": decoding(512),
    "picture": image,
    LARGE: decoding(2048),
}


def memory(settings: Settings) -> Iterator[Outcome]:
    """Ratios of bytes; the decode at 2048 px is ours alone, diffusers' would not fit into most computers."""
    for name in SUBJECTS:
        case = f"memory-{name}"
        if settings.is_time_up:
            yield Skipped(case, TIME_IS_UP)
        elif settings.device.type == "cpu" and not STATUS.exists():
            yield Skipped(case, "this system has no /proc/self/status to read a process's memory from")
        elif name == LARGE and not settings.large:
            yield Skipped(case, "minutes on a CPU; --large measures it")
        else:
            try:
                yield _compared(name, settings)
            except (OSError, ValueError) as error:
                yield Skipped(case, str(error))


def _compared(name: str, settings: Settings) -> Outcome:
    """Raises OSError where a child process failed, and ValueError where the miniature is missing."""
    measure = above_weights if settings.quick or settings.device.type == "cuda" else in_own_process
    ours = measure(name, "ours", settings)
    if name == LARGE:
        return Note(f"memory-{name}: ours takes {ours / 1e6:.0f} MB above the weights")
    theirs = measure(name, "theirs", settings)
    if not ours or not theirs:
        return Skipped(f"memory-{name}", "too small to measure")
    ratio = theirs / ours
    return Ratio(f"memory-{name}", ratio, ratio, ratio, 1, ours, theirs, "above the weights", "MB")


@torch.no_grad()
def above_weights(name: str, side: str, settings: Settings) -> int:
    """Peak bytes above those of the loaded model. Raises ValueError where the miniature is missing."""
    torch.manual_seed(0)
    return peak(SUBJECTS[name](side, settings), settings)


def peak(run: Run, settings: Settings) -> int:
    """Peak bytes of a run above the memory before it."""
    gc.collect()
    device = settings.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    release_freed_memory()
    base, end = process_memory().anonymous, time.perf_counter() + (0.1 if settings.quick else REPEATED)
    with MemoryPeak(PERIOD) as found:
        run()
        while time.perf_counter() < end:
            run()
    return found.highest.anonymous - base


def release_freed_memory() -> None:
    """Have glibc return freed memory to the system; does nothing with other C libraries."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def in_own_process(name: str, side: str, settings: Settings) -> int:
    """`above_weights` measured by a child process. Raises OSError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "figures.json"
        command = [sys.executable, str(ROOT / "run.py"), "bench", "speed", "--child", name, side]
        command += ["--models", str(settings.models), "--threads", str(torch.get_num_threads())]
        ended = subprocess.run([*command, "--json", str(report)], capture_output=True, text=True)
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise OSError(f"the process that measured {side} failed with code {ended.returncode}: {last}")
        return json.loads(report.read_text(encoding="utf-8"))["figures"]["bytes"]
