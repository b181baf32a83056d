"""What a model file is, in a line for the artist: variant, format, size, parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..model.spec import FLUX_DEV, FluxSpec
from ..quant.formats import DTYPE_NAMES, ConcatenatedWeight
from .assemble import assemble
from .checkpoint import CLIP_PART, T5_PART, TRANSFORMER_PART, VAE_PART, Part, Weight, WeightFile, read_weights
from .diffusers import transformer_names
from .kinds import DIFFUSERS_TRANSFORMER, TRANSFORMER, kind_of

PARTS: dict[str, Part] = {
    "transformer": TRANSFORMER_PART,
    "clip": CLIP_PART,
    "t5": T5_PART,
    "vae": VAE_PART,
}
"""The parts of a pipeline, of which an all-in-one file or a folder may hold several."""

TITLES = ("modelspec.title", "modelspec.architecture", "general.name", "general.basename")
"""Metadata that may name a variant."""

NAMED = {"krea": "FLUX.1 Krea [dev]", "kontext": "FLUX.1 Kontext [dev]"}
"""Variants of [dev]'s very shapes, which only a file's own words can tell."""

CONTROLS = {"canny": "FLUX.1 Canny [dev]", "depth": "FLUX.1 Depth [dev]"}


def describe(path: str | Path, part: str = "transformer") -> str:
    """A line on the model in a file or folder: "FLUX.1 [dev], GGUF Q4_K, 6.81 GB, 11.90 billion parameters".

    Where there are several, on the `part` of PARTS; the size is the file's. Reads only headers. Raises what
    `read_weights` raises, and ValueError for formats that are not read.
    """
    file = read_weights(path, PARTS[part])
    tensors = assemble(file)
    found = kind_of(tensors)
    if found == DIFFUSERS_TRANSFORMER.name:
        tensors, found = transformer_names(tensors, file.name), TRANSFORMER.name
    if found == TRANSFORMER.name:
        found = variant_of(FluxSpec.from_state_dict(tensors), file.metadata)
    count = sum(tensor.numel() for tensor in tensors.values())
    return f"{found}, {format_of(file, tensors)}, {_bytes(file.size)}, {_count(count)} parameters"


def variant_of(spec: FluxSpec, metadata: Mapping[str, str]) -> str:
    """The variant of FLUX.1 that has these sizes; of those with the same, the one that the metadata names."""
    words = " ".join(metadata.get(key, "") for key in TITLES).lower()
    inputs = spec.in_channels
    if not spec.guidance_embed:
        name = "FLUX.1 [schnell]" if inputs == 64 else f"FLUX.1 without guidance, {inputs} inputs"
    elif inputs == 64:
        name = next((name for word, name in NAMED.items() if word in words), "FLUX.1 [dev]")
    elif inputs == 128:
        told = next((name for word, name in CONTROLS.items() if word in words), None)
        name = told or "FLUX.1 Canny or Depth [dev]"
    else:
        name = "FLUX.1 Fill [dev]" if inputs == 384 else f"FLUX.1 [dev] with {inputs} inputs"
    whole = (FLUX_DEV.hidden_size, FLUX_DEV.depth, FLUX_DEV.depth_single)
    if (spec.hidden_size, spec.depth, spec.depth_single) != whole:
        name += f" in small (hidden size {spec.hidden_size}, {spec.depth} + {spec.depth_single} blocks)"
    return name


def format_of(file: WeightFile, tensors: Mapping[str, Weight]) -> str:
    """The format that most of the numbers are in."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        for part in tensor.parts if isinstance(tensor, ConcatenatedWeight) else (tensor,):
            label = DTYPE_NAMES.get(part.dtype, str(part.dtype)) if isinstance(part, Tensor) else part.label
            counts[label] = counts.get(label, 0) + part.numel()
    most = max(counts, key=lambda label: counts[label], default="empty")
    return f"GGUF {most}" if file.format == "GGUF" and not most.startswith("GGUF") else most


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"
