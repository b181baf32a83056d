"""GGUF files as they should be, and headers that are cut short, damaged or hostile: one sentence each."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from rectiflux.benchmarks.reference.quantized import quantize_gguf
from rectiflux.flux_core.quant.formats import GGUFWeight
from rectiflux.flux_core.weights import load_transformer, read_metadata, read_weights

F32, Q4_0, IQ1_S = 0, 2, 19
STRING, ARRAY, UINT32 = 8, 9, 4


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, shape: list[int], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def header(
    tensors: list[bytes],
    keys: list[bytes] | None = None,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    keys = keys or []
    count = counts or (len(tensors), len(keys))
    return b"GGUF" + struct.pack("<IQQ", version, *count) + b"".join(keys) + b"".join(tensors)


def padded(data: bytes, body: int) -> bytes:
    return data + bytes(-len(data) % 32 + body)


def test_tensors_metadata_and_memory(tmp_path: Path) -> None:
    """Floats as torch's own, packed ones as blocks; both see a byte that changes on the disk."""
    numbers = np.arange(128, dtype=np.float32).reshape(2, 64)
    writer = GGUFWriter(tmp_path / "f", "flux")
    writer.add_string("general.name", "a name")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for kind in ("F32", "F16", "BF16", "Q8_0"):
        writer.add_tensor(kind, quantize_gguf(numbers, kind), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_weights(tmp_path / "f")
    assert (file.format, file.size) == ("GGUF", (tmp_path / "f").stat().st_size)
    assert read_metadata(tmp_path / "f")["general.name"] == "a name"
    assert "tokenizer.ggml.tokens" not in file.metadata
    for name, dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        read = file.tensors[name]
        assert isinstance(read, torch.Tensor) and read.dtype == dtype
        assert torch.equal(read.float(), torch.from_numpy(numbers).to(dtype).float())
    assert isinstance(file.tensors["Q8_0"], GGUFWeight)
    assert file.tensors["Q8_0"].shape == (2, 64)
    with (tmp_path / "f").open("r+b") as opened:
        opened.seek(gguf.GGUFReader(tmp_path / "f").tensors[0].data_offset)
        opened.write(struct.pack("<f", 7.0))
    assert isinstance(file.tensors["F32"], torch.Tensor)
    assert file.tensors["F32"][0, 0] == 7.0


def sound() -> bytes:
    return padded(header([tensor("a", [64, 2], F32, 0), tensor("b", [32], Q4_0, 512)]), 512 + 18)


def test_the_sound_file_of_these_tests_is_sound(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(sound())
    assert {n: t.shape for n, t in read_weights(tmp_path / "f").tensors.items()} == {"a": (2, 64), "b": (32,)}


HUGE = 2**62

BAD: dict[str, tuple[bytes, str]] = {
    "numbers cut": (
        sound()[:-1],
        rf"f is cut short: {len(sound()) - 1} of {len(sound())} bytes are there; download it again",
    ),
    "header cut": (sound()[:60], "f is cut short: its header goes on behind its 60 bytes; download it again"),
    "only a magic": (b"GGUF", "f is cut short: its header goes on behind its 4 bytes"),
    "version 1": (header([], version=1), "f is GGUF of version 1, 2 and 3 are read; choose a newer file"),
    "big-endian": (header([], version=3 << 24), "f is GGUF of version 50331648, 2 and 3 are read"),
    "many tensors": (
        header([], counts=(HUGE, 0)),
        r"the header of f is damaged \(it counts [\d,]+ tensors\);",
    ),
    "many keys": (header([], counts=(0, HUGE)), r"the header of f is damaged \(it counts [\d,]+ keys\);"),
    "long key": (
        header([], counts=(0, 1)) + struct.pack("<Q", HUGE) + b"x",
        "f is cut short: its header goes on behind its 33 bytes",
    ),
    "long string": (
        header([], [key("a", STRING, struct.pack("<Q", 2**63))]),
        "f is cut short: its header goes on behind",
    ),
    "long array": (
        header([], [key("a", ARRAY, struct.pack("<IQ", 0, HUGE))]),
        r"damaged \(it holds an array of [\d,]+ values\); download",
    ),
    "array that is not there": (
        header([], [key("a", ARRAY, struct.pack("<IQ", 0, 3_000_000))]),
        "f is cut short: its header goes on behind",
    ),
    "array of arrays": (
        header([], [key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]),
        r"damaged \(it holds an array of values of type 9\);",
    ),
    "unknown value": (header([], [key("a", 77, b"")]), r"damaged \(it holds a value of type 77\); download"),
    "key twice": (
        header([], [key("a", UINT32, bytes(4))] * 2),
        r"damaged \(the key a is there twice\); download it again",
    ),
    "alignment of 0": (
        header([], [key("general.alignment", UINT32, bytes(4))]),
        r"damaged \(its alignment is 0\); download it again",
    ),
    "alignment as text": (
        header([], [key("general.alignment", STRING, text("32"))]),
        r"damaged \(its alignment is no number\); download it again",
    ),
    "name of no text": (
        header([tensor(b"\xff\xfe", [4], F32, 0)]),
        r"damaged \(a name is not UTF-8\); download it again",
    ),
    "no dimensions": (header([tensor("a", [], F32, 0)]), r"damaged \(a has 0 dimensions\); download"),
    "a million dimensions": (
        header([], counts=(1, 0)) + text("a") + struct.pack("<I", 10**6),
        r"damaged \(a has 1,000,000 dimensions\);",
    ),
    "absurd shape": (
        header([tensor("a", [2**40, 2**40], F32, 0)]),
        r"damaged \(a is \[1099511627776, 1099511627776\], which F32 cannot be\);",
    ),
    "empty": (header([tensor("a", [0], F32, 0)]), r"damaged \(a is \[0\], which F32 cannot be\); download"),
    "half a block": (
        header([tensor("a", [48, 2], Q4_0, 0)]),
        r"damaged \(a is \[2, 48\], which Q4_0 cannot be\);",
    ),
    "unread type": (
        padded(header([tensor("a", [256], IQ1_S, 0)]), 50),
        "f holds a as type IQ1_S, which is not read; choose one of F32, F16, BF16, Q8_0",
    ),
    "unknown type": (header([tensor("a", [4], 999, 0)]), "f holds a as type number 999, which is not read"),
    "outside": (
        padded(header([tensor("a", [4], F32, 2**40)]), 16),
        r"f is cut short: \d+ of 1,099,511,[\d,]+ bytes are there; download it again",
    ),
    "crooked": (
        padded(header([tensor("a", [4], F32, 8)]), 32),
        r"damaged \(a does not lie at a multiple of 32\); download it again",
    ),
    "overlap": (
        padded(header([tensor("a", [64], F32, 0), tensor("b", [64], F32, 32)]), 512),
        r"damaged \(b lies over a\); download it again",
    ),
    "twice": (
        padded(header([tensor("a", [8], F32, 0), tensor("a", [8], F32, 32)]), 64),
        r"damaged \(a tensor is there twice\); download it again",
    ),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("load", [read_weights, read_metadata, load_transformer])
def test_bad_files(
    tmp_path: Path, data: bytes, message: str, load: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the walk over the header, before the package's reader sees the file."""

    def never(*_: object) -> None:
        raise AssertionError("the reader was asked")

    monkeypatch.setattr(gguf, "GGUFReader", never)
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(ValueError, match=message) as refused:
        load(tmp_path / "f")
    assert str(refused.value).count(".") <= 1 and "\n" not in str(refused.value)


def test_every_cut_is_told(tmp_path: Path) -> None:
    """At any byte, the file is called cut short or no model; never something else, never a crash."""
    whole = sound()
    for length in range(4, len(whole), 7):
        (tmp_path / "f").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="^f is cut short: "):
            read_weights(tmp_path / "f")


def test_every_flipped_byte_of_a_header_is_survived(tmp_path: Path) -> None:
    """A file with any one byte changed loads, or is refused in a sentence."""
    whole = sound()
    for place in range(4, 128):
        for value in (0, 1, 127, 255):
            (tmp_path / "f").write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                read_weights(tmp_path / "f")
            except ValueError as refused:
                assert "download it again" in str(refused) or "choose" in str(refused)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(sound())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ValueError, match="^f is a GGUF file, which needs .* gguf; install it: pip install gguf$"
    ):
        read_weights(tmp_path / "f")


def test_a_language_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(padded(header([tensor("blk.0.attn_q.weight", [4], F32, 0)]), 16))
    with pytest.raises(ValueError, match="^f is a language model, not a FLUX.1 transformer; choose a FLUX.1"):
        load_transformer(tmp_path / "f")
