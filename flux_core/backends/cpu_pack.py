"""A transformer whose layers are packed for the processor (packed.py) or quantised (also fp8.py).

Packed are those that every step uses. What `prepare` uses once a run is left alone, but for fp8; so are
layers that keep quantised weights, and models that are streamed, whose weights must stay pages of their file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from ..memory import GIB
from ..model.layers import Modulation, SingleStreamBlock
from ..model.transformer import FluxTransformer
from ..quant.formats import Joined, Plain, Scaled, has_fp8
from ..quant.linear import StoredLinear, computing_dtype, device_of
from .cpu_linear import Int8Linear, PackedLinear, can_pack, has_avx512, mkl_is_slow
from .fp8 import FP8, STEP, Fp8Linear, can_multiply, in_fp8

LINEAR = (nn.Linear, StoredLinear)
Place = tuple[nn.Module, str, "nn.Linear | StoredLinear"]
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

    def packed(layer: nn.Linear | StoredLinear, plain: int | None) -> nn.Module | None:
        if not isinstance(layer, nn.Linear):
            return None
        least, most = _sizes_that_gain(computing_dtype(layer))
        if not least <= layer.weight.numel() < most:
            return None
        if not can_pack(device_of(layer), computing_dtype(layer)):
            return None
        return PackedLinear(layer.weight, layer.bias, plain)

    return _replace(model, packed, _layers(model), on_progress)


def _sizes_that_gain(dtype: torch.dtype) -> tuple[int, float]:
    """Numbers of a weight in `dtype` from which, and below which, its order makes it faster here."""
    if dtype != torch.float32:
        return SMALL, math.inf
    if mkl_is_slow():
        return SMALL_BESIDE_SLOW_MKL, math.inf
    return SMALL_IN_FLOAT32, LARGE if has_avx512() else math.inf


def quantise_to_int8(
    model: FluxTransformer, limit: int | None = None, on_progress: Progress | None = None
) -> int:
    """Multiply in int8 in the layers of every block (`Int8Linear`); returns how many.

    The first and the last layer, and those that keep quantised weights, stay as they are. Raises ValueError
    for a model that is streamed, and for one that would take more than `limit` bytes. `on_progress` as in
    `pack_weights`.
    """
    _check(model, "int8", int8_bytes(model), limit)

    def quantised(layer: nn.Linear | StoredLinear, plain: int | None) -> nn.Module | None:
        if not _can_quantise(layer):
            return None
        numbers = layer.weight if isinstance(layer, nn.Linear) else layer.dense_weight(layer.dtype)
        return Int8Linear(numbers, layer.bias, plain)

    return _replace(model, quantised, _layers(model, ends=False), on_progress)


def quantise_to_fp8(
    model: FluxTransformer,
    device: torch.device | None = None,
    limit: int | None = None,
    on_progress: Progress | None = None,
    then: torch.device | None = None,
) -> int:
    """Multiply in fp8 in the blocks but the last (`Fp8Linear`), modulations too; returns in how many layers.

    With a device each weight is brought there to be quantised, and stays, or goes on to `then`. Files in
    float8_e4m3fn hand their codes over; layers that keep weights quantised in other ways stay as they are.
    Raises ValueError as `quantise_to_int8`.
    """
    _check(model, "fp8", fp8_bytes(model), limit)

    def quantised(layer: nn.Linear | StoredLinear, plain: int | None) -> nn.Module | None:
        if not _can_be_fp8(layer):
            return None
        where = device or device_of(layer)
        weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.stored
        return Fp8Linear(in_fp8(weight.to(where)), layer.bias, computing_dtype(layer)).to(then or where)

    can_multiply(device or model.device)  # a card is tried now, not when something compiles
    return _replace(model, quantised, _fp8_layers(model), on_progress)


def check_int8(device: torch.device) -> None:
    """Raise ValueError unless int8 is of use on the device that is to compute."""
    if device.type != "cpu":
        raise ValueError(
            f"weight_dtype int8 is for models that compute on a CPU, this one would on {device.type}; "
            "choose fp8, or auto"
        )


def check_fp8(device: torch.device) -> None:
    """Raise ValueError where the device that is to compute cannot hold fp8."""
    if not has_fp8(device):
        raise ValueError(
            f"weight_dtype fp8 is for devices that have 8-bit floats, and {device.type} has none; choose auto"
        )


def int8_bytes(model: FluxTransformer) -> int:
    """Bytes of weights that `quantise_to_int8` would leave: a code for each number of what it quantises."""
    layers = (layer for _, _, layer in _layers(model, ends=False) if _can_quantise(layer))
    return _bytes_with_codes(model, layers)


def fp8_bytes(model: FluxTransformer) -> int:
    """Bytes of weights that `quantise_to_fp8` would leave."""
    return _bytes_with_codes(model, (layer for _, _, layer in _fp8_layers(model) if _can_be_fp8(layer)))


def _bytes_with_codes(model: FluxTransformer, layers: Iterable[nn.Linear | StoredLinear]) -> int:
    """A model's bytes once these layers keep a byte for each number."""
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for layer in layers:
        kept = layer.stored.nbytes if isinstance(layer, StoredLinear) else layer.weight.nbytes
        held += layer.in_features * layer.out_features - kept
    return held


