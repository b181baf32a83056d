"""A small FLUX.1 written in every file format that flux_core reads, with the dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...flux_core.quant.gguf import BLOCK_TYPES
from .models import diffusers_state_dict
from .quantized_files import FORMS, State, write_gguf, write_quantized_safetensors
from .small_pipeline import Small
from .text import llama_names

PREFIXES = {
    "transformer": "model.diffusion_model.",
    "autoencoder": "vae.",
    "t5": "text_encoders.t5xxl.transformer.",
    "clip": "text_encoders.clip_l.transformer.",
}
"""Prefix of each model's tensor names in an all-in-one checkpoint."""

ALL = tuple(PREFIXES)


@dataclass(frozen=True)
class Written:
    """The path of each of the four models, and the dequantized weights where they are not the models' own.

    `parts` names the models that are in the format; the others are stored as float32.
    """

    paths: dict[str, Path]
    parts: tuple[str, ...] = ALL
    weights: dict[str, State] = field(default_factory=dict)


Write = Callable[[Small, Path], Written]


def save(state: State, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def plain_files(small: Small, folder: Path, dtype: torch.dtype = torch.float32) -> Written:
    """Four files with BFL's and transformers' names, as published."""
    cast = {part: {n: t.to(dtype) for n, t in state.items()} for part, state in small.states().items()}
    paths = {part: save(state, folder / f"{part}.safetensors") for part, state in cast.items()}
    return Written(paths, ALL, {} if dtype == torch.float32 else cast)


def diffusers_files(small: Small, folder: Path) -> Written:
    """diffusers' names, each model in one file."""
    paths = plain_files(small, folder).paths
    save(diffusers_state_dict(small.transformer), paths["transformer"])
    save(small.references().autoencoder.state_dict(), paths["autoencoder"])
    return Written(paths, ("transformer", "autoencoder"))


def diffusers_folder(small: Small, folder: Path) -> Written:
    """A pipeline folder as diffusers saves it, the large models in shards."""
    references = small.references()
    references.transformer.save_pretrained(folder / "transformer", max_shard_size="8MB")
    references.autoencoder.save_pretrained(folder / "vae")
    references.clip.save_pretrained(folder / "text_encoder")
    references.t5.save_pretrained(folder / "text_encoder_2", max_shard_size="2MB")
    return Written(dict.fromkeys(ALL, folder))


def all_in_one(small: Small, folder: Path) -> Written:
    """One checkpoint with all four."""
    whole = {PREFIXES[part] + n: t for part, state in small.states().items() for n, t in state.items()}
    return Written(dict.fromkeys(ALL, save(whole, folder / "checkpoint.safetensors")))


def quantized(small: Small, folder: Path, form: str) -> Written:
    """Transformer and text encoders in a format of FORMS."""
    paths, parts = plain_files(small, folder).paths, ("transformer", "t5", "clip")
    weights = {part: write_quantized_safetensors(small.states()[part], paths[part], form) for part in parts}
    return Written(paths, parts, weights)


def gguf(small: Small, folder: Path, kind: str) -> Written:
    """Transformer and T5 as GGUF, T5 under llama.cpp's names."""
    paths, states = plain_files(small, folder).paths, small.states()
    paths |= {part: folder / f"{part}.gguf" for part in ("transformer", "t5")}
    transformer = write_gguf(states["transformer"], paths["transformer"], kind)
    t5 = write_gguf(llama_names(states["t5"]), paths["t5"], kind, "t5encoder")
    weights = {"transformer": transformer, "t5": dict(zip(states["t5"], t5.values(), strict=True))}
    return Written(paths, ("transformer", "t5"), {} if kind == "F32" else weights)


CONTAINERS: dict[str, Write] = {
    "BFL safetensors": plain_files,
    "diffusers files": diffusers_files,
    "diffusers folder, shards": diffusers_folder,
    "all-in-one": all_in_one,
}
"""Formats that store float32."""

HALVES: dict[str, Write] = {
    "fp16": partial(plain_files, dtype=torch.float16),
    "bf16": partial(plain_files, dtype=torch.bfloat16),
}

TITLES = {
    "scale_weight": "fp8 e4m3fn scale_weight",
    "metadata": "fp8 e4m3fn metadata",
    "comfy_quant": "fp8 e4m3fn comfy_quant",
    "int8 by rows": "int8 weight_scale",
    "SCB": "int8 bitsandbytes",
}
"""Longer names of FORMS."""

QUANTIZED: dict[str, Write] = {
    **{TITLES.get(form, form): partial(quantized, form=form) for form in FORMS},
    **{f"GGUF {kind}": partial(gguf, kind=kind) for kind in BLOCK_TYPES if kind != "F32"},
}

FORMATS: dict[str, Write] = {
    **CONTAINERS,
    "GGUF F32": partial(gguf, kind="F32"),
    **HALVES,
    **QUANTIZED,
}
EXACT = (*CONTAINERS, "GGUF F32")
"""Formats whose models, computed in float32, agree with the references up to rounding."""
