"""FLUX.1's two text encoders from two safetensors files, each with its tokenizer beside it.

Beside NAME.safetensors stands NAME.tokenizer.json, a file of Hugging Face's `tokenizers` (the tokenizer.json
of their model pages). What shapes cannot tell is read from the safetensors metadata: T5's `txt_length`, the
tokens that a text is padded to (512 unless given), and CLIP's `eos_token_id` (its last word unless given).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from ..conditioning import T5_LENGTH, TextEncoders, clip_of_size, t5_of_size
from .fill import fill
from .kinds import CLIP, T5, expect
from .loaders import sizes_of
from .quantised import assemble
from .source import CLIP_PART, T5_PART, WeightFile, read_weights

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")


def load_text_encoders(
    clip_path: str | Path,
    t5_path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> TextEncoders:
    """CLIP and T5 with their tokenizers; dtypes as `load_transformer` chooses them.

    Raises what `load_transformer` raises, FileNotFoundError for a missing tokenizer, and ValueError for one
    that cannot be read and for metadata that is no number.
    """
    t5, txt_length = _load_t5(t5_path, dtype, device)
    clip = _load_clip(clip_path, dtype, device)
    t5_tokenizer = read_tokenizer(t5_path, t5.config.vocab_size)
    clip_tokenizer = read_tokenizer(clip_path, clip.config.vocab_size)
    return TextEncoders(t5, t5_tokenizer, clip, clip_tokenizer, txt_length)


def _load_t5(
    path: str | Path, dtype: torch.dtype | None, device: torch.device | str
) -> tuple[T5EncoderModel, int]:
    """The encoder of a T5 file, and the length to pad to. A file has the embedding under one name or two."""
    file = read_weights(path, T5_PART)
    tensors = assemble(file)
    expect(tensors, T5, file.name)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
    for name, other in (EMBEDDINGS, EMBEDDINGS[::-1]):
        if other in tensors:
            tensors.setdefault(name, tensors[other])
    with sizes_of(file.name, T5, tensors):
        model = t5_of_size(tensors)
    model = fill(model, tensors, file.name, dtype, device)
    model.tie_weights()
    return model, _number(file, "txt_length") or T5_LENGTH


def _load_clip(path: str | Path, dtype: torch.dtype | None, device: torch.device | str) -> CLIPTextModel:
    """The text half of a CLIP file, without the projection, which FLUX.1 does not use."""
    file = read_weights(path, CLIP_PART)
    tensors = assemble(file)
    expect(tensors, CLIP, file.name)
    tensors = {name.removeprefix("text_model."): t for name, t in tensors.items()}
    for unused in ("embeddings.position_ids", "text_projection.weight", "logit_scale"):
        tensors.pop(unused, None)
    eos_token_id = _number(file, "eos_token_id")
    with sizes_of(file.name, CLIP, tensors):
        model = clip_of_size(tensors, eos_token_id)
    if hasattr(model, "text_model"):  # transformers before 5
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    return fill(model, tensors, file.name, dtype, device)


def read_tokenizer(model_path: str | Path, vocabulary: int) -> Tokenizer:
    """The tokenizer that stands beside the file of a text encoder that knows `vocabulary` tokens.

    Raises FileNotFoundError for a missing one, ValueError for one that is broken or another encoder's.
    """
    path = Path(model_path).with_suffix(".tokenizer.json")
    if not path.exists():
        raise FileNotFoundError(
            f"{path.name} does not exist beside {Path(model_path).name}; put the encoder's tokenizer.json "
            "there under that name"
        )
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception for every kind of broken file
        raise ValueError(f"{path.name} is not a tokenizer file ({error}); download it again") from error
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if tokens > vocabulary:
        raise ValueError(
            f"{path.name} makes {tokens:,} different tokens, {Path(model_path).name} knows {vocabulary:,}; "
            "put the tokenizer.json that belongs to this encoder there"
        )
    return tokenizer


def _number(file: WeightFile, key: str) -> int | None:
    """A positive whole number from the file's metadata, or None where it is not given."""
    value = file.metadata.get(key)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{key} in the metadata of {file.name} must be a number above 0, got {value!r}")
    return int(value)
