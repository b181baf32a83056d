"""The tensors of one layer, by role -> its adapter, and what it does to biases and whole parameters.

Raises ValueError where tensors are missing or do not fit each other; the reader then counts the keys as
unmatched, because half an adapter would change the picture in a way that nobody trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .adapters import Adapter, Decomposed, Dense, Hadamard, Inner, Kronecker, LowRank, Rotation

Roles = Mapping[str, Tensor]
_LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
_LORA = {"lora_down.weight", "lora_up.weight"}
_OFT = {"oft_blocks", "rescale"}
_KINDS = (_LORA, _LOKR, _HADA, _OFT, {"diff"})
_BESIDE = {"alpha", "dora_scale", "diff_b", "up_bias", "set_weight", "reshape_weight"}


def build_adapter(roles: Roles) -> Adapter | None:
    """The adapter that the roles of one layer make, or None where they only set or add.

    A `diff` of one dim is a norm's, and no adapter.
    """
    found = [kind for kind in _KINDS if kind & roles.keys()]
    unknown = roles.keys() - _BESIDE - set().union(*found)
    if len(found) > 1 or unknown:
        raise ValueError(f"one layer cannot hold {', '.join(sorted(roles))} together")
    if not found or ("diff" in roles and roles["diff"].ndim < 2):
        return None
    if found[0] is _OFT:
        return _rotation(roles)
    inner = _inner(roles)
    if min(inner.shape) < 1:
        raise ValueError(f"an adapter of shape {[*inner.shape]} holds no numbers")
    return inner if "dora_scale" not in roles else Decomposed(inner, _magnitude(roles, inner))


def _inner(roles: Roles) -> Inner:
    if "diff" in roles:
        return Dense(_flat(roles["diff"]))
    if _LORA & roles.keys():
        return _low_rank(roles)
    return _hadamard(roles) if _HADA & roles.keys() else _kronecker(roles)


def _low_rank(roles: Roles) -> LowRank:
    down, up = (_flat(_need(roles, name)) for name in ("lora_down.weight", "lora_up.weight"))
    _same_rank(down, up)
    return LowRank(down, up, _scale(roles, down.shape[0]))


def _hadamard(roles: Roles) -> Hadamard:
    up1, down1, up2, down2 = (_need(roles, f"hada_{w}") for w in ("w1_a", "w1_b", "w2_a", "w2_b"))
    rank = down1.shape[0]
    if "hada_t1" in roles or "hada_t2" in roles:
        up1 = _tucker(up1, _need(roles, "hada_t1"))
        up2 = _tucker(up2, _need(roles, "hada_t2"))
    up1, down1, up2, down2 = (_flat(t) for t in (up1, down1, up2, down2))
    _same_rank(down1, up1)
    _same_rank(down2, up2)
    if (up1.shape[0], down1.shape[1]) != (up2.shape[0], down2.shape[1]):
        raise ValueError("the two factors of a LoHa must have one shape")
    return Hadamard(down1, up1, down2, up2, _scale(roles, rank))


def _kronecker(roles: Roles) -> Kronecker:
    first, rank1 = _factor(roles, "lokr_w1", None)
    second, rank2 = _factor(roles, "lokr_w2", roles.get("lokr_t2"))
    rank = rank1 if rank2 is None else rank2
    return Kronecker(first, second, 1.0 if rank is None else _scale(roles, rank), rank)


def _factor(roles: Roles, name: str, core: Tensor | None) -> tuple[Tensor, int | None]:
    """A factor of a Kronecker product and its rank, None where the file has the factor whole."""
    if name in roles:
        return _flat(roles[name]), None
    up, down = _need(roles, f"{name}_a"), _need(roles, f"{name}_b")
    up = _flat(up) if core is None else _tucker(up, core)
    down = _flat(down)
    _same_rank(down, up)
    return up.float() @ down.float(), down.shape[0]


def _tucker(up: Tensor, core: Tensor) -> Tensor:
    """[rows, r] from LyCORIS' Tucker pair, `up` [r, rows] and `core` [r, r, 1, 1] (rebuild_tucker)."""
    core = core.float().flatten(1)
    if core.shape[0] != up.shape[0]:
        raise ValueError(f"a Tucker core of {core.shape[0]} does not fit a factor of {up.shape[0]}")
    return _flat(up).float().mT @ core


