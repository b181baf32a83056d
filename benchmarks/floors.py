"""Lower bounds for a step's time: its FLOP and bytes, and this machine's matmul rate and bandwidth.

A multiply-add counts as two FLOP. What `prepare` computes once a run (text projection, modulations) is not
part of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flux_core.backends.cpu_linear import PackedLinear
from ..flux_core.backends.onednn import can_pack
from ..flux_core.model.spec import FluxSpec
from .interleaved import Clock, Run

FP8 = torch.float8_e4m3fn
SIDES = {"cpu": (256, 1024, 2048), "cuda": (4096, 8192)}
"""Sides of the square matrices that the matmul rate is measured with; the best counts."""
QUICK_SIDES = (64,)


@dataclass(frozen=True)
class Flop:
    """FLOP of a step: of the linear layers and of the two matmuls in attention."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def seconds(self, linear_rate: float, attention_rate: float) -> float:
        """The shortest time at these rates in FLOP/s."""
        return self.linear / linear_rate + self.attention / attention_rate


def step_flop(spec: FluxSpec, text_tokens: int, image_tokens: int, batch: int = 1) -> Flop:
    """FLOP of one step. FLUX.1 at 1024 x 1024 with 512 text tokens: 59.5 + 14.9 = 74.4 TFLOP."""
    hidden, both = spec.hidden_size, text_tokens + image_tokens
    blocks = spec.depth + spec.depth_single
    # qkv, attention output and MLP: a double block has these weights once for each stream
    weights = hidden * (4 * hidden + 2 * spec.mlp_size)
    ends = hidden * (spec.in_channels + spec.out_channels)
    linear = 2 * (blocks * weights * both + ends * image_tokens)
    return Flop(float(batch * linear), float(batch * blocks * 4 * both * both * hidden))


def step_bytes(spec: FluxSpec, text_tokens: int, image_tokens: int, width: int) -> dict[str, int]:
    """Bytes that each elementwise part of a step moves if it reads its inputs and writes its outputs once.

    `width` is the size of an element in bytes. A GELU fused into the matmul before it moves none.
    """
    hidden, both = spec.hidden_size, text_tokens + image_tokens
    double, single = spec.depth, spec.depth_single
    blocks = double + single
    return {
        "norms and modulation": 2 * hidden * width * ((2 * double + single) * both + image_tokens),
        "q/k norm and rotary": 4 * hidden * width * blocks * both,
        "GELU": 2 * spec.mlp_size * width * blocks * both,
        "gated residuals": 3 * hidden * width * (2 * double + single) * both,
    }


def matmul_rate(dtype: torch.dtype, clock: Clock, sides: tuple[int, ...] | None = None) -> float:
    """FLOP/s of the fastest square matmul in `dtype`, by torch or with packed weights.

    Raises RuntimeError where there is none (float8 on most processors and on cards before 8.9).
    """
    device, rates = clock.device, []
    for side in sides or SIDES[device.type]:
        a, b = torch.randn(2, side, side, device=device).unbind()
        for run in _matmuls(a, b, dtype):
            rates.append(2 * side**3 / best_of(run, clock))
    return max(rates)


def _matmuls(a: Tensor, b: Tensor, dtype: torch.dtype) -> list[Run]:
    """The available ways to multiply two square matrices."""
    if dtype == FP8:
        return [_fp8_matmul(a.to(FP8), b.to(FP8))]
    left, right = a.to(dtype), b.to(dtype)
    runs: list[Run] = [lambda: left @ right]
    if can_pack(a.device, dtype):
        layer = PackedLinear(right, None)
        runs.append(lambda: layer(left))
    return runs


def _fp8_matmul(a: Tensor, b: Tensor) -> Run:
    """With a scale for each row of either operand, as in fp8 layers."""
    scale = torch.ones(len(a), 1, device=a.device)
    return lambda: torch._scaled_mm(a, b.T, scale_a=scale, scale_b=scale.T, out_dtype=torch.bfloat16)


def bandwidth(nbytes: int, clock: Clock) -> float:
    """Bytes/s, read and written, of copying `nbytes`: a small tensor may stay in the cache."""
    source = torch.zeros(max(1, nbytes // 4), device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_of(lambda: target.copy_(source), clock)


def best_of(run: Run, clock: Clock, seconds: float = 0.3, at_least: int = 3) -> float:
    """The fewest seconds of a run, after a warm-up; short runs are timed several at once."""
    run()
    once = max(clock.seconds(run), 1e-7)
    together = max(1, int(0.01 / once))
    turns = max(at_least, int(seconds / (once * together)))
    return min(clock.seconds(_repeated(run, together)) for _ in range(turns)) / together


def _repeated(run: Run, times: int) -> Callable[[], None]:
    def many() -> None:
        for _ in range(times):
            run()

    return many
