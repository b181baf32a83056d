"""A transformer whose layers are packed for the processor (packed.py): those that every step uses.

What `prepare` uses once a run is left alone, so that `release_modulation` frees it as before; so are layers
that keep quantised weights, and models that are streamed, whose weights must stay pages of their file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .forms import Joined, Plain
from .layers import Modulation, SingleStreamBlock
from .packed import Int8Linear, PackedLinear, can_pack
from .stored import StoredLinear, computing_dtype, device_of
from .streaming import GIB
from .transformer import FluxTransformer

LINEAR = (nn.Linear, StoredLinear)
COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16)
SMALL = 1 << 16
"""Numbers of a weight below which packing gains nothing: the call costs more than the order saves."""
LARGE = 1 << 22
"""Numbers of a float32 weight from which on torch's own order, MKL's, is as quick (81 against 77 GFLOP/s)."""


def pack_weights(model: FluxTransformer) -> int:
    """Reorder the weights of every step's layers where that makes them faster; returns how many.

    The model computes what it did, to rounding. Layers are replaced one by one, each as soon as its weight is
    reordered, so that memory does not double. Does nothing where the processor or this torch cannot, and to a
    model that is streamed.
    """
    if model.streaming is not None:
        return 0

    def packed(layer: nn.Linear | StoredLinear, plain: int | None) -> nn.Module | None:
        if not isinstance(layer, nn.Linear):
            return None
        most = LARGE if computing_dtype(layer) == torch.float32 else math.inf
        if not SMALL <= layer.weight.numel() < most:
            return None
        if not can_pack(device_of(layer), computing_dtype(layer)):
            return None
        return PackedLinear(layer.weight, layer.bias, plain)

    return _replace(model, packed)


def quantise_to_int8(model: FluxTransformer, limit: int | None = None) -> int:
    """Multiply in int8 in the layers of every block (`Int8Linear`); returns how many.

    The first and the last layer, and those that keep quantised weights, stay as they are. Raises ValueError
    for a model that is streamed, and for one that would take more than `limit` bytes.
    """
    if model.streaming is not None:
        raise ValueError(
            "int8 needs a model that is not streamed, got one that is larger than its memory limit; "
            "raise memory_limit, or choose another weight_dtype"
        )

    needed = int8_bytes(model)
    if limit is not None and needed > limit:
        raise ValueError(
            f"in int8 the model takes {needed / GIB:.1f} GB, the memory limit is {limit / GIB:.1f} GB; raise "
            "memory_limit, or choose auto as weight_dtype, which streams the model"
        )

    def quantised(layer: nn.Linear | StoredLinear, plain: int | None) -> nn.Module | None:
        if not _can_quantise(layer):
            return None
        numbers = layer.weight if isinstance(layer, nn.Linear) else layer.dense_weight(layer.dtype)
        return Int8Linear(numbers, layer.bias, plain)

    return _replace(model, quantised, ends=False)


def int8_bytes(model: FluxTransformer) -> int:
    """Bytes of weights that `quantise_to_int8` would leave: a code for each number of what it quantises."""
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for _, _, layer in _layers(model, ends=False):
        if _can_quantise(layer):
            kept = layer.stored.nbytes if isinstance(layer, StoredLinear) else layer.weight.nbytes
            held += layer.in_features * layer.out_features - kept
    return held


def _replace(
    model: FluxTransformer,
    make: Callable[[nn.Linear | StoredLinear, int | None], nn.Module | None],
    ends: bool = True,
) -> int:
    """Put what `make` gives for each layer, and its number of outputs without GELU, in the layer's place."""
    count = 0
    for parent, name, layer in _layers(model, ends):
        first_single = isinstance(parent, SingleStreamBlock) and name == "linear1"
        new = make(layer, 3 * model.spec.hidden_size if first_single else None)
        if new is not None:
            setattr(parent, name, new.train(layer.training))
            count += 1
    return count


def _layers(model: FluxTransformer, ends: bool) -> Iterator[tuple[nn.Module, str, nn.Linear | StoredLinear]]:
    """The linear layers of every step, each with the module that it is a child of."""
    if ends:
        for parent, name in ((model, "img_in"), (model.final_layer, "linear")):
            if isinstance(layer := getattr(parent, name), LINEAR):
                yield parent, name, layer
    for block in [*model.double_blocks, *model.single_blocks]:
        yield from _inside(block)


def _inside(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | StoredLinear]]:
    for name, child in list(module.named_children()):
        if isinstance(child, LINEAR):
            yield module, name, child
        elif not isinstance(child, Modulation):
            yield from _inside(child)


def _can_quantise(layer: nn.Linear | StoredLinear) -> bool:
    """Whether a layer has numbers to quantise: is not kept quantised already, nor without memory."""
    if isinstance(layer, nn.Linear):
        return not layer.weight.is_meta
    stored = layer.stored
    parts = stored.parts if isinstance(stored, Joined) else (stored,)
    return all(isinstance(part, Plain) and part.values.dtype in COMPUTABLE for part in parts)
