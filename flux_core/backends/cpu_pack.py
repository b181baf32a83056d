"""Packs a transformer's weights for the CPU (cpu_linear.py), and finds and replaces a model's linear layers.

Packed are the layers that every step uses. Those that `prepare` uses once per run stay as they are, and so do
quantized layers and streamed models, whose weights stay memory-mapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from ..model.layers import Modulation, SingleStreamBlock
from ..model.transformer import FluxTransformer
from ..quant.linear import QuantizedLinear, compute_dtype, device_of
from .cpu_info import has_avx512, mkl_is_slow
from .cpu_linear import PackedLinear
from .onednn import can_pack

LINEAR = (nn.Linear, QuantizedLinear)
Place = tuple[nn.Module, str, "nn.Linear | QuantizedLinear"]
"""A linear layer with its parent module and its name there."""

Progress = Callable[[int, int], None]
"""Called with the number of weights processed so far, and of all."""

Sizes = tuple[float, float]
"""A range of weight sizes in elements: the smallest, and the smallest that is too large."""

PACKED_SIZES: dict[tuple[torch.dtype, str], Sizes] = {
    (torch.bfloat16, "any"): (1 << 16, math.inf),
    (torch.float32, "AVX2"): (1 << 18, math.inf),
    (torch.float32, "AVX-512"): (1 << 18, 1 << 22),
    (torch.float32, "AVX-512, slow MKL"): (1 << 15, math.inf),
}
"""Sizes of the weights that packing makes faster, by dtype and CPU.

Below, the call costs more than the layout saves. In float32, torch's own layers use MKL, and up to
192 x 1344, the miniature's largest weight, both take the same time at 96 tokens; from 2^22 elements on, MKL
is as fast with AVX-512 (81 against 77 GFLOP/s). With AVX2 alone (AMD EPYC, Zen 3) oneDNN gives 130 against
93 GFLOP/s at 256 tokens, 122 against 98 at 768 and 117 against 106 at 1536. Beside a slow MKL, 192 x 192 at
96 tokens takes 39 against 67 us.
"""


def packed_sizes(dtype: torch.dtype) -> Sizes:
    """The sizes of the weights in `dtype` that packing makes faster on this CPU."""
    if dtype != torch.float32:
        return PACKED_SIZES[torch.bfloat16, "any"]
    cpu = "AVX-512, slow MKL" if mkl_is_slow() else "AVX-512" if has_avx512() else "AVX2"
    return PACKED_SIZES[torch.float32, cpu]


def pack_weights(model: FluxTransformer, on_progress: Progress | None = None) -> int:
    """Pack the weights of every step's layers where that makes them faster; returns how many.

    Outputs change within rounding. Layers are replaced one by one, each as soon as its weight is packed, so
    that memory does not double. Returns 0 where this CPU or torch cannot pack, and for streamed models.
    """
    if model.streaming is not None:
        return 0

    def packed(layer: nn.Linear | QuantizedLinear, qkv_dim: int | None) -> nn.Module | None:
        dtype = compute_dtype(layer)
        if not isinstance(layer, nn.Linear) or not can_pack(device_of(layer), dtype):
            return None
        smallest, too_large = packed_sizes(dtype)
        if not smallest <= layer.weight.numel() < too_large:
            return None
        return PackedLinear(layer.weight, layer.bias, qkv_dim)

    return replace_layers(model, packed, layers_of(model), on_progress)


def replace_layers(
    model: FluxTransformer,
    make: Callable[[nn.Linear | QuantizedLinear, int | None], nn.Module | None],
    layers: Iterable[Place],
    on_progress: Progress | None,
) -> int:
    """Replace each layer by `make(layer, qkv_dim)` unless that is None; returns how many.

    `qkv_dim` is the number of outputs of a single block's `linear1` that no GELU follows, else None.
    """
    left = list(layers)[::-1]
    total = sum(layer.in_features * layer.out_features for *_, layer in left)
    count = done = 0
    while left:
        parent, name, layer = left.pop()  # what the list refers to stays in memory
        split = isinstance(parent, SingleStreamBlock) and name == "linear1"
        new = make(layer, 3 * model.spec.hidden_size if split else None)
        if new is not None:
            setattr(parent, name, new.train(layer.training))
            count += 1
        done += layer.in_features * layer.out_features
        if on_progress is not None:
            on_progress(done, total)
    return count


def layers_of(model: FluxTransformer, ends: bool = True) -> Iterator[Place]:
    """The linear layers of every step, with or without the model's first and last layer."""
    if ends:
        for parent, name in ((model, "img_in"), (model.final_layer, "linear")):
            if isinstance(layer := getattr(parent, name), LINEAR):
                yield parent, name, layer
    for block in [*model.double_blocks, *model.single_blocks]:
        yield from layers_inside(block)


def layers_inside(module: nn.Module, modulations: bool = False) -> Iterator[Place]:
    """The linear layers of a block, with or without those of its modulations."""
    for name, child in list(module.named_children()):
        if isinstance(child, LINEAR):
            yield module, name, child
        elif modulations or not isinstance(child, Modulation):
            yield from layers_inside(child, modulations)
