"""LoRAs in ComfyUI: flux_core's adapters as ComfyUI's own, as patches on clones of its MODEL and CLIP.

ComfyUI merges them, so that they stack with the patches of other loaders, on stock models and on ours, with
the same result as after ComfyUI's own loader. This relies, as of ComfyUI 0.33, on ModelPatcher.add_patches,
on the order of `weights` in comfy/weight_adapter, and on the names of FLUX.1's weights in ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..flux_core.lora import (
    OFT,
    DoRA,
    Entry,
    FullDifference,
    LoHa,
    LoKr,
    LoRA,
    LoraFile,
    Report,
    incompatibility,
    parse_blocks,
    read_lora,
)
from ..flux_core.lora.adapter import Adapter
from ..flux_core.lora.conventions import CLIP, T5, TRANSFORMER
from ..flux_core.lora.report import FileReport, Misfit
from ..flux_core.model.names import layer_names
from ..flux_core.model.spec import FluxSpec
from .host_comfy_network import ComfyNetwork

PREFIXES = {
    TRANSFORMER: "diffusion_model.",
    CLIP: "clip_l.transformer.text_model.",
    T5: "t5xxl.transformer.",
}
"""Prefixes of our names in ComfyUI's state dicts."""

IMG_IN = "diffusion_model.img_in.weight"

Patches = list[tuple[Any, Any]]
"""(key, patch), as ModelPatcher.add_patches takes them in a dict."""

Shapes = dict[str, tuple[int, ...]]


def add_lora(
    model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float, blocks: str
) -> tuple[Any, Any, str]:
    """Clones of MODEL and CLIP (or None) with the LoRA's patches, and the report as text.

    Raises TypeError for a MODEL that is not FLUX.1, and what read_lora and parse_blocks raise.
    """
    spec = spec_of(model)
    lora = read_lora(path, spec)
    strengths = parse_blocks(blocks, layer_names(spec))
    shapes = _shapes(model.model) | {IMG_IN: (spec.hidden_size, img_in_width(model, spec))}
    model, report = _patched(
        model, shapes, lora, {TRANSFORMER}, lambda module: strength_model * strengths.of(module)
    )
    if clip is not None:
        shapes = _shapes(clip.cond_stage_model)
        clip, on_clip = _patched(clip, shapes, lora, {CLIP, T5}, lambda _: strength_clip)
        report = report.joined(on_clip)
    return model, clip, report.checked().text()


def spec_of(model: Any) -> FluxSpec:
    """Sizes of the FLUX.1 network in a MODEL."""
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    if isinstance(network, ComfyNetwork):
        return network.spec
    config = getattr(getattr(model.model, "model_config", None), "unet_config", {})
    if config.get("image_model") != "flux":
        what = config.get("image_model") or type(model.model).__name__
        raise TypeError(f"a FLUX.1 LoRA needs a FLUX.1 model, got {what}; connect Load FLUX Model")
    return FluxSpec(
        hidden_size=config["hidden_size"],
        num_heads=config["num_heads"],
        depth=config["depth"],
        depth_single=config["depth_single_blocks"],
        context_in=config["context_in_dim"],
        vec_in=config["vec_in_dim"],
        in_channels=config["in_channels"] * ComfyNetwork.patch_size**2,
        mlp_ratio=config["mlp_ratio"],
        guidance_embed=config["guidance_embed"],
    )


def _shapes(model: Any) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def img_in_width(model: Any, spec: FluxSpec) -> int:
    """Inputs of `img_in` with the MODEL's patches: a control LoRA among them has widened it.

    The shape of the weight itself is that of the MODEL that ran last.
    """
    widths = [spec.in_channels]
    for _, patch, *_ in model.patches.get(IMG_IN, []):
        shape = patch.calculate_shape(IMG_IN) if hasattr(patch, "calculate_shape") else None
        widths += [] if shape is None else [shape[1]]
    return max(widths)


