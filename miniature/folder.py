"""The training folder: where stages keep their files, and how one reads what another wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.train.loop import device
from ..flux_core.weights import load_text_encoders, load_transformer


@dataclass(frozen=True)
class Folder:
    """The files of a training, by stage."""

    path: Path

    def file(self, stage: str) -> Path:
        """The file that a stage writes, or the first of them."""
        names = {"text": "text_encoders/rectiflux-mini-t5", "data": "latents", "pairs": "pairs/00000"}
        return self.path / f"{names.get(stage, stage)}.safetensors"

    @property
    def encoder(self) -> Path:
        """The autoencoder whose decoder is untrained, written by the stage data."""
        return self.path / "encoder.safetensors"


def read_encoders(folder: Folder) -> TextEncoders:
    """The trained text encoders."""
    encoders = load_text_encoders(*text_files(folder), dtype=torch.float32)
    for model in (encoders.t5, encoders.clip):
        torch.nn.Module.to(model, device())
    return encoders


def read_transformer(path: Path) -> FluxTransformer:
    """A stage's transformer in float32, trainable, its weights copied into memory."""
    model = load_transformer(path, dtype=torch.float32).requires_grad_(True)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # loaded weights are mapped from the file
    return model


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def text_files(folder: Folder) -> tuple[Path, Path]:
    """(CLIP's file, T5's file)."""
    t5 = folder.file("text")
    return t5.with_name("rectiflux-mini-clip.safetensors"), t5
