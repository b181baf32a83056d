"""Whether an entry of a LoRA fits a module, told by shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

from .file import Entry
from .names import TRANSFORMER

_THIN = {"lora_down.weight", "lora_up.weight", "alpha", "diff_b", "up_bias", "reshape_weight"}


def why_not(entry: Entry, weight: Sequence[int] | None, bias: Sequence[int] | None) -> str | None:
    """Why an entry cannot be attached to a module, in half a sentence, or None where it can.

    `weight` is [out, in] for a linear layer, [n] for a norm, None for a module that the model lacks; `bias`
    its shape or None.
    """
    if weight is None:
        return f"this model has no {entry.module}"
    return _not_linear(entry, weight, bias) if len(weight) < 2 else _linear(entry, weight)


def _linear(entry: Entry, weight: Sequence[int]) -> str | None:
    out, width = weight
    rows = out if entry.rows is None else entry.rows[1]
    has = f"{entry.module} has a weight of {[rows, width]} here"
    if "diff" in entry.roles and entry.adapter is None:
        return f"{has}, the file has one line of numbers"
    if (adapter := entry.adapter) is not None:
        fits_width = adapter.shape[1] in (0, width) or may_differ(entry)
        if adapter.shape[0] != rows or not fits_width:
            got = [*adapter.shape] if adapter.shape[1] else f"{adapter.shape[0]} rows"
            return f"{has}, the file's is for {got}"
    if entry.bias is not None and entry.bias.numel() != rows:
        return f"{entry.module} has {rows} outputs here, the file's bias has {entry.bias.numel()}"
    whole = entry.roles.get("set_weight")
    if whole is not None and tuple(whole.shape) != (out, width):
        return f"{has}, the file's is {[*whole.shape]}"
    return None


def may_differ(entry: Entry) -> bool:
    """Whether an adapter may read another number of inputs than its layer: only latent channels may differ.

    More inputs are a control LoRA's; fewer are those of a LoRA that does not know of the model's own.
    """
    return entry.module == "img_in" and entry.part == TRANSFORMER and {*entry.roles} <= _THIN


def _not_linear(entry: Entry, weight: Sequence[int], bias: Sequence[int] | None) -> str | None:
    if entry.roles.keys() - {"diff", "diff_b", "set_weight", "alpha"}:
        return f"{entry.module} is a norm, to which no adapter can be attached"
    for role, own, name in (
        ("diff", weight, "scale"),
        ("diff_b", bias, "bias"),
        ("set_weight", weight, "scale"),
    ):
        if role in entry.roles and (own is None or own[0] != entry.roles[role].numel()):
            has = "nothing" if own is None else [*own]
            return f"{entry.module} has {has} as its {name} here, the file has {[*entry.roles[role].shape]}"
    return None
