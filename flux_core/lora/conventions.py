"""How trainers write LoRA files: prefixes and endings of their keys, and what each convention is called.

A key is prefix, layer, ending. The layer's names are in names.py and flux_core/model/names.py. To add a
convention, add what its keys have of their own to these tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

TRANSFORMER, CLIP, T5 = "transformer", "clip_l", "t5xxl"
"""The parts that a LoRA can change; the encoders' names are ComfyUI's."""

PREFIX = re.compile(
    r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|lora_transformer[._]|lora_unet[._]|"
    r"transformer\.|unet\.|lycoris_)+"
)
"""What may precede the name of a transformer's layer."""

TEXT_PREFIXES: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (re.compile(pattern), parts)
    for pattern, parts in (
        (r"lora_te1[._]", (CLIP,)),
        (r"lora_te2[._]", (T5,)),  # OneTrainer; SDXL's second CLIP has other names
        (r"lora_te3[._]", (T5,)),  # kohya, which counts as SD3 does
        (r"lora_te[._]", (CLIP, T5)),
        (r"(?:text_encoders\.)?clip_l\.", (CLIP,)),
        (r"(?:text_encoders\.)?(?:t5xxl|t5)\.", (T5,)),
        (r"text_encoder\.", (CLIP,)),
        (r"text_encoder_2\.", (T5,)),
    )
)
"""Prefixes of the text encoders' layers, and the encoders that they may mean."""

_PEFT = r"(?:\.default(?:_\d+)?)?(?:\.weight)?"
"""PEFT may put its adapter's name and `.weight` after a tensor's name."""

_LORA = r"(?:\.lora|\.lora_linear_layer|(?<=to_[qkv])_lora|(?<=to_out)_lora|(?<=_lora|lora1|lora2))"
"""diffusers before PEFT; XLabs, where `_lora` is part of the layer's name."""

_NORM = r"(?:(?<=query_norm)|(?<=[._]key_norm))"

ENDINGS: tuple[tuple[str, str], ...] = (
    (rf"\.lora_(?:down|A){_PEFT}", "lora_down.weight"),
    (rf"\.lora_(?:up|B){_PEFT}", "lora_up.weight"),
    (r"\.lora_(?:up|B)(?:\.default)?\.bias", "up_bias"),
    (r"\.lora_mid\.weight", "lora_mid.weight"),
    (rf"{_LORA}\.down\.weight", "lora_down.weight"),
    (rf"{_LORA}\.up\.weight", "lora_up.weight"),
    (r"\.alpha", "alpha"),
    (rf"\.(?:dora_scale|magnitude|lora_magnitude_vector{_PEFT})", "dora_scale"),
    (r"\.lokr_(?:w1|w2|w1_a|w1_b|w2_a|w2_b|t2)", ""),
    (r"\.hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2)", ""),
    (r"\.oft_blocks", ""),
    (r"\.rescale", ""),
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "diff_b"),
    (r"\.set_weight", "set_weight"),
    # Control LoRAs replace norms, under the names of BFL, of ComfyUI or of diffusers.
    (rf"{_NORM}\.(?:scale|weight)", "set_weight"),
    (r"(?<=\.norm_[qk])\.weight|(?<=\.norm_added_[qk])\.weight", "set_weight"),
    (r"\.reshape_weight", "reshape_weight"),
)
"""Endings of keys, and the role of their tensor: the ending itself where it is empty.

Roles are named as LyCORIS and kohya name them (KohakuBlueleaf/LyCORIS, lycoris/modules; kohya-ss/sd-scripts,
networks/lora_flux.py), which is also what ComfyUI reads.
"""

LABELS: tuple[tuple[str, str], ...] = (
    (r"lora_transformer[._]", "OneTrainer, diffusers' names"),
    (r".*(qkv|linear1)\.[0-3]\.", "OneTrainer, BFL's names with q, k, v apart"),
    (r"lycoris_", "LyCORIS as SimpleTuner writes it"),
    (r"lora_unet_(double|single)_blocks_", "kohya"),
    (r"lora_unet_", "kohya's format with diffusers' names"),
    (r".*\.processor\.(qkv|proj)_lora", "XLabs"),
    (r"img_in\.lora_A\.", "BFL control LoRA"),
    (r".*\b(double|single)_blocks\.", "BFL's names (ai-toolkit and others)"),
    (r".*transformer_blocks\.", "diffusers (PEFT)"),
    (r"lora_te|text_encoder|clip_l|t5", "text encoders only"),
)
"""Patterns that begin a key, and the convention's name; the first that any key matches is reported."""

_KEY = re.compile(
    r"(?P<stem>.+?)(?:" + "|".join(f"(?P<e{i}>{ending})" for i, (ending, _) in enumerate(ENDINGS)) + r")\Z"
)
MAX_KEY_LENGTH = 400
"""Longer keys are not parsed; real ones have fewer than 120 characters."""


def parse_key(key: str) -> tuple[str, str] | None:
    """(prefix and layer, role) of a key, or None where its ending is unknown.

    Roles: "lora_down.weight" [r, in], "lora_up.weight" [out, r], "up_bias" [out], "alpha", "dora_scale",
    "lokr_...", "hada_...", "oft_blocks", "rescale", "diff", "diff_b", "set_weight", and "lora_mid.weight" and
    "reshape_weight", which no linear layer needs.
    """
    match = _KEY.match(key) if len(key) <= MAX_KEY_LENGTH else None
    if match is None:
        return None
    index = next(i for i in range(len(ENDINGS)) if match[f"e{i}"] is not None)
    return match["stem"], ENDINGS[index][1] or match[f"e{index}"][1:]


def label_of(keys: Iterable[str]) -> str:
    """The name of the convention that a file's keys follow."""
    keys = list(keys)
    for pattern, label in LABELS:
        match = re.compile(pattern).match
        if any(match(key) for key in keys):
            return label
    return "layers named without a prefix"
