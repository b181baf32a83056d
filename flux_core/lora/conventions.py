"""How trainers write LoRA files: the prefixes and endings of their keys, and each convention's name.

A key is a prefix, a layer's name and an ending. To add a convention, extend these tables; names of the
transformer's layers are in flux_core/model/names.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..model.names import Rows, find_layer
from ..model.spec import FluxSpec

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

TEXT_LAYERS: dict[str, tuple[tuple[str, str], ...]] = {
    CLIP: (
        (r"encoder_layers_(\d+)_self_attn_([qkv]|out)_proj", r"encoder.layers.\1.self_attn.\2_proj"),
        (r"encoder_layers_(\d+)_mlp_(fc[12])", r"encoder.layers.\1.mlp.\2"),
        (r"encoder_layers_(\d+)_(layer_norm[12])", r"encoder.layers.\1.\2"),
        (r"final_layer_norm", r"final_layer_norm"),
    ),
    T5: (
        (r"encoder_block_(\d+)_layer_0_SelfAttention_([qkvo])", r"encoder.block.\1.layer.0.SelfAttention.\2"),
        (r"encoder_block_(\d+)_layer_1_DenseReluDense_(w\w+)", r"encoder.block.\1.layer.1.DenseReluDense.\2"),
        (r"encoder_block_(\d+)_layer_([01])_layer_norm", r"encoder.block.\1.layer.\2.layer_norm"),
        (r"encoder_final_layer_norm", r"encoder.final_layer_norm"),
    ),
}
"""Layers of the text encoders with their dots as underscores, and the module's name in transformers."""

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


@dataclass(frozen=True)
class Target:
    """A module of one of the parts, some of its rows or (None) all, and whether their halves are swapped."""

    part: str
    module: str
    rows: Rows | None = None
    swapped: bool = False


def find_target(layer: str, spec: FluxSpec) -> Target | None:
    """The module that a layer's name in a file means, prefix included, or None where it means none.

    diffusers splits BFL's fused layers (qkv in three, linear1 in four), so it may be some rows of a module
    only. The sizes of `spec` give these rows; whether the model has the module is not checked.
    """
    for prefix, parts in TEXT_PREFIXES:
        if match := prefix.match(layer):
            return _text_target(layer[match.end() :], parts)
    name = PREFIX.sub("", layer, count=1) if PREFIX.match(layer) else layer
    found = find_layer(name.replace(".processor.to_", ".to_").strip("_."))
    return found and Target(TRANSFORMER, found.module, found.rows(spec), found.swapped)


def _text_target(name: str, parts: tuple[str, ...]) -> Target | None:
    name = name.replace(".", "_").strip("_").removeprefix("transformer_").removeprefix("text_model_")
    for part in parts:
        for pattern, module in TEXT_LAYERS[part]:
            if match := re.fullmatch(pattern, name):
                return Target(part, match.expand(module))
    return None
