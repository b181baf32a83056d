"""Which other model a LoRA file is for, detected from its keys and shapes.

A LoRA of a related model often fits in part: HunyuanVideo, Qwen-Image and the small FLUX.2 are 3072 wide too,
and some of their layers have FLUX.1's names. Such a file is refused whole, because it would blur every image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..model.spec import FLUX_DEV, FluxSpec
from ..weights import ModelKind, kind_of

_BEGIN = r"(?:^|[._])"
_PATTERNS: tuple[tuple[str, str | None], ...] = (
    (r"(?:input|output|middle)_blocks?[._]\d|(?:down|up)_blocks[._]\d|mid_block[._]", None),
    (r"lora_te2_text_model|text_encoder_2\.text_model", "a LoRA for SDXL"),
    (r"ip_adapter", "an IP-Adapter"),
    (r"distilled_guidance_layer", "a LoRA for Chroma"),
    (r"double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj", "a LoRA for FLUX.2"),
    (r"individual_token_refiner|blocks\.\d+\.img_attn_qkv|img_mlp\.fc[12]", "a LoRA for HunyuanVideo"),
    (r"(?:double|single)_stream_blocks[._]", "a LoRA for HiDream"),
    (r"joint_blocks[._]\d", "a LoRA for Stable Diffusion 3"),
    (r"joint_transformer_blocks[._]\d", "a LoRA for AuraFlow"),
    (rf"{_BEGIN}transformer_blocks[._]\d+[._]attn[12][._]", "a LoRA for LTX-Video, PixArt or Sana"),
    (rf"{_BEGIN}blocks[._]\d+[._](?:self_attn|cross_attn|ffn|attn1|attn2)[._]", "a LoRA for Wan"),
    (rf"{_BEGIN}blocks[._]\d+[._]attn[._]qkv_[xy]", "a LoRA for Mochi"),
    (r"(?:img|txt)_mlp[._]net[._]|(?:img|txt)_mod[._]1[._]", "a LoRA for Qwen-Image"),
    (rf"{_BEGIN}layers[._]\d+[._](?:attention|feed_forward)[._]", "a LoRA for Lumina 2 or Z-Image"),
)
"""The first pattern that any key matches decides. None: one of the UNets, which _unet distinguishes."""

_CROSS = re.compile(r"attn2[._]to_[kv]\b.*(?:down|lora_A)")
_UNETS = {2048: "SDXL", 768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2"}
_INDEX = re.compile(rf"{_BEGIN}(double|single|single_transformer|transformer)_?blocks[._](\d+)[._]")
FLUX_2_DEPTH = 8
"""Double blocks of FLUX.2 [dev], which has 48 single ones; HunyuanVideo has 20 and 40."""

_MMDIT_WIDTHS = {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3.5", 6144: "FLUX.2"}


def foreign_model(tensors: Mapping[str, Tensor], spec: FluxSpec) -> str | None:
    """What a file is that is certainly not for FLUX.1 ("a LoRA for SDXL"), or None."""
    if (found := _by_width(tensors, spec)) is not None:
        return found
    for pattern, name in _PATTERNS:
        search = re.compile(pattern).search
        if any(search(key) for key in tensors):
            return name or _unet(tensors)
    return _by_count(tensors, spec)


def _unet(tensors: Mapping[str, Tensor]) -> str:
    """The UNet that a LoRA is for, by the width of the text that its cross-attention reads."""
    for key, tensor in tensors.items():
        if _CROSS.search(key) and tensor.ndim >= 2 and tensor.shape[1] in _UNETS:
            return f"a LoRA for {_UNETS[tensor.shape[1]]}"
    return "a LoRA for a Stable Diffusion UNet (SDXL or 1.5)"


def _by_count(tensors: Mapping[str, Tensor], spec: FluxSpec) -> str | None:
    """By indices of blocks that FLUX.1 does not have: its double blocks end at 18, its single ones at 37."""
    highest = {"double": -1, "single": -1, "transformer": -1, "single_transformer": -1}
    for key in tensors:
        if match := _INDEX.search(key):
            highest[match[1]] = max(highest[match[1]], int(match[2][:6]))
    depth, single = max(spec.depth, FLUX_DEV.depth), max(spec.depth_single, FLUX_DEV.depth_single)
    if highest["double"] >= depth:
        return "a LoRA for HunyuanVideo"
    if highest["transformer"] >= depth:
        return "a LoRA for Qwen-Image" if highest["single_transformer"] < 0 else "a LoRA for HunyuanVideo"
    if max(highest["single"], highest["single_transformer"]) >= single:
        few = max(highest["double"], highest["transformer"]) < FLUX_2_DEPTH
        return "a LoRA for FLUX.2" if few else "a LoRA for HunyuanVideo"
    return None


def _by_width(tensors: Mapping[str, Tensor], spec: FluxSpec) -> str | None:
    """By the width of a block's attention or MLP."""
    for key, tensor in tensors.items():
        inside = _INDEX.search(key) is not None and tensor.ndim >= 2
        if inside and re.search(r"(?:to_[qkv]|qkv|add_[qkv]_proj)\.(?:lora_down|lora_A)", key):
            if tensor.shape[1] in _MMDIT_WIDTHS and tensor.shape[1] != spec.hidden_size:
                return f"a LoRA for {_MMDIT_WIDTHS[tensor.shape[1]]}"
        if inside and re.search(r"img_mlp[._]0\.(?:lora_up|lora_B)", key) and tensor.shape[0] == 18432:
            return "a LoRA for FLUX.2"
    return None


def describe_contents(tensors: Mapping[str, Tensor]) -> str:
    """What a file is that has no key of FLUX.1's layers."""
    kind = kind_of(tensors)
    if kind is ModelKind.LORA:
        return "a LoRA for an unknown model"
    return "no known kind of LoRA" if kind is ModelKind.UNKNOWN else f"{kind.label}, no LoRA"
