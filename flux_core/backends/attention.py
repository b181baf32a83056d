"""Attention back ends: which one is chosen, and how it is called.

The choice depends on the GPU, the dtype, the head dim and the model's setting (`use_attention`):

  setting      what computes                                       where
  auto         flash3 or cudnn on an NVIDIA H100 or H200, cudnn on a B200, else torch
  torch        torch's own order: on a GPU FlashAttention-2, then  everywhere
               memory-efficient attention
  cudnn, flash, efficient   that one first, through torch          NVIDIA GPUs, fp16 and bf16
  flash3       FlashAttention-3 (package flash_attn_interface;     capability 9.0, fp16 and bf16
               Shah et al., arXiv:2407.08608)
  sage         SageAttention (package sageattention; Zhang et al., capability 8.0 and up, fp16 and bf16
               arXiv:2410.02367): queries and keys in int8

On some CPUs torch's own is replaced by cpu_attention.py. All but sage are exact to rounding; sage changes the
image, so it is used only on request: for a model, or by RECTIFLUX_ATTENTION=sage in the environment, which
replaces auto wherever it can run. What torch cannot compute by the first back end it computes by the next,
and at last by plain matmuls. None of the packages is required, and each is imported only when it may be used.
With an attention bias torch computes, in its own order.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..model.spec import FluxSpec

_CUDNN, _FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
_EFFICIENT, _MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
ORDERS = {
    "cudnn": [_CUDNN, _FLASH, _EFFICIENT, _MATH],
    "flash": [_FLASH, _EFFICIENT, _CUDNN, _MATH],
    "efficient": [_EFFICIENT, _FLASH, _CUDNN, _MATH],
}
"""What torch tries, in order, until one can compute it."""

PACKAGES = {"flash3": ("flash_attn_interface", "flash_attn_func"), "sage": ("sageattention", "sageattn")}
"""Back ends that are packages of their own: module and function."""

LARGEST_HEAD = {"flash3": 256, "sage": 128}
"""The largest head dim that a package takes."""

LABELS = {
    "torch": "torch",
    "cudnn": "cuDNN through torch",
    "flash": "FlashAttention-2 through torch",
    "efficient": "memory-efficient attention through torch",
    "flash3": "FlashAttention-3",
    "sage": "SageAttention, queries and keys in int8",
}
"""Each back end's name in reports."""

ATTENTIONS = ("auto", *LABELS)
"""The settings of a model."""

Capability = tuple[int, int] | None
"""An NVIDIA GPU's compute capability; None for any other device."""

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v [B, K, L, D]) -> [B, L, K D]."""

_HALF = (torch.float16, torch.bfloat16)
_HAS_PRIORITY = "set_priority" in inspect.signature(sdpa_kernel).parameters  # torch 2.6 and up


class Attending(Protocol):
    """A model whose blocks attend: a FluxTransformer."""

    spec: FluxSpec
    attention: str

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


# The choice


def choose(
    setting: str, capability: Capability, packages: tuple[str, ...], dtype: torch.dtype, head_dim: int
) -> str:
    """The back end, a key of LABELS, for one of ATTENTIONS; `packages` are the installed keys of PACKAGES.

    Raises ValueError for another setting, and where what is named explicitly cannot run. The FlashAttention-3
    paper has it ahead of cuDNN (figure 5), both far ahead of FlashAttention-2, on capability 9.0.
    """
    half = capability is not None and dtype in _HALF and head_dim % 8 == 0
    if setting == "auto":
        if not half or capability is None or capability[0] not in (9, 10):
            return "torch"
        return "flash3" if "flash3" in packages and _fits("flash3", capability, head_dim) else "cudnn"
    if setting not in ATTENTIONS:
        raise ValueError(f"attention is one of {', '.join(ATTENTIONS)}, got {setting!r}")
    if setting in PACKAGES and setting not in packages:
        raise ValueError(
            f"attention {setting} needs the package {PACKAGES[setting][0]}, which cannot be imported; "
            "install it, or choose auto"
        )
    if setting != "torch" and not (half and _fits(setting, capability, head_dim)):
        where = "another device" if capability is None else f"capability {capability[0]}.{capability[1]}"
        raise ValueError(
            f"attention {setting} needs {_needs(setting)}, got {dtype} and heads of {head_dim} on {where}; "
            "choose auto, or another weight_dtype"
        )
    return setting


def _fits(backend: str, capability: Capability, head_dim: int) -> bool:
    """Whether a back end can run on a GPU with a head dim."""
    if capability is None or head_dim > LARGEST_HEAD.get(backend, head_dim):
        return False
    return capability == (9, 0) if backend == "flash3" else capability >= (8, 0) or backend != "sage"


def _needs(backend: str) -> str:
    """The requirements of a back end, in words."""
    gpus = {"flash3": "an NVIDIA GPU of capability 9.0", "sage": "an NVIDIA GPU of capability 8.0 or more"}
    most = f" of at most {LARGEST_HEAD[backend]}" if backend in LARGEST_HEAD else ""
    return f"{gpus.get(backend, 'an NVIDIA GPU')}, fp16 or bf16, and heads{most} in multiples of 8"


def chosen(setting: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """`choose` for a device, by what can be imported. Raises what it raises."""
    if setting in ("auto", "torch") and device.type != "cuda":
        return "torch"
    able = capability_of(device)
    if setting == "auto":
        setting = default_setting(able, dtype, head_dim)
    may = (setting,) if setting in PACKAGES else ("flash3",) if setting == "auto" and able == (9, 0) else ()
    return choose(setting, able, tuple(name for name in may if importable(name)), dtype, head_dim)


def default_setting(capability: Capability, dtype: torch.dtype, head_dim: int) -> str:
    """RECTIFLUX_ATTENTION where that can run, else "auto". Raises ValueError for another than ATTENTIONS."""
    setting = os.environ.get("RECTIFLUX_ATTENTION", "auto")
    if setting not in ATTENTIONS:
        raise ValueError(f"RECTIFLUX_ATTENTION is one of {', '.join(ATTENTIONS)}, got {setting!r}")
    installed = setting not in PACKAGES or importable(setting)
    fits = dtype in _HALF and head_dim % 8 == 0 and _fits(setting, capability, head_dim)
    return setting if installed and (fits or setting == "torch") else "auto"


def capability_of(device: torch.device) -> Capability:
    """The compute capability of an NVIDIA GPU, None for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def importable(backend: str) -> bool:
    """Whether a back end's package can be imported."""
    return _function(backend) is not None


