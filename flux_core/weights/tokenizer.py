"""Finds the tokenizer of a text encoder where users are likely to have one.

Searched in this order: beside the weights (NAME.tokenizer.json, or the usual names in the same folder), in
the weights, a folder given by the host, the local cache of Hugging Face (nothing is downloaded), and the
metadata of a GGUF file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

PADDING = 128
"""T5's embeddings are padded to a multiple of this: 32,128 rows for 32,100 tokens."""

EXTRA_IDS = 100
"""Tokens `<extra_id_0>` ... that T5's vocabulary has beyond the pieces of its SentencePiece model."""

MAX_TOKENIZER = 1 << 26
"""Bytes of a tokenizer's file that are read; T5's has 2.4 MB, those of large vocabularies 20 MB."""

MAX_REASON = 200
"""Characters of the library's reason in an error."""

PROBE = "a photo, 12"
"""Text that a tokenizer must encode to be accepted."""

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
    """The tokenizer of the encoder in `file`, whose embedding has `vocabulary` rows.

    Raises FileNotFoundError when none is found, and ValueError for a broken one and for a NAME.tokenizer.json
    that is another encoder's; elsewhere those of other encoders are skipped.
    """
    own = file.paths[0].with_suffix(".tokenizer.json")
    if own.is_file():
        tokenizer = _from_json(own)
        if not _belongs(tokenizer, vocabulary):
            raise ValueError(
                f"{own.name} has {_token_count(tokenizer):,} tokens, the vocabulary of {file.name} "
                f"{vocabulary:,}; put the tokenizer.json that belongs to this encoder there"
            )
        return tokenizer
    for tokenizer in _candidates(file, encoder, host_folders):
        if encoder.end in tokenizer.get_vocab() and _belongs(tokenizer, vocabulary):
            return tokenizer
    raise FileNotFoundError(
        f"{own.name} does not exist beside {file.name}, whose vocabulary has {vocabulary:,} tokens; "
        "put the encoder's tokenizer.json there under that name, or "
        f"{' and '.join(encoder.files)} into the same folder"
    )


def _token_count(tokenizer: Tokenizer) -> int:
    """The number of rows that the tokenizer's ids need."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _belongs(tokenizer: Tokenizer, vocabulary: int) -> bool:
    """Whether an embedding of `vocabulary` rows is this tokenizer's, padded to a multiple of 128 or less.

    A shorter tokenizer would never reach the rows beyond, and read prompts differently.
    """
    tokens = _token_count(tokenizer)
    longest = tokens + (0 if tokenizer.token_to_id("<extra_id_0>") is not None else EXTRA_IDS)
    return tokens <= vocabulary < longest + PADDING


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
        with _broken(paths[0].name):
            data = _read(paths[0])
        yield _from_spiece(data, paths[0].name)
        return
    with _broken("vocab.json beside merges.txt"):
        for path in paths:
            _read(path)
        tokenizer = _probed(clip_from_files(paths[0], paths[1]))
    yield tokenizer


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
    with _broken(f"the metadata of {name}"):
        pieces = [(str(token), float(score)) for token, score in zip(tokens, scores, strict=True)]
        tokenizer = _probed(t5_tokenizer(pieces, bytes(value & 255 for value in table)))
    yield tokenizer


def _from_json(path: Path) -> Tokenizer:
    with _broken(path.name):
        return _probed(Tokenizer.from_str(_read(path).decode("utf-8")))


def _from_spiece(data: bytes, name: str) -> Tokenizer:
    with _broken(f"the SentencePiece model in {name}"):
        return _probed(t5_from_spiece(data))


def _read(path: Path) -> bytes:
    """The bytes of a tokenizer's file. Raises ValueError for one that is too large."""
    size = path.stat().st_size
    if size > MAX_TOKENIZER:
        raise ValueError(f"it has {size:,} bytes, at most {MAX_TOKENIZER:,} are read")
    return path.read_bytes()


def _probed(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, once it has encoded a text: some files are found to be broken only then.

    The ids of the special tokens that it adds are stated apart from its vocabulary, and must lie in it.
    """
    tokenizer.no_padding()  # encoders pad with ids of their own
    tokens = _token_count(tokenizer)
    for text in (PROBE, ""):
        if (largest := max(tokenizer.encode(text).ids, default=0)) >= tokens > 0:
            raise ValueError(f"it adds the token id {largest:,}, its vocabulary has {tokens:,} tokens")
    return tokenizer


@contextmanager
def _broken(what: str) -> Iterator[None]:
    """Context that reports whatever the tokenizers library raises as a ValueError on `what`.

    It raises bare Exception for every kind of broken file, and a PanicException, which is a BaseException,
    for what its Rust code does not expect.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:MAX_REASON]
        raise ValueError(f"{what} is not a valid tokenizer ({reason}); download it again") from error
