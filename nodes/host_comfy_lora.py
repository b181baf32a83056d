"""LoRAs in ComfyUI: our reading of a file, as patches of ComfyUI's own on clones of its MODEL and CLIP.

ComfyUI merges them, so that they stack with what other loaders patch, on stock models and on ours, and an
adapter does what it does after ComfyUI's own loader. What is relied on, as of ComfyUI 0.33: comfy/lora.py
load_lora, ModelPatcher.add_patches, and the names of FLUX.1's weights in ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..flux_core.lora import LoraFile, Report, canonical_tensors, parse_blocks, read_lora, why_not
from ..flux_core.lora.names import CLIP, T5, TRANSFORMER, transformer_modules
from ..flux_core.lora.report import FileReport, Misfit
from ..flux_core.model.spec import FluxSpec
from .host_comfy_network import ComfyNetwork

FRONTS = {
    TRANSFORMER: "diffusion_model.",
    CLIP: "clip_l.transformer.text_model.",
    T5: "t5xxl.transformer.",
}
"""What stands before our names in a model's state dict."""

IMG_IN = "diffusion_model.img_in.weight"

Patches = dict[Any, Any]
Shapes = dict[str, tuple[int, ...]]


def add_lora(
    model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float, blocks: str
) -> tuple[Any, Any, str]:
    """Clones of MODEL and CLIP (or None) with the LoRA's patches, and the report as text.

    Raises TypeError for a MODEL that is not FLUX.1, and what read_lora and parse_blocks raise.
    """
    spec = _spec_of(model)
    lora = read_lora(path, spec)
    strengths = parse_blocks(blocks, transformer_modules(spec))
    shapes = _shapes(model.model) | {IMG_IN: (spec.hidden_size, _inputs(model, spec))}
    model, report = _patched(
        model, shapes, lora, {TRANSFORMER}, lambda module: strength_model * strengths.of(module)
    )
    if clip is not None:
        shapes = _shapes(clip.cond_stage_model)
        clip, told = _patched(clip, shapes, lora, {CLIP, T5}, lambda _: strength_clip)
        report = report.joined(told)
    return model, clip, report.checked().text()


def _spec_of(model: Any) -> FluxSpec:
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


def _inputs(model: Any, spec: FluxSpec) -> int:
    """Inputs of `img_in` with the MODEL's patches: a control LoRA among them has widened it.

    The weight itself cannot be asked: it has the patches of the MODEL that ran last.
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
    """A clone of a MODEL or CLIP with the patches of the parts that it has, and what became of the keys."""
    misfits: list[Misfit] = []
    by_strength: dict[float, list[Patches]] = {}
    for entry in lora.entries:
        if entry.part not in parts:
            continue
        stem = FRONTS[entry.part] + entry.module
        main = f"{stem}.scale" if f"{stem}.scale" in shapes else f"{stem}.weight"
        weight = shapes.get(main)
        why = why_not(entry, weight, shapes.get(f"{stem}.bias"))
        if why is not None or weight is None:
            misfits.append(Misfit(entry.part, entry.keys, why or ""))
        elif (strength := strength_of(entry.module)) != 0.0:
            patches = by_strength.setdefault(strength, [])
            for key, patch in _patches(entry, main, f"{stem}.bias", weight[-1]):
                if not patches or key in patches[-1]:
                    patches.append({})
                patches[-1][key] = patch
    clone = target.clone()
    for strength, groups in by_strength.items():
        for patches in groups:
            clone.add_patches(patches, strength)
    return clone, Report((FileReport(lora, frozenset(parts), tuple(misfits)).checked(),))


def _patches(entry: Any, main: str, bias: str, width: int) -> list[tuple[Any, Any]]:
    """(key in ComfyUI, patch) of all that an entry changes; a key of some rows says which."""
    import comfy.lora

    def key(name: str) -> Any:
        return name if entry.rows is None else (name, (0, *entry.rows))

    found: list[tuple[Any, Any]] = []
    if "set_weight" in entry.roles:
        found.append((main, ("set", (entry.roles["set_weight"],))))
    if tensors := canonical_tensors(entry, width):
        named = {f"lora.{role}": tensor for role, tensor in tensors.items()}
        found += comfy.lora.load_lora(named, {"lora": key(main)}).items()
    elif "diff" in entry.roles:
        found.append((main, ("diff", (entry.roles["diff"],))))
    if entry.bias is not None:
        found.append((key(bias), ("diff", (entry.bias,))))
    return found