@functools.cache
def _function(backend: str) -> Callable[..., Any] | None:
    """A back end's function, or None where its package is missing or broken."""
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


# Computing it


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "torch",
    kernel: Kernel | None = None,
    fewest: int = 0,
) -> Tensor:
    """Scaled dot-product attention over [B, K, L, D], heads concatenated: [B, L, K D].

    By a `kernel` (see `kernel_of`) for at least `fewest` tokens and no bias, else by torch, in the order that
    `backend` has in ORDERS.
    """
    if kernel is not None and bias is None and min(q.shape[-2], k.shape[-2]) >= fewest:
        return kernel(q, k, v)
    if bias is None and backend in ORDERS and _HAS_PRIORITY:
        with sdpa_kernel(ORDERS[backend], set_priority=True):
            joint = F.scaled_dot_product_attention(q, k, v)
    else:
        joint = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return joint.transpose(1, 2).flatten(2)


def kernel_of(backend: str, compiled: bool = False) -> Kernel | None:
    """The function of a back end that is a package, else None; `compiled`: as one operator of torch's."""
    if backend not in PACKAGES:
        return None
    return functools.partial(_tokens_first, _operator(backend) if compiled else _EAGER[backend])


def _tokens_first(function: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).flatten(2)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By flash_attn_interface.flash_attn_func, all [B, L, K, D]; some of its builds return (out, lse)."""
    result = _imported("flash3")(q, k, v, softmax_scale=q.shape[-1] ** -0.5)
    return (result[0] if isinstance(result, tuple) else result).contiguous()  # as registered for compilers


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By sageattention.sageattn, all [B, L, K, D], which it calls NHD; it pads head dims other than 64 and
    128, and what it returns of those is a slice of a larger tensor.
    """
    result = _imported("sage")(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=q.shape[-1] ** -0.5)
    return result.contiguous()


def _imported(backend: str) -> Callable[..., Any]:
    function = _function(backend)
    if function is None:
        raise RuntimeError(f"{PACKAGES[backend][0]} cannot be imported; choose another attention")
    return function


_EAGER = {"flash3": _flash3, "sage": _sage}


@functools.cache
def _operator(name: str) -> Callable[..., Tensor]:
    """A package's function as an operator of torch's, which compilers do not look into."""
    operator = torch.library.custom_op(
        f"rectiflux::{name}_attention",
        _EAGER[name],
        mutates_args=(),
        schema="(Tensor q, Tensor k, Tensor v) -> Tensor",
    )
    operator.register_fake(lambda q, k, v: q.new_empty(q.shape))
    return operator


# A model's setting


def use_attention(model: Attending, setting: str) -> None:
    """Have a model's blocks attend by one of ATTENTIONS from now on; its copies (with_lora) are separate.

    Raises ValueError for another setting, and where what is named explicitly cannot run on the model's device
    and in its dtype.
    """
    chosen(setting, model.device, model.dtype, model.spec.head_dim)
    model.attention = setting


def attention_backend_name(model: Attending, device: torch.device | None = None) -> str:
    """What a model attends by, on its device or another, in a few words: "cuDNN through torch"."""
    return LABELS[chosen(model.attention, device or model.device, model.dtype, model.spec.head_dim)]
