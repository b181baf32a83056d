"""The blocks of a transformer through torch.compile, one compilation for all blocks of a kind.

Nearly all of a step's time is spent in the blocks, and they are alike: compiled one by one ("regional
compilation") they take seconds where the whole model takes minutes, and what stands between them, caching and
streaming among it, stays as it is. A block's weights, its modulation and its tokens are inputs of the
compiled code, and the number of tokens is open: another block, step, prompt, seed, size, or strength of a
LoRA runs the same code. Compiled anew is what computes differently: layers in another form or with an adapter
of another rank (or a rotation, OFT or BOFT, at another strength), a batch against a single picture, another
dtype or device.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lora.attach import shallow_copy
from ..model.transformer import FluxTransformer

LIMIT = 64
"""Compilations that are kept of all models; torch's own limit, 8, is two models with their LoRAs."""


def compile_blocks(model: FluxTransformer) -> FluxTransformer:
    """A copy of the model, sharing its numbers, whose blocks are compiled when they first run.

    Nothing that is done to the copy undoes it: LoRAs, caching and streaming may come before or after. Raises
    ValueError where torch.compile cannot work.
    """
    check(model.device)
    twin = shallow_copy(model)
    twin.runner = run_compiled
    return twin


def check(device: torch.device) -> None:
    """Raise ValueError where torch.compile lacks what it needs for a device: it would fail deep inside."""
    why = _why_not(device)
    if why is not None:
        raise ValueError(f"{why}, or go without compiling")


def _why_not(device: torch.device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return (
            f"blocks are compiled for a CPU or a CUDA device, this model computes on {device.type}; move it"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "compiling for a CUDA device needs the package triton; install it (triton-windows on Windows)"
    compilers = _compilers(device)
    if compilers and not any(shutil.which(name) for name in compilers):
        return f"compiling needs {' or '.join(compilers)} on the PATH, found none; install a C++ compiler"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"compiling needs Python's headers, found no {header}; install them (python3-dev on Debian)"
    return None


def _compilers(device: torch.device) -> tuple[str, ...]:
    """The compilers of which torch calls the first that is there, as torch._inductor and Triton look."""
    windows = sys.platform == "win32"
    if device.type == "cuda":
        named = os.environ.get("CC")
        return () if windows else (named,) if named else ("gcc", "clang")  # Triton for Windows has its own
    usual = "cl" if windows else "clang++" if sys.platform == "darwin" else "g++"
    return (os.environ.get("CXX", usual),)


def run_compiled(block: nn.Module, *inputs: Tensor | tuple[Tensor, ...]) -> Any:
    """What block(*inputs) gives, by the code that is compiled for blocks of its kind.

    Inputs are token streams [B, L, hidden], modulations and the rotary table.
    """
    return _compiled()(block, *map(_open, inputs))


def _call(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """`_call` through torch.compile. Only the sizes that `_open` marks are dynamic."""
    limited = "recompile_limit" in inspect.signature(torch.compile).parameters  # not in older torch
    limit: Any = {"recompile_limit": LIMIT} if limited else {}
    return torch.compile(_call, dynamic=False, **limit)


def _open(value: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """A block's input with the sizes that change from call to call marked: batch and tokens.

    A size of 1 is never marked: torch compiles it as such in any case.
    """
    if isinstance(value, Tensor):  # a stream; an expanded text has other strides than the next block's
        return _marked(value.contiguous(), 0, 1)
    for tensor in value:
        _marked(tensor, *((2,) if tensor.ndim == 5 else (0,)))
    return value


def _marked(tensor: Tensor, *dims: int) -> Tensor:
    import torch._dynamo  # which takes seconds, and so is not brought along with this file

    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor
