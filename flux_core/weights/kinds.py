"""Which model a file holds, detected from its tensor names, so that an error can name a wrong file's kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum


class ModelKind(Enum):
    """A kind of model file; the value is its name in a sentence, with its article."""

    LORA = "a LoRA"
    IP_ADAPTER = "an IP-Adapter"
    REDUX = "a FLUX.1 Redux adapter"
    PULID = "a PuLID adapter"
    CONTROLNET = "a ControlNet"
    TEXTUAL_INVERSION = "a textual inversion"
    CHROMA = "a Chroma transformer"
    FLUX_2 = "a FLUX.2 transformer"
    HUNYUAN_VIDEO = "a HunyuanVideo transformer"
    TRANSFORMER = "a FLUX.1 transformer"
    DIFFUSERS_TRANSFORMER = "a FLUX.1 transformer with diffusers' names"
    SD3 = "an SD3 transformer"
    QWEN_IMAGE = "a Qwen-Image transformer"
    WAN = "a Wan transformer"
    LUMINA = "a Lumina or Z-Image transformer"
    HIDREAM = "a HiDream transformer"
    AURAFLOW = "an AuraFlow transformer"
    LTX_VIDEO = "an LTX-Video transformer"
    PIXART = "a PixArt transformer"
    SDXL = "an SDXL UNet"
    SD1 = "an SD1.5 or SD2 UNet"
    T5 = "a T5 text encoder"
    UMT5 = "a UMT5 text encoder (Wan's)"
    LLAMA_CPP_T5 = "a T5 text encoder with llama.cpp's names"
    VAE = "a VAE"
    DIFFUSERS_VAE = "a VAE with diffusers' names"
    CLIP = "a CLIP text encoder"
    SIGLIP = "a SigLIP vision model"
    CLIP_VISION = "a CLIP vision model"
    OPEN_CLIP = "an OpenCLIP text encoder"
    LANGUAGE_MODEL = "a language model"
    UPSCALER = "an upscaler"
    UNKNOWN = "a model of unknown kind"

    @property
    def label(self) -> str:
        """The kind's name in a sentence: "a VAE"."""
        return self.value

    @property
    def model(self) -> ModelKind:
        """The same model, whatever its file's spelling of the names: VAE for DIFFUSERS_VAE."""
        return _SPELLINGS.get(self, self)


_SPELLINGS = {
    ModelKind.DIFFUSERS_TRANSFORMER: ModelKind.TRANSFORMER,
    ModelKind.DIFFUSERS_VAE: ModelKind.VAE,
    ModelKind.LLAMA_CPP_T5: ModelKind.T5,
}

_PREFIX = re.compile(r"(model\.diffusion_model|diffusion_model|first_stage_model|vae)\.")
"""Prefixes of all-in-one checkpoints, which the patterns leave out."""

