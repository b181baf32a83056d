"""What lies between the transformer's products, in one pass over memory each: Triton kernels for a GPU.

On a large GPU a block's products are so quick that reading and writing its tokens in between takes a tenth of
the time. Four passes are joined here: q/k norm, rotation and layout for attention; the gated residual with
the modulated norm that follows it; the norm alone, where torch needs two passes; GELU with the concatenation
before a single block's last layer. A fifth brings tokens into fp8 (fp8.py), which takes torch four passes.
Their plain twins are the functions of layers.py and fp8.py that call them, which go on by themselves wherever
the answer here is None: on another device, where gradients are recorded, while a compiler traces (it fuses on
its own), without Triton, or after a kernel has failed, which is logged once.

Tested in Triton's interpreter against the twins, and compiled for GPUs from Turing to Blackwell, but **not
yet run on a GPU:** neither the speed nor `LARGE` has been measured. So only RECTIFLUX_FUSED=1 in the
environment switches it on.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = [
    "LARGE",
    "beside_gelu",
    "gated_residual",
    "modulated_norm",
    "queries_keys_values",
    "residual_and_norm",
    "rows_in_fp8",
    "serves",
]

log = logging.getLogger(__name__)

LARGE = 1 << 22
"""Numbers from which on a pass takes longer than the launch of a kernel. Below, torch, which launches faster,
does single operations itself."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Launches(Protocol):
    """launch.py, which imports Triton."""

    modulated_norm: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    residual_and_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    beside_gelu: Callable[[Tensor, Tensor, int], Tensor]
    queries_keys_values: Callable[..., tuple[Tensor, Tensor, Tensor]]
    rows_in_fp8: Callable[[Tensor, float, float], tuple[Tensor, Tensor]]


_off: set[str] = set() if os.environ.get("RECTIFLUX_FUSED") == "1" else {"all"}
"""The kernels that failed here, by name; `all` where there is no Triton, or nobody wants it."""


def serves(x: Tensor) -> bool:
    """Whether kernels may work on x at all. For a tensor on a CPU this is one look at it."""
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.dtype in DTYPES
        and "all" not in _off
    )


def _or_none(
    launched: Callable[Concatenate[Launches, Arguments], Result | None],
) -> Callable[Arguments, Result | None]:
    """The function with the launches as its first argument; None for good once it has failed."""
    name = launched.__name__

    @functools.wraps(launched)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result | None:
        if name in _off or "all" in _off:
            return None
        try:
            from . import launch
        except Exception as error:  # a broken installation raises what it likes
            _off.add("all")
            log.info("no fused kernels, because Triton cannot be imported: %s", error)
            return None
        try:
            return launched(launch, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, an old driver, another Triton: torch does it instead
            _off.add(name)
            log.warning("the fused kernel %s failed, torch does its work from now on: %s", name, error)
            return None

    return guarded


@_or_none
def modulated_norm(launches: Launches, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor | None:
    """LayerNorm(x) * scale + shift for x [B, L, hidden] and modulations [B or 1, 1, hidden]."""
    if x.numel() < LARGE or not _fit(x, shift, scale):
        return None
    with torch.cuda.device_of(x):
        return launches.modulated_norm(x, shift, scale)


@_or_none
def gated_residual(launches: Launches, x: Tensor, gate: Tensor, y: Tensor) -> Tensor | None:
    """x + gate * y for x and y [B, L, hidden] and a gate [B or 1, 1, hidden]."""
    if x.numel() < LARGE or not _fit(x, gate, y):
        return None
    with torch.cuda.device_of(x):
        return launches.gated_residual(x, gate, y)


@_or_none
def residual_and_norm(
    launches: Launches, x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor] | None:
    """x + gate * y, and its modulated norm."""
    if x.numel() < LARGE or not _fit(x, gate, y, shift, scale):
        return None
    with torch.cuda.device_of(x):
        return launches.residual_and_norm(x, gate, y, shift, scale)


@_or_none
def queries_keys_values(
    launches: Launches,
    streams: Sequence[tuple[Tensor, Tensor, Tensor]],
    heads: int,
    rope: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v [B, K, L, D] of one stream or two: of each its qkv, and its norms' scales of q and of k.

    The rotary table has as many tokens as the streams together.
    """
    cos, sin = (table.flatten() for table in rope)
    first = streams[0][0]
    total = sum(qkv.shape[1] for qkv, *_ in streams)
    angles = total * (first.shape[-1] // 3 // heads // 2)
    if len(streams) > 2 or cos.numel() != angles or cos.dtype != torch.float32 or not _fit(first):
        return None
    if not all(_fit(first, qkv) and _fit(query, key) for qkv, query, key in streams):
        return None
    if any(scale.device != first.device for _, *scales in streams for scale in scales):
        return None
    with torch.cuda.device_of(first):
        return launches.queries_keys_values(streams, heads, cos, sin)


@_or_none
def beside_gelu(launches: Launches, attn: Tensor, y: Tensor, plain: int) -> Tensor | None:
    """attn [B, L, C] and behind it GELU (tanh) of y[..., plain:], [B, L, C + M]."""
    if not _fit(attn, y):
        return None
    with torch.cuda.device_of(attn):
        return launches.beside_gelu(attn, y, plain)


@_or_none
def rows_in_fp8(
    launches: Launches, x: Tensor, largest: float, smallest: float
) -> tuple[Tensor, Tensor] | None:
    """Codes [N, C] and scales [N, 1] of x [N, C], on a card that knows float8_e4m3fn.

    A scale is the row's largest magnitude, or `smallest` if that is larger, over the `largest` code.
    """
    if not _fit(x):
        return None
    with torch.cuda.device_of(x):
        return launches.rows_in_fp8(x, largest, smallest)


def _fit(x: Tensor, *others: Tensor) -> bool:
    """Whether rows of numbers of one dtype lie on one device, each row in one piece."""
    return all(t.dtype == x.dtype and t.device == x.device and t.stride(-1) == 1 for t in (x, *others))
