"""Tokenizers against transformers' own classes on the same vocabulary, and the order of the search."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from rectiflux.benchmarks.reference.text import WORDS, save_text_encoders, tokenizer
from rectiflux.flux_core.weights import load_text_encoders, read_weights
from rectiflux.flux_core.weights.sentencepiece import clip_from_files, t5_from_spiece
from rectiflux.flux_core.weights.tokenizer import CLIP_ENCODER, T5_ENCODER, find_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPTokenizer, T5Tokenizer

from .refusals import refusal

PIECES = [
    *(("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.5), ("▁r", -3.5), ("ed", -3.0)),
    *(("▁red", -4.0), ("▁fo", -4.5), ("x", -5.0), ("▁b", -5.5), ("b", -6.0), ("e", -6.5), ("o", -7.0)),
]
TEXTS = ["a red fox", "A  REDx\tfo b", "reed, fox!", "", "Aé a</s>red", "<extra_id_0> a"]
CHARSMAP_TEXT = "A becomes b"


def charsmap() -> bytes:
    """SentencePiece's normalization table of one rule, A -> b: a double array, then the strings."""
    units = [0] * 256
    units[0x41] = 0x41 | 1 << 8 | (0x41 ^ 0x80) << 10  # label, has a leaf, which is at 0x80
    units[0x80] = 1 << 31  # the leaf: the string that starts at byte 0
    array = struct.pack("<256I", *units)
    return struct.pack("<I", len(array)) + array + b"b\0"


def field(number: int, value: bytes) -> bytes:
    """A protobuf field of bytes."""
    length, rest = b"", len(value)
    while rest > 127:
        length, rest = length + bytes([rest & 127 | 128]), rest >> 7
    return bytes([number << 3 | 2]) + length + bytes([rest]) + value


