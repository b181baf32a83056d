"""The stage `export`: the other stages' results in half precision, as the files of models/."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from ..flux_core.model.autoencoder import to_model_space
from ..flux_core.sampling import preview
from ..flux_core.train.checkpoint import write_safetensors
from ..flux_core.weights import load_autoencoder
from .autoencoder import draw_batch
from .folder import Folder, read_tensors, text_files

EXPORTED = {
    "base": ("diffusion_models/rectiflux-mini-pro", "Rectiflux mini-pro"),
    "guidance": ("diffusion_models/rectiflux-mini-dev", "Rectiflux mini-dev"),
    "kontext": ("diffusion_models/rectiflux-mini-kontext", "Rectiflux mini-kontext"),
    "canny": ("diffusion_models/rectiflux-mini-canny", "Rectiflux mini-canny"),
    "fill": ("diffusion_models/rectiflux-mini-fill", "Rectiflux mini-fill"),
    "reflow": ("diffusion_models/rectiflux-mini-reflow", "Rectiflux mini-pro, reflowed"),
    "decide": ("diffusion_models/rectiflux-mini-schnell", "Rectiflux mini-schnell"),
    "autoencoder": ("vae/rectiflux-mini-vae", "Rectiflux miniature autoencoder"),
}
"""Path under models/ and title in the metadata of each exported stage."""


def export(folder: Folder, models: Path) -> None:
    """Write the files of all stages that have run, in float16, with the metadata that loaders need."""
    title = {"modelspec.author": "Rectiflux", "modelspec.license": "Apache-2.0"}
    previews = preview.to_metadata(fit_preview(folder))
    files = {stage: folder.file(stage) for stage in EXPORTED}
    sources = {file: EXPORTED[stage] for stage, file in files.items() if file.exists()}
    for kind, path in zip(("clip", "t5"), text_files(folder), strict=True):
        sources[path] = (f"text_encoders/{path.stem}", f"Rectiflux miniature {kind.upper()}")
        text = path.with_suffix(".tokenizer.json").read_text(encoding="utf-8")
        (models / "text_encoders").mkdir(parents=True, exist_ok=True)
        (models / "text_encoders" / f"{path.stem}.tokenizer.json").write_text(text, encoding="utf-8")
    for source, (target, name) in sources.items():
        tensors, metadata = read_tensors(source)
        metadata |= previews if target.startswith("diffusion_models") else {}
        half = {key: value.half() for key, value in tensors.items()}
        named = metadata | title | {"modelspec.title": name}
        write_safetensors(models / f"{target}.safetensors", half, named)


def fit_preview(folder: Folder) -> preview.Factors:
    """The linear map from latents to preview images that the transformers' files contain."""
    images = draw_batch(64, random.Random(0))
    autoencoder = load_autoencoder(folder.file("autoencoder"), dtype=torch.float32)
    return preview.fit(to_model_space(autoencoder.encode(images)), images)
