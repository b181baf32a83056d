"""FLUX.1's two text encoders from two files or folders, with their tokenizers from wherever they are found.

Supported are T5 v1.1 encoders in safetensors (plain, fp8, scaled fp8, NF4, int8) and GGUF, CLIP-L, folders in
diffusers' or transformers' layout, and all-in-one checkpoints. Two settings that shapes do not show are read
from the metadata: T5's `txt_length`, the number of tokens that a prompt is padded to (512 by default), and
CLIP's `eos_token_id` (the last token of its vocabulary by default).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..model.text_encoders import T5_LENGTH, TextEncoders, clip_from_shapes, t5_from_shapes
from .assign import assign_weights
from .checkpoint import Checkpoint, PartWeights, Source
from .kinds import ModelKind, expect
from .messages import quoted
from .shape_errors import blame_file
from .source_files import remember_files
from .tokenizer import CLIP_ENCODER, EMBEDDED, T5_ENCODER, find_tokenizer
from .weight_file import Part, WeightFile

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

MAX_TXT_LENGTH, MAX_TOKEN_ID = 4096, 1_000_000
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
UNUSED_BY_CLIP = re.compile(
    r"(text_model\.)?embeddings\.position_ids|text_projection(\.weight)?|logit_scale|vision_model\..*|visual_projection\..*"
)
"""Tensors of CLIP files that FLUX.1 does not use."""


def load_text_encoders(
    clip: Source,
    t5: Source,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tokenizer_folders: Sequence[str | Path] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> TextEncoders:
    """CLIP and T5 with their tokenizers; dtypes as `load_transformer` chooses them.

    A tokenizer that is not beside its encoder is searched in the host's `tokenizer_folders`, in the local
    cache of Hugging Face and in GGUF metadata. `on_progress` is called with T5's bytes loaded so far and in
    total. Raises what `load_transformer` raises, FileNotFoundError for a tokenizer that is found nowhere, and
    ValueError for one that cannot be read and for metadata that is not a positive integer.
    """
    t5_weights, clip_weights = Checkpoint.open(t5).weights(Part.T5), Checkpoint.open(clip).weights(Part.CLIP)
    t5_model = _load_t5(t5_weights, dtype, device, on_progress)
    clip_model = _load_clip(clip_weights, dtype, device)
    t5_file, clip_file = t5_weights.file, clip_weights.file
    t5_tokenizer = find_tokenizer(t5_file, T5_ENCODER, t5_model.config.vocab_size, tokenizer_folders)
    clip_tokenizer = find_tokenizer(clip_file, CLIP_ENCODER, clip_model.config.vocab_size, tokenizer_folders)
    length = _positive_integer(t5_file, "txt_length", MAX_TXT_LENGTH) or T5_LENGTH
    return TextEncoders(t5_model, t5_tokenizer, clip_model, clip_tokenizer, length)


def _load_t5(
    weights: PartWeights,
    dtype: torch.dtype | None,
    device: torch.device | str,
    on_progress: Callable[[int, int], None] | None,
) -> T5EncoderModel:
    """The encoder of a T5 file, whose embedding may have either name or both."""
    expect(weights.kind, ModelKind.T5, weights.name)
    tensors = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if name != EMBEDDED and not name.startswith(("decoder.", "lm_head."))
    }
    for name, other in (EMBEDDINGS, EMBEDDINGS[::-1]):
        if other in tensors:
            tensors.setdefault(name, tensors[other])
    with blame_file(weights.name, ModelKind.T5, tensors):
        model = t5_from_shapes(tensors)
    model = assign_weights(model, tensors, weights.name, dtype, device, on_progress)
    model.tie_weights()
    remember_files(model, weights.file.states)
    return model


def _load_clip(weights: PartWeights, dtype: torch.dtype | None, device: torch.device | str) -> CLIPTextModel:
    """The text half of a CLIP file, without the projection, which FLUX.1 does not use."""
    expect(weights.kind, ModelKind.CLIP, weights.name)
    tensors = {
        name.removeprefix("text_model."): tensor
        for name, tensor in weights.tensors.items()
        if not UNUSED_BY_CLIP.fullmatch(name)
    }
    eos_token_id = _positive_integer(weights.file, "eos_token_id", MAX_TOKEN_ID)
    with blame_file(weights.name, ModelKind.CLIP, tensors):
        model = clip_from_shapes(tensors, eos_token_id)
    if hasattr(model, "text_model"):  # transformers before 5
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    model = assign_weights(model, tensors, weights.name, dtype, device)
    remember_files(model, weights.file.states)
    return model


def _positive_integer(file: WeightFile, key: str, limit: int) -> int | None:
    """A positive integer up to `limit` from the file's metadata, None where the key is missing."""
    value = file.metadata.get(key)
    if value is None:
        return None
    if not re.fullmatch("[0-9]{1,9}", value) or not 1 <= int(value) <= limit:
        raise ValueError(
            f"{key} in the metadata of {file.name} must be a positive integer up to {limit:,}, "
            f"got {quoted(value)}; correct the metadata"
        )
    return int(value)
