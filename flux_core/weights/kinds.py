"""Which model a file holds, told by its keys, so that a wrong file is refused by its right name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..model.spec import Shaped

PREFIX = re.compile(r"(model\.diffusion_model|diffusion_model|first_stage_model|vae)\.")
"""What may stand before the names in all-in-one checkpoints, and does not count."""


@dataclass(frozen=True)
class Kind:
    """A kind of model file: its name, as it reads after "is", and a pattern that starts one of its keys."""

    name: str
    pattern: str


TRANSFORMER = Kind("a FLUX.1 transformer", r"double_blocks\.\d+\.img_attn\.")
AUTOENCODER = Kind("a VAE", r"(encoder\.down|decoder\.up)\.0\.block\.0\.conv1\.weight")
T5 = Kind("a T5 text encoder", r"encoder\.block\.0\.layer\.0\.SelfAttention\.")
T5_GGUF = Kind("a T5 text encoder with llama.cpp's names", r"enc\.blk\.\d+\.attn_")
CLIP = Kind("a CLIP text encoder", r"(text_model\.)?embeddings\.token_embedding\.")
DIFFUSERS_TRANSFORMER = Kind(
    "a FLUX.1 transformer with diffusers' names", r"single_transformer_blocks\.\d+\."
)
DIFFUSERS_VAE = Kind("a VAE with diffusers' names", r"(encoder\.down|decoder\.up)_blocks\.\d+\.")

# The first match decides: add-ons before the models whose names they repeat, relatives before FLUX.1 itself.
KINDS: tuple[Kind, ...] = (
    Kind("a LoRA", r"lora_(unet|te|te1|te2|transformer)_|lycoris_"),
    Kind(
        "a LoRA",
        r".*(\.lora_[AB]\.|\.lora_(up|down)\.|_lora\d?\.(up|down)|\.lokr_w|\.hada_w|\.oft_|\.dora_scale$|\.diff(_b)?$)",
    ),
    Kind(
        "an IP-Adapter", r"ip_adapter(_proj_model)?\.|image_proj\.|double_blocks\.\d+\.processor\.ip_adapter"
    ),
    Kind("a FLUX.1 Redux adapter", r"redux_(up|down)\."),
    Kind("a PuLID adapter", r"pulid_(ca|encoder)\."),
    Kind("a ControlNet", r"control_model\.|controlnet_|input_hint_block\."),
    Kind("a textual inversion", r"emb_params$|string_to_param|clip_l$|t5xxl$"),
    Kind("a Chroma transformer", r"distilled_guidance_layer\."),
    Kind("a FLUX.2 transformer", r"double_stream_modulation_img\."),
    Kind("a HunyuanVideo transformer", r"txt_in\.individual_token_refiner\."),
    TRANSFORMER,
    DIFFUSERS_TRANSFORMER,
    Kind("an SD3 transformer", r"joint_blocks\.\d+\.|transformer_blocks\.\d+\.norm1_context\.linear\."),
    Kind("a Qwen-Image transformer", r"transformer_blocks\.\d+\.img_mod\."),
    Kind("a Wan transformer", r"blocks\.\d+\.cross_attn\.norm_q\."),
    Kind("a Lumina or Z-Image transformer", r"noise_refiner\.\d+\."),
    Kind("a HiDream transformer", r"double_stream_blocks\.\d+\.block\."),
    Kind("an AuraFlow transformer", r"double_layers\.\d+\."),
    Kind("an LTX-Video transformer", r"transformer_blocks\.\d+\.scale_shift_table$|patchify_proj\."),
    Kind("a PixArt transformer", r"t_block\.1\.|adaln_single\."),
    Kind("an SDXL UNet", r"label_emb\.0\.0\.|add_embedding\.linear_1\."),
    Kind("an SD1.5 or SD2 UNet", r"input_blocks\.1\.0\.in_layers\.|down_blocks\.0\.resnets\.0\."),
    T5,
    T5_GGUF,
    AUTOENCODER,
    DIFFUSERS_VAE,
    CLIP,
    Kind("a CLIP vision model", r"vision_model\.|visual\."),
    Kind("an OpenCLIP text encoder", r"(transformer\.)?resblocks\.0\."),
    Kind("a language model", r"blk\.\d+\.attn_|model\.layers\.\d+\.self_attn\.|model\.embed_tokens\."),
    Kind("an upscaler", r"model\.\d+\.sub\.|conv_body\.|body\.\d+\.rdb\d\."),
)


def kind_of(state_dict: Mapping[str, Shaped]) -> str:
    """What a state dict holds, as it reads after "is": "a VAE", "a LoRA", ..., or "of an unknown kind"."""
    names = [PREFIX.sub("", name, count=1) if PREFIX.match(name) else name for name in state_dict]
    for kind in KINDS:
        matches = re.compile(kind.pattern).match
        if any(matches(name) for name in names):
            return kind.name
    return "of an unknown kind"


def expect(state_dict: Mapping[str, Shaped], kind: Kind, file: str) -> None:
    """Raise ValueError, naming what `file` is instead, unless the state dict is of that kind."""
    found = kind_of(state_dict)
    if found == kind.name:
        return
    if found == "a LoRA":
        raise ValueError(
            f"{file} is a LoRA, not {kind.name}; use the LoRA node for it, and choose {kind.name} here"
        )
    raise ValueError(f"{file} is {found}, not {kind.name}; choose {kind.name} here")
