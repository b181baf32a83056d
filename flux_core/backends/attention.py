"""Attention through the best backend that is present: which one is chosen, and how it is called.

The choice depends on the card, the dtype and the head dim, and on what the model was told (`use_attention`):

  asked       what computes                                        where
  auto        flash3 or cudnn on an NVIDIA H100 or H200, cudnn on a B200, else torch
  torch       the order that torch has itself: on a card           everywhere
              FlashAttention-2, then memory-efficient attention
  cudnn, flash, efficient   that one first, through torch          NVIDIA cards, fp16 and bf16
  flash3      FlashAttention-3 (package flash_attn_interface;      capability 9.0, fp16 and bf16
              Shah et al., arXiv:2407.08608)
  sage        SageAttention (package sageattention; Zhang et al.,  capability 8.0 and up, fp16 and bf16
              arXiv:2410.02367): queries and keys in int8

On some processors torch's own is replaced by ours, attention_cpu.py. All but sage are exact to rounding. sage
changes the picture, so it is used only where it is asked for: of a model, or by RECTIFLUX_ATTENTION=sage in
the environment, which stands in for auto wherever it can be. What torch cannot do by the first backend it
does by the next, and at last by plain products: that never fails. None of the packages is needed, and each
is imported only when it may be used.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..model.spec import FluxSpec
from . import cpu_attention as attention_cpu

_CUDNN, _FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
_EFFICIENT, _PLAIN = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
ORDERS = {
    "cudnn": [_CUDNN, _FLASH, _EFFICIENT, _PLAIN],
    "flash": [_FLASH, _EFFICIENT, _CUDNN, _PLAIN],
    "efficient": [_EFFICIENT, _FLASH, _CUDNN, _PLAIN],
}
"""What torch tries, one after the other, until one can."""

PACKAGES = {"flash3": ("flash_attn_interface", "flash_attn_func"), "sage": ("sageattention", "sageattn")}
"""Backends that are packages of their own: module and function."""

LARGEST_HEAD = {"flash3": 256, "sage": 128}
"""The largest head dim that a package takes."""

TOLD = {
    "torch": "torch",
    "cudnn": "cuDNN through torch",
    "flash": "FlashAttention-2 through torch",
    "efficient": "memory-efficient attention through torch",
    "flash3": "FlashAttention-3",
    "sage": "SageAttention, queries and keys in int8",
}
"""What is told of each backend."""

ATTENTIONS = ("auto", *TOLD)
"""What a model can be told to attend by."""

PREFERRED = os.environ.get("RECTIFLUX_ATTENTION", "auto")
"""One of ATTENTIONS, which stands in for auto where it can be."""

Capability = tuple[int, int] | None
"""An NVIDIA card's compute capability; None for any other device."""

_HALF = (torch.float16, torch.bfloat16)
_HAS_PRIORITY = "set_priority" in inspect.signature(sdpa_kernel).parameters  # torch 2.6 and up


class Attending(Protocol):
    """A model with blocks that attend: a FluxTransformer."""

    spec: FluxSpec

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def modules(self) -> Iterator[nn.Module]: ...


# The choice


def choose(
    asked: str, capability: Capability, packages: tuple[str, ...], dtype: torch.dtype, head_dim: int
) -> str:
    """The backend, a key of TOLD, for one of ATTENTIONS; `packages` are the keys of PACKAGES that are there.

    Raises ValueError for another name, and where what is asked for by name cannot be. The FlashAttention-3
    paper has it ahead of cuDNN (figure 5), both far ahead of FlashAttention-2, on capability 9.0.
    """
    half = capability is not None and dtype in _HALF and head_dim % 8 == 0
    if asked == "auto":
        if not half or capability is None or capability[0] not in (9, 10):
            return "torch"
        return "flash3" if "flash3" in packages and _fits("flash3", capability, head_dim) else "cudnn"
    if asked not in ATTENTIONS:
        raise ValueError(f"attention is one of {', '.join(ATTENTIONS)}, got {asked!r}")
    if asked in PACKAGES and asked not in packages:
        raise ValueError(
            f"attention {asked} needs the package {PACKAGES[asked][0]}, which cannot be imported; "
            "install it, or choose auto"
        )
    if asked != "torch" and not (half and _fits(asked, capability, head_dim)):
        where = "another device" if capability is None else f"capability {capability[0]}.{capability[1]}"
        raise ValueError(
            f"attention {asked} needs {_needs(asked)}, got {dtype} and heads of {head_dim} on {where}; "
            "choose auto, or another weight_dtype"
        )
    return asked


def _fits(backend: str, capability: Capability, head_dim: int) -> bool:
    """Whether a card and a head dim are such as a backend can do."""
    if capability is None or head_dim > LARGEST_HEAD.get(backend, head_dim):
        return False
    return capability == (9, 0) if backend == "flash3" else capability >= (8, 0) or backend != "sage"


def _needs(backend: str) -> str:
    """What a backend needs, in words."""
    cards = {"flash3": "an NVIDIA card of capability 9.0", "sage": "an NVIDIA card of capability 8.0 or more"}
    most = f" of at most {LARGEST_HEAD[backend]}" if backend in LARGEST_HEAD else ""
    return f"{cards.get(backend, 'an NVIDIA card')}, fp16 or bf16, and heads{most} in multiples of 8"