def spiece(pieces: list[tuple[str, float]] = PIECES, table: bytes = b"") -> bytes:
    """A spiece.model: pieces with score and type, the trainer's settings (skipped), the normalizer."""
    data = b""
    for name, score in pieces:
        data += field(1, field(1, name.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18\x01")
    return data + field(2, b"\x08\x05") + field(3, field(1, b"nmt_nfkc") + field(2, table))


def ids(found: Tokenizer) -> list[list[int]]:
    return [found.encode(text).ids for text in [*TEXTS, CHARSMAP_TEXT]]


@pytest.mark.parametrize("table", [b"", charsmap()], ids=["no table", "table"])
def test_t5_s_ids_are_transformers(table: bytes) -> None:
    extra = [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    options = {"_spm_precompiled_charsmap": table} if table else {}
    reference = T5Tokenizer(vocab=[*PIECES, *extra], **options)
    found = t5_from_spiece(spiece([*PIECES, *extra], table))
    assert ids(found) == [reference(text).input_ids for text in [*TEXTS, CHARSMAP_TEXT]]
    assert (found.encode("A").ids == [10, 1]) == bool(table)  # ▁b


def clip_files(folder: Path) -> tuple[Path, Path]:
    """A small byte-level BPE: letters, letters that end a word, three merges and the special tokens."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789,!'<>|"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "fo"]
    words += ["Ã", "©</w>", "©", "<|startoftext|>", "<|endoftext|>"]
    merges = ["#version: 0.2", "r e", "re d</w>", "f o"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    return folder / "vocab.json", folder / "merges.txt"


def test_clip_s_ids_are_transformers(tmp_path: Path) -> None:
    vocab, merges = clip_files(tmp_path)
    words = json.loads(vocab.read_text())
    pairs = [tuple(line.split()) for line in merges.read_text().splitlines()[1:]]
    reference = CLIPTokenizer(vocab=words, merges=pairs)
    found = clip_from_files(vocab, merges)
    texts = ["a red fox", "RED  fox,\n12!", "", "é it's", "a<|endoftext|>b"]
    assert [found.encode(text).ids for text in texts] == [reference(text).input_ids for text in texts]
    assert found.encode("red").tokens == ["<|startoftext|>", "red</w>", "<|endoftext|>"]


# Where they are searched


def named(mark: str, end: str = "</s>") -> str:
    """A tokenizer.json that encodes every text as the token `mark` and the end token."""
    made = tokenizer("$A </s>").to_str().replace("<unk>", "<old>").replace('"fox"', f'"{mark}"')
    return made.replace('"unk_token":"<old>"', f'"unk_token":"{mark}"').replace("</s>", end)


def found_for(file: Path, host: list[Path] | None = None, encoder=T5_ENCODER) -> str:
    """The token that identifies the tokenizer that is found."""
    return find_tokenizer(read_weights(file), encoder, 20, host or []).encode("xyz").tokens[0]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encoder's file in a folder of its own, and an empty cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "models"
    folder.mkdir()
    save_file({"shared.weight": torch.zeros(2)}, folder / "t5.safetensors")
    return folder / "t5.safetensors"


def test_the_order(weights: Path, tmp_path: Path) -> None:
    """A place later in the order is used only while those before it are empty."""
    host = tmp_path / "host"
    snapshot = tmp_path / "hub" / "models--google--t5-v1_1-xxl" / "snapshots" / "abc"
    pipeline = weights.parent.parent / "tokenizer_2"
    places = {
        "cached": snapshot / "tokenizer.json",
        "host": host / "tokenizer.json",
        "pipeline": pipeline / "tokenizer.json",
        "folder": weights.parent / "tokenizer.json",
        "own": weights.with_suffix(".tokenizer.json"),
    }
    problem = refusal(lambda path: found_for(path, [host]), weights, error=FileNotFoundError)
    assert "t5.tokenizer.json" in problem and "spiece.model" in problem
    for mark, path in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(named(mark))
        assert found_for(weights, [host]) == mark


def test_clip_s_files(weights: Path) -> None:
    problem = refusal(lambda path: found_for(path, [], CLIP_ENCODER), weights, error=FileNotFoundError)
    assert "vocab.json and merges.txt" in problem
    clip_files(weights.parent)
    found = find_tokenizer(read_weights(weights), CLIP_ENCODER, 200)
    assert found.encode("red").tokens == ["<|startoftext|>", "red</w>", "<|endoftext|>"]
    (weights.parent / "merges.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match="^vocab.json beside merges.txt .*; download"):
        found_for(weights, [], CLIP_ENCODER)


def test_a_tokenizer_of_the_other_encoder_is_skipped(weights: Path, tmp_path: Path) -> None:
    """ComfyUI keeps both encoders in one folder."""
    (weights.parent / "tokenizer.json").write_text(named("clip", "<|endoftext|>"))
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "tokenizer.json").write_text(named("t5"))
    assert found_for(weights, [tmp_path / "host"]) == "t5"
    assert found_for(weights, [], CLIP_ENCODER) == "clip"
    refusal(found_for, weights, error=FileNotFoundError)


def test_spiece_beside_and_inside_the_weights(weights: Path) -> None:
    (weights.parent / "spiece.model").write_bytes(spiece())
    assert ids(find_tokenizer(read_weights(weights), T5_ENCODER, 20)) == ids(t5_from_spiece(spiece()))
    (weights.parent / "spiece.model").unlink()
    data = torch.frombuffer(bytearray(spiece()), dtype=torch.uint8)
    save_file({"shared.weight": torch.zeros(2), "spiece_model": data}, weights)
    assert ids(find_tokenizer(read_weights(weights), T5_ENCODER, 20)) == ids(t5_from_spiece(spiece()))


def test_gguf_metadata(weights: Path) -> None:
    path = weights.parent / "t5.gguf"
    writer = GGUFWriter(path, "t5encoder")
    writer.add_token_list([name for name, _ in PIECES])
    writer.add_token_scores([score for _, score in PIECES])
    writer.add_precompiled_charsmap(charsmap())
    writer.add_tensor("token_embd.weight", torch.zeros(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = ids(t5_from_spiece(spiece(table=charsmap())))
    assert ids(find_tokenizer(read_weights(path), T5_ENCODER, 20)) == expected


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", b"\x0a", b"\x0a" + b"\xff" * 10, spiece([("a", 0.0)]), spiece()[:-3]],
    ids=["empty", "text", "no length", "long length", "no end token", "cut"],
)
def test_other_bytes_are_not_a_sentencepiece_model(weights: Path, data: bytes) -> None:
    (weights.parent / "spiece.model").write_bytes(data)
    with pytest.raises(ValueError, match="SentencePiece model in spiece.model .*; download"):
        found_for(weights)


def test_an_encoder_with_its_tokenizer_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor of bytes is not taken for a weight."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    clip, t5 = save_text_encoders(tmp_path)
    t5.with_suffix(".tokenizer.json").unlink()
    pieces = PIECES[: len(WORDS)]
    data = torch.frombuffer(bytearray(spiece(pieces)), dtype=torch.uint8)
    tensors = {name: tensor.clone() for name, tensor in load_file(t5).items()}
    save_file({**tensors, "spiece_model": data}, t5)
    assert load_text_encoders(clip, t5).t5_tokenizer.get_vocab() == {n: i for i, (n, _) in enumerate(pieces)}
