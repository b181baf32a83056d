"""One line on a model file for the user: variant, format, size, number of parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..model.spec import FLUX_DEV, FluxSpec
from ..quant.formats import DTYPE_NAMES, ConcatenatedWeight
from .kinds import ModelKind
from .shape_errors import blame_file
from .weight_file import Weight, WeightFile

TITLES = ("modelspec.title", "modelspec.architecture", "general.name", "general.basename")
"""Metadata keys that may name a variant."""

NAMED = {"krea": "FLUX.1 Krea [dev]", "kontext": "FLUX.1 Kontext [dev]"}
"""Variants with the same shapes as [dev], identified by a word in the metadata."""

CONTROLS = {"canny": "FLUX.1 Canny [dev]", "depth": "FLUX.1 Depth [dev]"}


def description(file: WeightFile, kind: ModelKind, tensors: Mapping[str, Weight]) -> str:
    """The line on a model of this kind, whose transformer tensors have BFL's names."""
    found = kind.label
    if kind.model is ModelKind.TRANSFORMER:
        with blame_file(file.name, ModelKind.TRANSFORMER, tensors):
            found = variant_of(FluxSpec.from_state_dict(tensors), file.metadata)
    count = sum(tensor.numel() for tensor in tensors.values())
    return f"{found}, {format_of(file, tensors)}, {_bytes(file.size)}, {_count(count)} parameters"


def variant_of(spec: FluxSpec, metadata: Mapping[str, str]) -> str:
    """The variant of FLUX.1 with these sizes; if several have them, the one named in the metadata."""
    words = " ".join(metadata.get(key, "") for key in TITLES).lower()
    inputs = spec.in_channels
    if not spec.guidance_embed:
        name = "FLUX.1 [schnell]" if inputs == 64 else f"FLUX.1 without guidance, {inputs} inputs"
    elif inputs == 64:
        name = next((name for word, name in NAMED.items() if word in words), "FLUX.1 [dev]")
    elif inputs == 128:
        named = next((name for word, name in CONTROLS.items() if word in words), None)
        name = named or "FLUX.1 Canny or Depth [dev]"
    else:
        name = "FLUX.1 Fill [dev]" if inputs == 384 else f"FLUX.1 [dev] with {inputs} inputs"
    full_size = (FLUX_DEV.hidden_size, FLUX_DEV.depth, FLUX_DEV.depth_single)
    if (spec.hidden_size, spec.depth, spec.depth_single) != full_size:
        name += f" in small (hidden size {spec.hidden_size}, {spec.depth} + {spec.depth_single} blocks)"
    return name


def format_of(file: WeightFile, tensors: Mapping[str, Weight]) -> str:
    """The format of most parameters."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        for part in tensor.parts if isinstance(tensor, ConcatenatedWeight) else (tensor,):
            label = DTYPE_NAMES.get(part.dtype, str(part.dtype)) if isinstance(part, Tensor) else part.label
            counts[label] = counts.get(label, 0) + part.numel()
    most = max(counts, key=lambda label: counts[label], default="empty")
    return f"GGUF {most}" if file.format == "GGUF" and not most.startswith("GGUF") else most


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.2f} million"
