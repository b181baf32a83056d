"""CONDITIONING, checked and converted: a list of [txt [B, L, C], {key: value}], the same in every host.

The keys are ComfyUI's: "pooled_output" [B, P], "guidance"; "reference_latents", a list of raw latents, and
"reference_latents_method" (Kontext); "concat_latent_image", a raw latent, and "concat_mask" [B, 1, H, W]
(Fill, Canny, Depth). Our own is "reference_latents_strengths", one for each reference.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..flux_core.model.autoencoder import to_model_space
from ..flux_core.model.spec import Conditioning, FluxSpec
from ..flux_core.tools.control import with_control_latent
from ..flux_core.tools.fill import with_masked_latent
from ..flux_core.tools.kontext import strengths_for, with_references

Entries = list[Any]
"""A CONDITIONING."""

READ_KEYS = frozenset(
    {
        "pooled_output",
        "guidance",
        "reference_latents",
        "reference_latents_method",
        "reference_latents_strengths",
        "concat_latent_image",
        "concat_mask",
    }
)
"""Keys of a CONDITIONING's entry that `core_conditioning` reads."""

NEUTRAL_VALUES: dict[str, float] = {
    "strength": 1.0,
    "mask_strength": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "clip_start_percent": 0.0,
    "clip_end_percent": 1.0,
}
"""Keys of ComfyUI's entries that change nothing at these values."""

MODIFIERS = frozenset({"set_area_to_bounds", "control_apply_to_uncond", "default"})
"""Keys of ComfyUI's entries that change nothing without another key, such as an area or a ControlNet."""


def checked_conditioning(entries: Entries, role: str) -> Entries:
    """The CONDITIONING itself. Raises ValueError when it lacks what FLUX.1 reads; `role` names the input."""
    if not entries:
        raise ValueError(f"the {role} conditioning is empty; connect FLUX Prompt")
    for txt, _ in entries:
        if not isinstance(txt, Tensor):
            raise ValueError(
                f"the {role} conditioning must hold a tensor of encoded text, got a {type(txt).__name__}; "
                "encode the prompt with FLUX.1's text encoders"
            )
    return entries


def core_conditioning(entries: Entries, role: str, spec: FluxSpec, h: int, w: int) -> Conditioning:
    """The one prompt of a CONDITIONING with its images, as flux_core takes it for an h x w latent.

    Raises ValueError for several prompts, for an entry that flux_core does not support, and for images that
    the model of `spec` cannot take.
    """
    checked_conditioning(entries, role)
    if len(entries) > 1:
        raise ValueError(
            f"the {role} conditioning combines {len(entries)} prompts, FLUX Sampler takes one here; "
            "write them into one prompt, or run this workflow in ComfyUI"
        )
    txt, extra = entries[0]
    for key, value in extra.items():
        if not _is_read_or_neutral(key, value):
            raise ValueError(
                f"the {role} conditioning has the entry {key!r}, which FLUX Sampler does not support here; "
                "remove the node that sets it, or run this workflow in ComfyUI"
            )
    pooled = extra.get("pooled_output")  # none counts as zeros, as in ComfyUI
    pooled = None if pooled is None else pooled.float()
    conditioning = Conditioning(txt.float(), pooled, extra.get("guidance"))
    return _with_channels(_with_references(conditioning, extra, h, w), extra, spec, h, w)


def _with_references(conditioning: Conditioning, extra: dict[str, Any], h: int, w: int) -> Conditioning:
    references = extra.get("reference_latents") or []
    if not references:
        return conditioning
    latents = [to_model_space(raw_latent.float()) for raw_latent in references]
    strengths = extra.get("reference_latents_strengths")
    method = extra.get("reference_latents_method") or "offset"
    return with_references(conditioning, latents, h, w, method, strengths)


def _with_channels(
    conditioning: Conditioning, extra: dict[str, Any], spec: FluxSpec, h: int, w: int
) -> Conditioning:
    """With a masked image for a Fill model, a control image for any other; its latent must be h x w."""
    raw_latent, mask = extra.get("concat_latent_image"), extra.get("concat_mask")
    if raw_latent is None:
        return conditioning
    if raw_latent.shape[-2:] != (h, w):
        sizes = [f"{8 * side[1]}x{8 * side[0]}" for side in (raw_latent.shape[-2:], (h, w))]
        raise ValueError(
            f"the image to condition on must have the generated image's size {sizes[1]}, got {sizes[0]}; "
            "connect the latent of the node that encodes it"
        )
    if spec.is_fill and mask is None:
        raise ValueError("a Fill model needs a mask beside its image, got none; connect FLUX Fill")
    if mask is not None and not spec.is_fill:
        raise ValueError(
            f"only Fill models take a mask beside an image, this one has {spec.in_channels} input channels; "
            "choose a Fill model, or connect FLUX Control Image to a Canny or Depth model"
        )
    latent = to_model_space(raw_latent.float())
    if spec.is_fill:
        return with_masked_latent(conditioning, latent, mask)
    return with_control_latent(conditioning, latent)


def _is_read_or_neutral(key: str, value: Any) -> bool:
    """Whether an entry is read, or changes nothing: no value, a label, or a setting that is neutral."""
    if key in READ_KEYS or key in MODIFIERS or value is None or isinstance(value, str):
        return True
    return key in NEUTRAL_VALUES and value == NEUTRAL_VALUES[key]


def with_guidance(entries: Entries, guidance: float) -> Entries:
    """A copy of the CONDITIONING in which every entry without distilled guidance has this one."""
    return [[txt, {"guidance": guidance, **extra}] for txt, extra in entries]


def with_values(entries: Entries, **values: Any) -> Entries:
    """A copy of the CONDITIONING in which every entry has these values."""
    return [[txt, {**extra, **values}] for txt, extra in entries]


def with_reference(entries: Entries, raw_latent: Tensor, strength: float, method: str) -> Entries:
    """A copy of the CONDITIONING with one reference more, which every entry has behind its earlier ones.

    The method is that of all references. Earlier ones of another pack have strength 1.
    """
    made = []
    for txt, extra in entries:
        references = [*(extra.get("reference_latents") or []), raw_latent]
        earlier = strengths_for(len(references) - 1, extra.get("reference_latents_strengths"))
        strengths = [*earlier, strength]
        values = {"reference_latents": references, "reference_latents_strengths": strengths}
        made.append([txt, {**extra, **values, "reference_latents_method": method}])
    return made