def chosen(asked: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """`choose` for a device, by what can be imported. Raises what it raises."""
    if asked in ("auto", "torch") and device.type != "cuda":
        return "torch"
    able = capability_of(device)
    if asked == "auto":
        asked = preferred(able, dtype, head_dim)
    may = (asked,) if asked in PACKAGES else ("flash3",) if asked == "auto" and able == (9, 0) else ()
    return choose(asked, able, tuple(name for name in may if importable(name)), dtype, head_dim)


def preferred(capability: Capability, dtype: torch.dtype, head_dim: int) -> str:
    """PREFERRED where it can be, else "auto". Raises ValueError when it is none of ATTENTIONS."""
    if PREFERRED not in ATTENTIONS:
        raise ValueError(f"RECTIFLUX_ATTENTION is one of {', '.join(ATTENTIONS)}, got {PREFERRED!r}")
    there = PREFERRED not in PACKAGES or importable(PREFERRED)
    fits = dtype in _HALF and head_dim % 8 == 0 and _fits(PREFERRED, capability, head_dim)
    return PREFERRED if there and (fits or PREFERRED == "torch") else "auto"


@torch.compiler.assume_constant_result
def capability_of(device: torch.device) -> Capability:
    """The compute capability of an NVIDIA card, None for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def importable(backend: str) -> bool:
    """Whether a backend's package can be imported."""
    return _function(backend) is not None


@functools.cache
def _function(backend: str) -> Callable[..., Any] | None:
    """A backend's function, or None where its package is missing or broken."""
    module, name = PACKAGES[backend]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == module:
            return None
        broken: Exception = error
    except Exception as error:  # a package built for another torch fails in ways of its own
        broken = error
    logging.getLogger(__name__).warning("%s is installed but cannot be imported: %s", module, broken)
    return None


# The product


def attention(q: Tensor, k: Tensor, v: Tensor, asked: str = "auto") -> Tensor:
    """Scaled dot-product attention over [B, K, L, D], heads joined again: [B, L, K D].

    By the backend that `chosen` gives for one of ATTENTIONS. Where a gradient is wanted, torch computes.
    """
    if q.requires_grad and q.device.type == "cpu":  # torch's fused backward takes 6 times as long in bf16
        joint = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1).to(v.dtype) @ v
        return joint.transpose(1, 2).flatten(2)
    if attention_cpu.serves(q, k, v):
        return attention_cpu.attend(q, k, v)
    backend = chosen(asked, q.device, q.dtype, q.shape[-1])
    if backend in PACKAGES and not q.requires_grad:
        tokens_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        by = _COMPILED if torch.compiler.is_compiling() else _EAGER
        return by[backend](*tokens_first).flatten(2)
    if backend in ORDERS and _HAS_PRIORITY:
        with sdpa_kernel(ORDERS[backend], set_priority=True):
            joint = F.scaled_dot_product_attention(q, k, v)
    else:
        joint = F.scaled_dot_product_attention(q, k, v)
    return joint.transpose(1, 2).flatten(2)  # without einops, which takes as long as a small model's product


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By flash_attn_interface.flash_attn_func, all [B, L, K, D]; some of its builds give (out, lse)."""
    result = _called("flash3")(q, k, v, softmax_scale=q.shape[-1] ** -0.5)
    return (result[0] if isinstance(result, tuple) else result).contiguous()  # as compilers are told


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By sageattention.sageattn, all [B, L, K, D], which it calls NHD; other head dims than 64 and 128 are
    padded in it, and what it returns of those is cut out of a larger tensor.
    """
    result = _called("sage")(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=q.shape[-1] ** -0.5)
    return result.contiguous()


def _called(backend: str) -> Callable[..., Any]:
    function = _function(backend)
    assert function is not None  # `choose` saw to it
    return function


def _as_operator(name: str, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A function as an operator of torch's, which compilers leave whole: they cannot look into a kernel."""
    operator = torch.library.custom_op(
        f"rectiflux::{name}", function, mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor"
    )
    operator.register_fake(lambda q, k, v: q.new_empty(q.shape))
    return operator


_EAGER = {"flash3": _flash3, "sage": _sage}
_COMPILED = {name: _as_operator(f"{name}_attention", function) for name, function in _EAGER.items()}


# A model's setting


def use_attention(model: Attending, asked: str) -> None:
    """Have a model's blocks attend by one of ATTENTIONS from now on; its copies (with_lora) are others.

    Raises ValueError for another name, and where what is asked for by name cannot be on the model's device
    and in its dtype.
    """
    chosen(asked, model.device, model.dtype, model.spec.head_dim)
    for block in _blocks(model):
        block.attention_by = asked


def attention_told(model: Attending, device: torch.device | None = None) -> str:
    """What a model attends by, on its device or another, in a few words: "cuDNN through torch"."""
    asked = next((block.attention_by for block in _blocks(model)), "auto")
    return TOLD[chosen(asked, device or model.device, model.dtype, model.spec.head_dim)]


def _blocks(model: Attending) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "attention_by"))
