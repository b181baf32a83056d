"""A transformer whose layers are packed for the processor (packed.py) or quantised (also fp8.py).

Packed are those that every step uses. What `prepare` uses once a run is left alone, but for fp8; so are
layers that keep quantised weights, and models that are streamed, whose weights must stay pages of their file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from ..model.layers import Modulation, SingleStreamBlock
from ..model.transformer import FluxTransformer
from ..quant.linear import QuantizedLinear, compute_dtype, device_of
from .cpu_linear import PackedLinear, can_pack, has_avx512, mkl_is_slow

LINEAR = (nn.Linear, QuantizedLinear)
Place = tuple[nn.Module, str, "nn.Linear | QuantizedLinear"]
"""A linear layer with the module that it is a child of, and its name there."""

COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16)
Progress = Callable[[int, int], None]
SMALL = 1 << 16
"""Numbers of a weight below which packing gains nothing: the call costs more than the order saves."""
SMALL_IN_FLOAT32 = 1 << 18
"""The same in float32, where torch's own order is MKL's. Up to 192 x 1344, the miniature's largest, both take
the same time at 96 tokens, and a recorded step (recorder.py) has to copy what oneDNN gives.
"""
LARGE = 1 << 22
"""Numbers of a float32 weight from which on torch's own order, MKL's, is as quick with AVX-512.

There 81 against 77 GFLOP/s. With AVX2 alone (AMD EPYC, Zen 3) oneDNN's order gives 130 against 93 at 256
tokens, 122 against 98 at 768, and 117 against 106 at 1536, so that weights of every size are packed.
"""
SMALL_BESIDE_SLOW_MKL = 1 << 15
"""The same as SMALL in float32 where `mkl_is_slow`: 192 x 192 at 96 tokens takes 39 against 67 us."""


def pack_weights(model: FluxTransformer, on_progress: Progress | None = None) -> int:
    """Reorder the weights of every step's layers where that makes them faster; returns how many.

    The model computes what it did, to rounding. Layers are replaced one by one, each as soon as its weight is
    reordered, so that memory does not double; `on_progress` hears how many of their numbers are done, and of
    how many. Does nothing where the processor or this torch cannot, and to a model that is streamed.
    """
    if model.streaming is not None:
        return 0

    def packed(layer: nn.Linear | QuantizedLinear, qkv_dim: int | None) -> nn.Module | None:
        if not isinstance(layer, nn.Linear):
            return None
        least, most = _sizes_that_gain(compute_dtype(layer))
        if not least <= layer.weight.numel() < most:
            return None
        if not can_pack(device_of(layer), compute_dtype(layer)):
            return None
        return PackedLinear(layer.weight, layer.bias, qkv_dim)

    return replace_layers(model, packed, layers_of(model), on_progress)


def _sizes_that_gain(dtype: torch.dtype) -> tuple[int, float]:
    """Numbers of a weight in `dtype` from which, and below which, its order makes it faster here."""
    if dtype != torch.float32:
        return SMALL, math.inf
    if mkl_is_slow():
        return SMALL_BESIDE_SLOW_MKL, math.inf
    return SMALL_IN_FLOAT32, LARGE if has_avx512() else math.inf


def replace_layers(
    model: FluxTransformer,
    make: Callable[[nn.Linear | QuantizedLinear, int | None], nn.Module | None],
    layers: Iterable[Place],
    on_progress: Progress | None,
) -> int:
    """Put what `make` gives for each layer, and its number of outputs without GELU, in the layer's place."""
    left = list(layers)[::-1]
    total = sum(layer.in_features * layer.out_features for *_, layer in left)
    count = done = 0
    while left:
        parent, name, layer = left.pop()  # while it is listed its weight stays
        first_single = isinstance(parent, SingleStreamBlock) and name == "linear1"
        new = make(layer, 3 * model.spec.hidden_size if first_single else None)
        if new is not None:
            setattr(parent, name, new.train(layer.training))
            count += 1
        done += layer.in_features * layer.out_features
        if on_progress is not None:
            on_progress(done, total)
    return count


def layers_of(model: FluxTransformer, ends: bool = True) -> Iterator[Place]:
    """The linear layers of every step."""
    if ends:
        for parent, name in ((model, "img_in"), (model.final_layer, "linear")):
            if isinstance(layer := getattr(parent, name), LINEAR):
                yield parent, name, layer
    for block in [*model.double_blocks, *model.single_blocks]:
        yield from inside(block)


def inside(module: nn.Module, modulations: bool = False) -> Iterator[Place]:
    for name, child in list(module.named_children()):
        if isinstance(child, LINEAR):
            yield module, name, child
        elif modulations or not isinstance(child, Modulation):
            yield from inside(child, modulations)
