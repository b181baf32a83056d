"""Finds the tokenizer of a text encoder where users are likely to have one.

Searched in this order: beside the weights (NAME.tokenizer.json, or the usual names in the same folder), in
the weights, a folder given by the host, the local cache of Hugging Face (nothing is downloaded), and the
metadata of a GGUF file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .gguf_file import gguf_value
from .sentencepiece import CLIP_END, T5_END, clip_from_files, t5_from_spiece, t5_tokenizer
from .weight_file import WeightFile

if TYPE_CHECKING:
    from gguf import GGUFReader

EMBEDDED = "spiece_model"
"""The tensor of bytes in which ComfyUI stores a SentencePiece model with the weights."""


@dataclass(frozen=True)
class Encoder:
    """How to distinguish an encoder's tokenizer, and where to search for it.

    `end` is its end token, `files` are its usual file names, `pipeline` is its folder in diffusers' layout,
    `cached` are repositories that have it.
    """

    name: str
    end: str
    files: tuple[str, ...]
    pipeline: str
    cached: tuple[str, ...]


T5_ENCODER = Encoder(
    "T5",
    T5_END,
    ("spiece.model",),
    "tokenizer_2",
    (
        "google--t5-v1_1-xxl",
        "black-forest-labs--FLUX.1-dev/tokenizer_2",
        "black-forest-labs--FLUX.1-schnell/tokenizer_2",
        "city96--t5-v1_1-xxl-encoder-bf16",
        "google-t5--t5-small",
        "google-t5--t5-base",
    ),
)
CLIP_ENCODER = Encoder(
    "CLIP",
    CLIP_END,
    ("vocab.json", "merges.txt"),
    "tokenizer",
    (
        "openai--clip-vit-large-patch14",
        "black-forest-labs--FLUX.1-dev/tokenizer",
        "black-forest-labs--FLUX.1-schnell/tokenizer",
    ),
)


def find_tokenizer(
    file: WeightFile, encoder: Encoder, vocabulary: int, host_folders: Sequence[str | Path] = ()
) -> Tokenizer:
    """The tokenizer of the encoder in `file`, which has a vocabulary of `vocabulary` tokens.

    Raises FileNotFoundError when none is found, and ValueError for a broken one and for a NAME.tokenizer.json
    that is another encoder's; elsewhere those of other encoders are skipped.
    """
    own = file.paths[0].with_suffix(".tokenizer.json")
    if own.is_file():
        return _checked(_from_json(own), own.name, file.name, vocabulary)
    for tokenizer in _candidates(file, encoder, host_folders):
        words = tokenizer.get_vocab()
        if encoder.end in words and max(words.values()) < vocabulary:
            return tokenizer
    raise FileNotFoundError(
        f"{own.name} does not exist beside {file.name}; put the encoder's tokenizer.json there under that "
        f"name, or {' and '.join(encoder.files)} into the same folder"
    )


def _checked(tokenizer: Tokenizer, name: str, model: str, vocabulary: int) -> Tokenizer:
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if tokens > vocabulary:
        raise ValueError(
            f"{name} has {tokens:,} tokens, the vocabulary of {model} {vocabulary:,}; "
            "put the tokenizer.json that belongs to this encoder there"
        )
    return tokenizer


def _candidates(file: WeightFile, encoder: Encoder, host: Sequence[str | Path]) -> Iterator[Tokenizer]:
    """Tokenizers that may be the encoder's, in the order listed at the top of this file."""
    beside = file.paths[0].parent
    for folder in (beside, beside.parent / encoder.pipeline):
        yield from _in_folder(folder, encoder)
    embedded = file.tensors.get(EMBEDDED)
    if isinstance(embedded, Tensor) and encoder is T5_ENCODER:
        yield _from_spiece(bytes(embedded.to(torch.uint8).flatten().numpy()), file.name)
    for folder in (*map(Path, host), *_cached(encoder)):
        yield from _in_folder(folder, encoder)
    if file.gguf is not None and encoder is T5_ENCODER:
        yield from _in_gguf(file.gguf, file.name)


def _in_folder(folder: Path, encoder: Encoder) -> Iterator[Tokenizer]:
    """The tokenizer in a folder, under its usual file names."""
    if (folder / "tokenizer.json").is_file():
        yield _from_json(folder / "tokenizer.json")
    paths = [folder / name for name in encoder.files]
    if not all(path.is_file() for path in paths):
        return
    if encoder is T5_ENCODER:
        yield _from_spiece(paths[0].read_bytes(), paths[0].name)
        return
    try:
        yield clip_from_files(paths[0], paths[1])
    except Exception as error:  # tokenizers raises bare Exception for every kind of broken file
        raise ValueError(_broken("vocab.json beside merges.txt", error)) from error


def _cached(encoder: Encoder) -> Iterator[Path]:
    """Folders of the encoder's tokenizer in the local cache, as huggingface_hub lays it out."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub")
    for name in encoder.cached:
        repository, _, inner = name.partition("/")
        for snapshot in sorted(hub.glob(f"models--{repository}/snapshots/*")):
            yield snapshot / inner


def _in_gguf(reader: GGUFReader, name: str) -> Iterator[Tokenizer]:
    """The unigram tokenizer in a GGUF file's metadata, if there is one."""
    prefix = "tokenizer.ggml."
    tokens, scores = gguf_value(reader, f"{prefix}tokens"), gguf_value(reader, f"{prefix}scores")
    if not isinstance(tokens, list) or not isinstance(scores, list) or len(tokens) != len(scores):
        return
    table = gguf_value(reader, f"{prefix}precompiled_charsmap") or []
    try:
        pieces = [(str(token), float(score)) for token, score in zip(tokens, scores, strict=True)]
        yield t5_tokenizer(pieces, bytes(value & 255 for value in table))
    except Exception as error:  # tokenizers raises bare Exception for every kind of broken file
        raise ValueError(_broken(f"the metadata of {name}", error)) from error


def _from_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception for every kind of broken file
        raise ValueError(f"{path.name} is not a tokenizer file ({error}); download it again") from error


def _from_spiece(data: bytes, name: str) -> Tokenizer:
    try:
        return t5_from_spiece(data)
    except Exception as error:  # tokenizers raises bare Exception for every kind of broken file
        raise ValueError(_broken(f"the SentencePiece model in {name}", error)) from error


def _broken(what: str, error: Exception) -> str:
    return f"{what} is not a valid tokenizer ({error}); download it again"
