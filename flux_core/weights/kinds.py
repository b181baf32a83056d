"""Which model a file holds, told by its keys, so that a wrong file is refused by its right name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..spec import Shaped

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
CLIP = Kind("a CLIP text encoder", r"(text_model\.)?embeddings\.token_embedding\.")
DIFFUSERS_TRANSFORMER = Kind(
    "a FLUX.1 transformer with diffusers' names", r"single_transformer_blocks\.\d+\."
)
DIFFUSERS_VAE = Kind("a VAE with diffusers' names", r"(encoder\.down|decoder\.up)_blocks\.\d+\.")

# The first match decides: add-ons before the models whose names they repeat, relatives before FLUX.1 itself.
KINDS: tuple[Kind, ...] = (
    Kind("a LoRA", r"lora_(unet|te|te1|te2|transformer)_|lycoris_"),
    Kind("a LoRA", r".*(\.lora_[AB]\.|\.lora_(up|down)\.|_lora\d\.(up|down)|\.lokr_w|\.hada_w)"),
    Kind("a ControlNet", r"control_model\.|controlnet_|input_hint_block\."),
    Kind("a Chroma transformer", r"distilled_guidance_layer\."),
    Kind("a FLUX.2 transformer", r"double_stream_modulation_img\."),
    Kind("a HunyuanVideo transformer", r"txt_in\.individual_token_refiner\."),
    TRANSFORMER,
    DIFFUSERS_TRANSFORMER,
    Kind("an SD3 transformer", r"joint_blocks\.\d+\."),
    Kind("an SDXL UNet", r"label_emb\.0\.0\.|add_embedding\.linear_1\."),
    Kind("an SD1.5 or SD2 UNet", r"input_blocks\.1\.0\.in_layers\.|down_blocks\.0\.resnets\.0\."),
    T5,
    AUTOENCODER,
    DIFFUSERS_VAE,
    CLIP,
    Kind("a CLIP vision model", r"vision_model\.|visual\."),
    Kind("an OpenCLIP text encoder", r"(transformer\.)?resblocks\.0\."),
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
