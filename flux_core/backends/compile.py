"""The blocks of a transformer through torch.compile, one compilation for all blocks of a kind.

Nearly all of a step's time is spent in the blocks, and they are alike: compiled one by one ("regional
compilation") they take seconds where the whole model takes minutes, and the loop around them, with its hooks,
step cache and streaming, stays as it is. A block's weights, its modulation and its tokens are inputs of the
compiled code, and the number of tokens is dynamic: another block, step, prompt, seed, size, or strength of a
LoRA runs the same code. What computes differently is compiled again: layers in another format or with an
adapter of another rank (or a rotation, OFT or BOFT, at another strength), a batch against a single image,
another dtype or device.
"""

from __future__ import annotations

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
from ..model.layers import Shared
from ..model.ops import Ops, Rope
from ..model.transformer import FluxTransformer

LIMIT = 64
"""Compilations that are kept of all models; torch's own limit, 8, is two models with their LoRAs."""

TORCH_MODES = {"default": "default", "cuda graphs": "reduce-overhead"}
MODES = tuple(TORCH_MODES)
"""How blocks are compiled: kernel by kernel, or each block's kernels recorded as a CUDA graph by torch."""


def compile_blocks(model: FluxTransformer, mode: str = "default") -> FluxTransformer:
    """A copy of the model, sharing its weights, whose blocks are compiled when they first run.

    `mode` is one of MODES. LoRAs, step cache and streaming may be applied before or after. Raises ValueError
    for another mode, for CUDA graphs on another device, and where torch.compile cannot work.
    """
    check(model.device, mode)
    twin = shallow_copy(model)
    twin.runner = CompiledBlocks(mode)
    return twin


def check(device: torch.device, mode: str = "default") -> None:
    """Raise ValueError where torch.compile lacks what it needs for a device: it would fail deep inside."""
    if mode not in MODES:
        raise ValueError(f"blocks are compiled in the mode {' or '.join(MODES)}, got {mode!r}")
    if mode != "default" and device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, this model computes on {device.type}; use default")
    missing = _missing(device)
    if missing is not None:
        raise ValueError(f"{missing}, or go without compiling")


def _missing(device: torch.device) -> str | None:
    """What torch.compile lacks for a device, in half a sentence."""
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
    """The compilers of which torch calls the first that exists, as torch._inductor and Triton look."""
    windows = sys.platform == "win32"
    if device.type == "cuda":
        named = os.environ.get("CC")
        return () if windows else (named,) if named else ("gcc", "clang")  # Triton for Windows has its own
    usual = "cl" if windows else "clang++" if sys.platform == "darwin" else "g++"
    return (os.environ.get("CXX", usual),)


class CompiledBlocks:
    """Runs blocks through torch.compile: a `runner` of FluxTransformer. Copies of a model share it.

    Only the sizes that `_dynamic` marks are dynamic. Blocks with attention hooks, which are Python of their
    own, run eagerly.
    """

    def __init__(self, mode: str = "default") -> None:
        self.mode = mode
        self._functions: dict[Ops, Callable[..., Any]] = {}

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], shared: Shared) -> Any:
        """The outputs of a block for its inputs: token streams [B, L, hidden] and modulations."""
        if shared.hooks is not None:
            return block(*inputs, shared)
        bias = None if shared.bias is None else shared.bias.contiguous()
        return self._function(shared.ops)(block, _dynamic(shared.rope), bias, *map(_dynamic, inputs))

    def _function(self, ops: Ops) -> Callable[..., Any]:
        if ops not in self._functions:

            def call(block: nn.Module, rope: Rope, bias: Tensor | None, *inputs: Any) -> Any:
                return block(*inputs, Shared(rope, ops, bias))

            options: dict[str, Any] = {} if self.mode == "default" else {"mode": TORCH_MODES[self.mode]}
            if "recompile_limit" in inspect.signature(torch.compile).parameters:  # not in older torch
                options["recompile_limit"] = LIMIT
            compiled = torch.compile(call, dynamic=False, **options)
            self._functions[ops] = compiled if self.mode == "default" else _copied(compiled)
        return self._functions[ops]

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledBlocks:
        return self


def _copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its outputs copied out of the CUDA graph's memory, which the next call overwrites."""

    def call(*inputs: Any) -> Any:
        out = function(*inputs)
        return out.clone() if isinstance(out, Tensor) else tuple(part.clone() for part in out)

    return call


def _dynamic(value: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """A block's input with the sizes that change from call to call marked as dynamic: batch and tokens.

    A size of 1 is never marked: torch specializes it in any case.
    """
    if isinstance(value, Tensor):  # a stream; an expanded text has other strides than the next block's
        return _marked(value.contiguous(), 0, 1)
    for tensor in value:  # modulations [B, 1, hidden], or a rotary table [1, 1, L, D/2, 1]
        _marked(tensor, *((2,) if tensor.ndim == 5 else (0, 1)))
    return value


def _marked(tensor: Tensor, *dims: int) -> Tensor:
    import torch._dynamo  # imported here, because it takes seconds

    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor
