"""Builds the tokenizers of T5 and CLIP from files other than Hugging Face's tokenizer.json.

T5's is a SentencePiece unigram model (spiece.model, or the same in a GGUF file's metadata), CLIP's a BPE over
bytes (vocab.json and merges.txt). Built as transformers builds them (models/t5/tokenization_t5.py,
models/clip/tokenization_clip.py), with their end tokens in the template.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

T5_END, T5_UNKNOWN = "</s>", "<unk>"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_PATTERN = (
    r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
)


def t5_tokenizer(pieces: list[tuple[str, float]], charsmap: bytes = b"") -> Tokenizer:
    """T5's tokenizer from its pieces with their scores and SentencePiece's normalization table.

    Raises ValueError when the end token or the unknown token is missing.
    """
    names = [piece for piece, _ in pieces]
    for token in (T5_END, T5_UNKNOWN):
        if token not in names:
            raise ValueError(f"it has no {token}")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=names.index(T5_UNKNOWN), byte_fallback=False))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {T5_END}", special_tokens=[(T5_END, names.index(T5_END))]
    )
    special = [
        name for name in names if name in (T5_END, T5_UNKNOWN, "<pad>") or name.startswith("<extra_id_")
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


def clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """CLIP's tokenizer from its vocabulary (token to id) and its merges in order of rank.

    Raises ValueError when the start or end token is missing.
    """
    for token in (CLIP_START, CLIP_END):
        if token not in vocab:
            raise ValueError(f"it has no {token}")
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=CLIP_END,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_END, vocab[CLIP_END]), (CLIP_START, vocab[CLIP_START]), False, False
    )
    tokenizer.add_special_tokens([CLIP_START, CLIP_END])
    return tokenizer


def clip_from_files(vocab: Path, merges: Path) -> Tokenizer:
    """CLIP's tokenizer from vocab.json and merges.txt. Raises ValueError for files of another kind."""
    words = json.loads(vocab.read_text(encoding="utf-8"))
    if not isinstance(words, dict) or not all(isinstance(index, int) for index in words.values()):
        raise ValueError(f"{vocab.name} does not map tokens to ids")
    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{merges.name} has a line that is not a pair")
    return clip_tokenizer(words, [(one, other) for one, other in pairs])


def t5_from_spiece(data: bytes) -> Tokenizer:
    """T5's tokenizer from the bytes of a spiece.model. Raises ValueError for other bytes.

    The fields are those of sentencepiece_model.proto: 1 is a piece (1 name, 2 score), 3 the normalizer, whose
    field 2 is its table.
    """
    pieces: list[tuple[str, float]] = []
    charsmap = b""
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            fields = dict(_fields(value))
            name, score = fields.get(1), fields.get(2, 0.0)
            if not isinstance(name, bytes) or not isinstance(score, float):
                raise ValueError("a piece has no name or score")
            pieces.append((name.decode("utf-8"), score))
        elif field == 3 and isinstance(value, bytes):
            table = dict(_fields(value)).get(2)
            charsmap = table if isinstance(table, bytes) else b""
    return t5_tokenizer(pieces, charsmap)


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int | float]]:
    """(field number, value) of each field of a protobuf message. Raises ValueError for other bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 64, 7):
            if at >= len(data):
                raise ValueError("it is cut short")
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("it is not a SentencePiece model")

    while at < len(data):
        field, kind = divmod(varint(), 8)
        if kind == 0:
            yield field, varint()
            continue
        length = {1: 8, 5: 4}.get(kind)
        if length is None:
            if kind != 2:
                raise ValueError("it is not a SentencePiece model")
            length = varint()
        if length > len(data) - at:
            raise ValueError("it is cut short")
        value = data[at : at + length]
        at += length
        yield field, struct.unpack("<f", value)[0] if kind == 5 else value
