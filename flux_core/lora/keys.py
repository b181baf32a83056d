"""A LoRA file's key, cut in two: the layer that it is for, and what the tensor is.

Trainers write the same tensor under many endings. Here each becomes one role, named as LyCORIS and kohya name
it (KohakuBlueleaf/LyCORIS, lycoris/modules; kohya-ss/sd-scripts, networks/lora_flux.py), which is also what
ComfyUI reads.
"""

from __future__ import annotations

import re

_PEFT = r"(?:\.default(?:_\d+)?)?(?:\.weight)?"
"""PEFT may put its adapter's name and `.weight` behind a tensor's name."""

_NORM = r"(?<=query_norm|..key_norm)\.scale|(?<=\.norm_[qk])\.weight|(?<=\.norm_added_[qk])\.weight"
"""Control LoRAs give norms whole, under BFL's names and, as diffusers writes them again, under its own."""

_ENDINGS: tuple[tuple[str, str], ...] = (
    (rf"\.lora_(?:down|A){_PEFT}", "lora_down.weight"),
    (rf"\.lora_(?:up|B){_PEFT}", "lora_up.weight"),
    (r"\.lora_(?:up|B)(?:\.default)?\.bias", "up_bias"),
    (r"\.lora_mid\.weight", "lora_mid.weight"),
    (r"(?:\.lora|\.lora_linear_layer|(?<=to_[qkv])_lora|(?<=to_out)_lora)\.down\.weight", "lora_down.weight"),
    (r"(?:\.lora|\.lora_linear_layer|(?<=to_[qkv])_lora|(?<=to_out)_lora)\.up\.weight", "lora_up.weight"),
    (r"(?<=_lora|lora1|lora2)\.down\.weight", "lora_down.weight"),  # XLabs: the name is part of the layer's
    (r"(?<=_lora|lora1|lora2)\.up\.weight", "lora_up.weight"),
    (r"\.alpha", "alpha"),
    (rf"\.(?:dora_scale|magnitude|lora_magnitude_vector{_PEFT})", "dora_scale"),
    (r"\.lokr_(?:w1|w2|w1_a|w1_b|w2_a|w2_b|t2)", ""),
    (r"\.hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2)", ""),
    (r"\.oft_blocks", ""),
    (r"\.rescale", ""),
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "diff_b"),
    (rf"{_NORM}|\.set_weight", "set_weight"),
    (r"\.reshape_weight", "reshape_weight"),
)
_KEY = re.compile(
    r"(?P<stem>.+?)(?:" + "|".join(f"(?P<e{i}>{ending})" for i, (ending, _) in enumerate(_ENDINGS)) + r")\Z"
)
LONGEST = 400
"""Characters of the longest key that is looked at; real ones have fewer than 120."""


def parse_key(key: str) -> tuple[str, str] | None:
    """(layer as the file names it, role) of a key, or None where its ending is none that is known.

    Roles: "lora_down.weight" [r, in], "lora_up.weight" [out, r], "up_bias" [out], "alpha", "dora_scale",
    "lokr_...", "hada_...", "oft_blocks", "rescale", "diff", "diff_b", "set_weight", and "lora_mid.weight" and
    "reshape_weight", which no linear layer needs.
    """
    match = _KEY.match(key) if len(key) <= LONGEST else None
    if match is None:
        return None
    index = next(i for i in range(len(_ENDINGS)) if match[f"e{i}"] is not None)
    return match["stem"], _ENDINGS[index][1] or match[f"e{index}"][1:]