def _check(model: FluxTransformer, form: str, needed: int, limit: int | None) -> None:
    """Raise ValueError unless a model that takes `needed` bytes in a form can be brought into it."""
    if model.streaming is not None:
        raise ValueError(
            f"{form} needs a model that is not streamed, got one that is larger than its memory limit; "
            "raise memory_limit, or choose another weight_dtype"
        )
    if limit is not None and needed > limit:
        raise ValueError(
            f"in {form} the model takes {needed / GIB:.1f} GB, the memory limit is {limit / GIB:.1f} GB; "
            "raise memory_limit, or choose auto as weight_dtype, which streams the model"
        )


def _replace(
    model: FluxTransformer,
    make: Callable[[nn.Linear | StoredLinear, int | None], nn.Module | None],
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


def _layers(model: FluxTransformer, ends: bool = True) -> Iterator[Place]:
    """The linear layers of every step."""
    if ends:
        for parent, name in ((model, "img_in"), (model.final_layer, "linear")):
            if isinstance(layer := getattr(parent, name), LINEAR):
                yield parent, name, layer
    for block in [*model.double_blocks, *model.single_blocks]:
        yield from _inside(block)


def _fp8_layers(model: FluxTransformer) -> Iterator[Place]:
    """The linear layers that bear fp8: see fp8.py for the others."""
    for block in [*model.double_blocks, *list(model.single_blocks)[:-1]]:
        yield from _inside(block, modulations=True)


def _inside(module: nn.Module, modulations: bool = False) -> Iterator[Place]:
    for name, child in list(module.named_children()):
        if isinstance(child, LINEAR):
            yield module, name, child
        elif modulations or not isinstance(child, Modulation):
            yield from _inside(child, modulations)


def _can_quantise(layer: nn.Linear | StoredLinear, own: torch.dtype | None = None) -> bool:
    """Whether a layer has numbers to quantise, or codes in `own` to hand over, and has them in memory."""
    if isinstance(layer, nn.Linear):
        return not layer.weight.is_meta
    stored = layer.stored
    return all(
        (isinstance(part, Plain) and part.values.dtype in (*COMPUTABLE, own))
        or (isinstance(part, Scaled) and part.codes.dtype == own)
        for part in (stored.parts if isinstance(stored, Joined) else (stored,))
    )


def _can_be_fp8(layer: nn.Linear | StoredLinear) -> bool:
    """Whether a layer can become an `Fp8Linear`: by its sides, and as `_can_quantise`."""
    sides = layer.in_features % STEP == 0 and layer.out_features % STEP == 0
    return sides and not isinstance(layer, Fp8Linear) and _can_quantise(layer, FP8)