def _rotation(roles: Roles) -> Rotation:
    blocks = _need(roles, "oft_blocks")
    if "dora_scale" in roles:
        raise ValueError("OFT with DoRA is not known")
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or not blocks.numel():
        raise ValueError(f"OFT's blocks must be square, got {[*blocks.shape]}")
    rows = blocks.shape[-3] * blocks.shape[-1]
    if blocks.ndim == 4 and (blocks.shape[-1] % 2 or rows % (2 ** (blocks.shape[0] - 1) * blocks.shape[-1])):
        raise ValueError(f"BOFT's blocks do not make a butterfly, got {[*blocks.shape]}")
    gain = roles["rescale"].flatten() if "rescale" in roles else None
    if gain is not None and gain.shape[0] != rows:
        raise ValueError(f"OFT's rescale must have {rows} numbers, got {gain.shape[0]}")
    return Rotation(blocks, gain, _number(roles["alpha"]) if "alpha" in roles else 0.0)


def _magnitude(roles: Roles, inner: Inner) -> Tensor:
    """DoRA's lengths as [rows, 1] or [1, in]; a flat vector is per row (PEFT)."""
    magnitude, (rows, width) = roles["dora_scale"], inner.shape
    if magnitude.numel() == rows and (magnitude.ndim == 1 or magnitude.shape[0] == rows):
        return magnitude.reshape(rows, 1)
    if magnitude.numel() == width and magnitude.ndim > 1 and magnitude.shape[0] == 1:
        return magnitude.reshape(1, width)
    raise ValueError(f"DoRA's lengths {[*magnitude.shape]} fit neither {rows} rows nor {width} columns")


def bias_change(roles: Roles) -> Tensor | None:
    """What is added to the bias at strength 1 [rows], float32: `diff_b`, and an up layer's own, scaled."""
    change = roles["diff_b"].flatten().float() if "diff_b" in roles else None
    if "up_bias" in roles:
        own = roles["up_bias"].flatten().float() * _scale(roles, _need(roles, "lora_down.weight").shape[0])
        change = own if change is None else change + own
    return change


def swap_halves(roles: Roles) -> dict[str, Tensor]:
    """The roles of a layer whose outputs' halves change places: (scale, shift) to (shift, scale).

    Raises ValueError for an adapter in which the halves are not apart.
    """
    per_row = ("lora_up.weight", "diff", "diff_b", "up_bias", "set_weight", "rescale")
    swapped = dict(roles)
    halved = [name for name in per_row if name in roles]
    tucker = "hada_t1" in roles
    halved += [name for name in ("hada_w1_a", "hada_w2_a") if name in roles and not tucker]
    halved += [name for name in ("lokr_w1", "lokr_w1_a") if name in roles]
    if "dora_scale" in roles and (roles["dora_scale"].ndim == 1 or roles["dora_scale"].shape[0] > 1):
        halved.append("dora_scale")
    if "oft_blocks" in roles and roles["oft_blocks"].ndim == 3:
        halved.append("oft_blocks")
    elif "oft_blocks" in roles:
        raise ValueError("BOFT mixes the halves of the last modulation")
    for name in halved:
        swapped[name] = _swap(roles[name], 0)
    for name in ("hada_w1_a", "hada_w2_a"):
        if name in roles and tucker:
            swapped[name] = _swap(roles[name], 1)
    return swapped


def _swap(tensor: Tensor, dim: int) -> Tensor:
    if tensor.shape[dim] % 2:
        raise ValueError(f"{tensor.shape[dim]} rows have no halves to swap")
    return torch.cat(tensor.chunk(2, dim)[::-1], dim)


def _scale(roles: Roles, rank: int) -> float:
    """alpha / rank, 1 without an alpha."""
    return _number(roles["alpha"]) / rank if "alpha" in roles else 1.0


def _number(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"alpha must be one number, got {[*tensor.shape]}")
    return float(tensor.float())


def _need(roles: Roles, name: str) -> Tensor:
    if name not in roles or not roles[name].ndim:
        raise ValueError(f"{name} is missing")
    return roles[name]


def _flat(tensor: Tensor) -> Tensor:
    """A matrix [rows, in], from one that may carry a 1x1 convolution's dims."""
    if tensor.ndim < 2 or not tensor.numel():
        raise ValueError(f"a matrix is needed, got {[*tensor.shape]}")
    return tensor.flatten(1)


def _same_rank(down: Tensor, up: Tensor) -> None:
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"ranks differ: {down.shape[0]} down, {up.shape[1]} up")