def _patched(
    target: Any,
    shapes: Shapes,
    lora: LoraFile,
    parts: set[str],
    strength_of: Callable[[str], float],
) -> tuple[Any, Report]:
    """A clone of a MODEL or CLIP with the patches of its parts, and a report on the keys."""
    misfits: list[Misfit] = []
    applied: list[Entry] = []
    by_strength: dict[float, list[dict[Any, Any]]] = {}
    for entry in lora.entries:
        if entry.part not in parts:
            continue
        stem = PREFIXES[entry.part] + entry.module
        main = f"{stem}.scale" if f"{stem}.scale" in shapes else f"{stem}.weight"
        weight = shapes.get(main)
        why = incompatibility(entry, weight, shapes.get(f"{stem}.bias")) or _unsupported(entry.adapter)
        if why is not None or weight is None:
            misfits.append(Misfit(entry.part, entry.keys, why or ""))
        elif (strength := strength_of(entry.module)) != 0.0:
            applied.append(entry)
            patches = by_strength.setdefault(strength, [])
            for key, patch in _patches(entry, main, f"{stem}.bias", weight[-1]):
                if not patches or key in patches[-1]:
                    patches.append({})
                patches[-1][key] = patch
    lora.check_finite(applied)
    clone = target.clone()
    for strength, groups in by_strength.items():
        for patches in groups:
            clone.add_patches(patches, strength)
    return clone, Report((FileReport(lora, frozenset(parts), tuple(misfits)).checked(),))


def _patches(entry: Entry, main: str, bias: str, width: int) -> Patches:
    """All that an entry changes, by key in ComfyUI; a key of some rows is (name, (0, first row, rows))."""

    def key(name: str) -> Any:
        return name if entry.rows is None else (name, (0, *entry.rows))

    found = []
    if entry.replacement is not None:
        found.append((main, ("set", (entry.replacement,))))
    if entry.adapter is not None:
        found.append((key(main), comfy_adapter(entry.adapter, width)))
    if entry.bias is not None:
        found.append((key(bias), ("diff", (entry.bias,))))
    return found


def comfy_adapter(adapter: Adapter, width: int) -> Any:
    """The adapter as ComfyUI's own object, for a layer with `width` inputs; tensors are shared.

    A LoRA of fewer inputs (`img_in` without a control image) is padded, one of more widens the weight. Raises
    TypeError for an adapter that ComfyUI cannot apply.
    """
    from comfy import weight_adapter as comfy

    if (why := _unsupported(adapter)) is not None:
        raise TypeError(why)
    lengths = None
    if isinstance(adapter, DoRA):
        adapter, lengths = adapter.inner, adapter.magnitude
    if isinstance(adapter, LoRA):
        down, reads = adapter.down, adapter.shape[1]
        wider = [*adapter.shape] if reads > width else None
        down = F.pad(down, (0, width - reads)) if reads < width else down
        return comfy.LoRAAdapter(set(), (adapter.up, down, adapter.alpha, None, lengths, wider))
    if isinstance(adapter, LoHa):
        first, second = (adapter.up1, adapter.down1), (adapter.up2, adapter.down2)
        return comfy.LoHaAdapter(set(), (*first, adapter.alpha, *second, None, None, lengths))
    if isinstance(adapter, LoKr):
        w1, *w1_ab = _whole_or_factors(adapter.w1_a, adapter.w1_b)
        w2, *w2_ab = _whole_or_factors(adapter.w2_a, adapter.w2_b)
        return comfy.LoKrAdapter(set(), (w1, w2, adapter.alpha, *w1_ab, *w2_ab, None, lengths))
    if isinstance(adapter, OFT):
        kind = comfy.BOFTAdapter if adapter.butterfly else comfy.OFTAdapter
        return kind(set(), (adapter.blocks, adapter.rescale, adapter.constraint, None))
    if isinstance(adapter, FullDifference):
        return ("diff", (adapter.difference,))
    raise TypeError(f"{adapter.kind} has no object in ComfyUI")


def _whole_or_factors(a: Tensor, b: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (a, None, None) if b is None else (None, a, b)


def _unsupported(adapter: Adapter | None) -> str | None:
    """Why ComfyUI cannot apply an adapter, as a clause, or None where it can."""
    if isinstance(adapter, DoRA) and isinstance(adapter.inner, FullDifference):
        return f"ComfyUI cannot apply {adapter.kind}"
    return None
