"""Which operations a model's blocks call: by device, dtype, attention back end and whether gradients are on.

gradients on         the reference (model/ops.py); on a CPU attention as a softmax between two matmuls
eager, CPU           norm, RoPE and GELU in few passes over memory (eager_ops.py), cpu_attention.py
eager, GPU           the same norm and RoPE, the chosen attention back end (attention.py)
compiled             the reference, which the compiler fuses, with attention as one operator
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.ops import REFERENCE, Ops
from . import cpu_attention, eager_ops
from .attention import attend, chosen, kernel_of

if TYPE_CHECKING:
    from ..model.transformer import FluxTransformer


def ops_for(model: FluxTransformer, device: torch.device, compiled: bool) -> Ops:
    """The operations for a model that computes on `device`.

    Within another program's torch.compile, as by ComfyUI's TorchCompileModel, they are those of a compiled
    model: with the eager ones of a CPU, inductor fails on a view of the wrong shape.
    Raises ValueError where the attention back end that the model names cannot run there.
    """
    if torch.is_grad_enabled():
        return DIFFERENTIABLE if device.type == "cpu" else REFERENCE
    backend = chosen(model.attention, device, model.dtype, model.spec.head_dim)
    on_cpu = device.type == "cpu" and cpu_attention.is_quicker(model.dtype)
    return table(backend, device.type, compiled or torch.compiler.is_compiling(), on_cpu)


@functools.cache
def table(backend: str, device_type: str, compiled: bool = False, on_cpu: bool = False) -> Ops:
    """The table for a back end of attention.py on a type of device.

    `on_cpu`: cpu_attention.py is quicker here than torch.
    """
    kernel, fewest = kernel_of(backend, compiled), 0
    if on_cpu:
        kernel, fewest = cpu_attention.operator() if compiled else cpu_attention.attend, cpu_attention.FEWEST
    attention: Any = functools.partial(attend, backend=backend, kernel=kernel, fewest=fewest)
    if compiled:
        base = eager_ops.COMPILED
    else:
        base = {"cpu": eager_ops.CPU, "cuda": eager_ops.GPU}.get(device_type, REFERENCE)
    return replace(base, attention=attention)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention whose gradient is quick on a CPU: torch's fused backward takes six times as long in bf16."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    joint = torch.softmax(scores, dim=-1).to(v.dtype) @ v
    return joint.transpose(1, 2).flatten(2)


DIFFERENTIABLE = replace(REFERENCE, attention=_softmax_attention)
"""The reference with attention that trains quickly on a CPU."""
