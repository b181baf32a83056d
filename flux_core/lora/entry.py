"""What a LoRA file does to one module, and whether it fits the module of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..model.names import Rows
from .adapter import Adapter, Roles, alpha_of, is_finite, need, swap_halves
from .additive import FullDifference, LoHa, LoKr, LoRA
from .conventions import TRANSFORMER, Target
from .dora import DoRA
from .rotation import OFT

KINDS = (LoRA, LoKr, LoHa, OFT, FullDifference)
_ANY_KIND = frozenset({"alpha", "dora_scale", "diff_b", "up_bias", "set_weight", "reshape_weight"})


@dataclass(frozen=True, eq=False)
class Entry:
    """The change of one module, all of it or `rows`, and the file's keys that it was read from.

    `adapter` changes the weight, or a norm's scale (a full difference with one dim), `bias` is added to the
    bias at strength 1, `replacement` replaces the weight at any strength but 0. `not_finite` are the keys
    whose tensors contain NaN or inf.
    """

    part: str
    module: str
    rows: Rows | None
    keys: tuple[str, ...]
    adapter: Adapter | None = None
    bias: Tensor | None = None
    replacement: Tensor | None = None
    not_finite: tuple[str, ...] = ()


def read_entry(target: Target, roles: Roles, keys: Sequence[str]) -> Entry | None:
    """The entry of a layer's tensors, or None where they make nothing that can be applied whole.

    `keys` are the names of the first `roles`; an alpha that the file's metadata gave may follow those.
    Half an adapter would change the image in a way that nobody trained.
    """
    try:
        adapter, bias = read_adapter(roles), _bias_change(roles)
        replacement = roles.get("set_weight")
        if target.swapped:
            adapter = None if adapter is None else adapter.swapped()
            bias = None if bias is None else swap_halves(bias)
            replacement = None if replacement is None else swap_halves(replacement)
    except (ValueError, IndexError, RuntimeError):
        return None
    nothing = adapter is None and bias is None and replacement is None
    if nothing or (replacement is not None and target.rows is not None):
        return None
    not_finite = tuple(
        key for key, tensor in zip(keys, roles.values(), strict=False) if not is_finite(tensor)
    )
    return Entry(target.part, target.module, target.rows, tuple(keys), adapter, bias, replacement, not_finite)


def read_adapter(roles: Roles) -> Adapter | None:
    """The adapter in a layer's tensors, or None. Raises ValueError where they do not make one whole one."""
    found = [kind for kind in KINDS if kind.roles & roles.keys()]
    unknown = roles.keys() - _ANY_KIND.union(*(kind.roles for kind in found))
    if len(found) > 1 or unknown:
        raise ValueError(f"one layer cannot have {', '.join(sorted(roles))} together")
    if not found:
        return None
    adapter = found[0].read(roles)
    if not adapter.shape[0]:
        raise ValueError("the adapter is empty")
    return adapter if isinstance(adapter, OFT) or "dora_scale" not in roles else DoRA.read(roles, adapter)


def _bias_change(roles: Roles) -> Tensor | None:
    """What is added to the bias at strength 1 [rows], float32: `diff_b`, and an up layer's bias, scaled."""
    change = roles["diff_b"].flatten().float() if "diff_b" in roles else None
    if "up_bias" in roles:
        rank, alpha = need(roles, "lora_down.weight").shape[0], alpha_of(roles)
        own = roles["up_bias"].flatten().float() * (1.0 if alpha is None else alpha / rank)
        change = own if change is None else change + own
    return change


def incompatibility(entry: Entry, weight: Sequence[int] | None, bias: Sequence[int] | None) -> str | None:
    """Why an entry cannot be applied to a module, as a clause, or None where it can.

    `weight` is [out, in] for a linear layer, [n] for a norm, None for a module that the model lacks; `bias`
    its shape or None.
    """
    if weight is None:
        return f"this model has no {entry.module}"
    return _with_norm(entry, weight, bias) if len(weight) < 2 else _with_linear(entry, weight)


def _with_linear(entry: Entry, weight: Sequence[int]) -> str | None:
    out, width = weight
    rows = out if entry.rows is None else entry.rows[1]
    has = f"{entry.module} has a weight of {[rows, width]} here"
    adapter = entry.adapter
    if adapter is not None and _is_norm_difference(adapter):
        return f"{has}, the file's difference has one dimension"
    if adapter is not None:
        fits_width = adapter.shape[1] in (0, width) or _width_may_differ(entry)
        if adapter.shape[0] != rows or not fits_width:
            got = [*adapter.shape] if adapter.shape[1] else f"{adapter.shape[0]} rows"
            return f"{has}, the file's is for {got}"
    if entry.bias is not None and entry.bias.numel() != rows:
        return f"{entry.module} has {rows} outputs here, the file's bias has {entry.bias.numel()}"
    if entry.replacement is not None and tuple(entry.replacement.shape) != (out, width):
        return f"{has}, the file's is {[*entry.replacement.shape]}"
    return None


def _width_may_differ(entry: Entry) -> bool:
    """Whether an adapter may read another number of inputs than its layer: only latent channels may differ.

    A control LoRA reads more, a LoRA of the plain model fewer than a model with extra channels.
    """
    plain = isinstance(entry.adapter, LoRA) and entry.replacement is None
    return plain and entry.module == "img_in" and entry.part == TRANSFORMER


def _with_norm(entry: Entry, weight: Sequence[int], bias: Sequence[int] | None) -> str | None:
    difference = None
    if isinstance(entry.adapter, FullDifference):
        difference = entry.adapter.difference
    elif entry.adapter is not None:
        return f"{entry.module} is a norm, to which no adapter can be attached"
    for tensor, own, name in (
        (difference, weight, "scale"),
        (entry.bias, bias, "bias"),
        (entry.replacement, weight, "scale"),
    ):
        if tensor is not None and (own is None or own[0] != tensor.numel()):
            has = "nothing" if own is None else [*own]
            return f"{entry.module} has {has} as its {name} here, the file has {[*tensor.shape]}"
    return None


def _is_norm_difference(adapter: Adapter) -> bool:
    return isinstance(adapter, FullDifference) and adapter.difference.ndim == 1