_LORA_ENDINGS = (
    r"\.lora_[AB]\.|\.lora_(up|down)\.|_lora\d?\.(up|down)|\.lokr_w|\.hada_w|\.oft_|"
    r"\.dora_scale$|\.diff(_b)?$"
)
_PATTERNS = (
    (ModelKind.LORA, r"lora_(unet|te|te1|te2|transformer)_|lycoris_"),
    (ModelKind.LORA, rf".*({_LORA_ENDINGS})"),
    (
        ModelKind.IP_ADAPTER,
        r"ip_adapter(_proj_model)?\.|image_proj\.|double_blocks\.\d+\.processor\.ip_adapter",
    ),
    (ModelKind.REDUX, r"redux_(up|down)\."),
    (ModelKind.PULID, r"pulid_(ca|encoder)\."),
    (ModelKind.CONTROLNET, r"control_model\.|controlnet_|input_hint_block\."),
    (ModelKind.TEXTUAL_INVERSION, r"emb_params$|string_to_param|clip_l$|t5xxl$"),
    (ModelKind.CHROMA, r"distilled_guidance_layer\."),
    (ModelKind.FLUX_2, r"double_stream_modulation_img\."),
    (ModelKind.HUNYUAN_VIDEO, r"txt_in\.individual_token_refiner\."),
    (ModelKind.TRANSFORMER, r"double_blocks\.\d+\.img_attn\."),
    (ModelKind.DIFFUSERS_TRANSFORMER, r"single_transformer_blocks\.\d+\."),
    (ModelKind.SD3, r"joint_blocks\.\d+\.|transformer_blocks\.\d+\.norm1_context\.linear\."),
    (ModelKind.QWEN_IMAGE, r"transformer_blocks\.\d+\.img_mod\."),
    (ModelKind.WAN, r"blocks\.\d+\.cross_attn\.norm_q\."),
    (ModelKind.LUMINA, r"noise_refiner\.\d+\."),
    (ModelKind.HIDREAM, r"double_stream_blocks\.\d+\.block\."),
    (ModelKind.AURAFLOW, r"double_layers\.\d+\."),
    (ModelKind.LTX_VIDEO, r"transformer_blocks\.\d+\.scale_shift_table$|patchify_proj\."),
    (ModelKind.PIXART, r"t_block\.1\.|adaln_single\."),
    (ModelKind.SDXL, r"label_emb\.0\.0\.|add_embedding\.linear_1\."),
    (ModelKind.SD1, r"input_blocks\.1\.0\.in_layers\.|down_blocks\.0\.resnets\.0\."),
    (
        ModelKind.UMT5,
        r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.|enc\.blk\.1\.attn_rel_b\.",
    ),
    (ModelKind.T5, r"encoder\.block\.0\.layer\.0\.SelfAttention\."),
    (ModelKind.LLAMA_CPP_T5, r"enc\.blk\.\d+\.attn_"),
    (ModelKind.VAE, r"(encoder\.down|decoder\.up)\.0\.block\.0\.conv1\.weight"),
    (ModelKind.DIFFUSERS_VAE, r"(encoder\.down|decoder\.up)_blocks\.\d+\."),
    (ModelKind.SIGLIP, r"vision_model\.head\.|text_model\.head\."),
    (ModelKind.CLIP, r"(text_model\.)?embeddings\.token_embedding\."),
    (ModelKind.CLIP_VISION, r"vision_model\.|visual\."),
    (ModelKind.OPEN_CLIP, r"(transformer\.)?resblocks\.0\."),
    (
        ModelKind.LANGUAGE_MODEL,
        r"blk\.\d+\.attn_|model\.layers\.\d+\.self_attn\.|model\.embed_tokens\.",
    ),
    (ModelKind.UPSCALER, r"model\.\d+\.sub\.|conv_body\.|body\.\d+\.rdb\d\."),
)
"""Patterns that one of a file's names starts with. The first match decides: add-ons come before the models
whose names they repeat, FLUX.1's relatives before FLUX.1."""


def kind_of(names: Iterable[str]) -> ModelKind:
    """The kind of model that has tensors of these names, such as a state dict's.

    >>> kind_of(["redux_up.weight"])
    <ModelKind.REDUX: 'a FLUX.1 Redux adapter'>
    """
    names = [_PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name for name in names]
    for kind, pattern in _PATTERNS:
        matches = re.compile(pattern).match
        if any(matches(name) for name in names):
            return kind
    return ModelKind.UNKNOWN


def expect(found: ModelKind, wanted: ModelKind, file: str) -> None:
    """Raise ValueError, naming what `file` is instead, unless it holds the wanted model in any spelling."""
    if found.model is wanted:
        return
    if found is ModelKind.LORA:
        raise ValueError(
            f"{file} is a LoRA, not {wanted.label}; load it with the LoRA node, "
            f"and choose {wanted.label} here"
        )
    raise ValueError(f"{file} is {found.label}, not {wanted.label}; choose {wanted.label} here")
