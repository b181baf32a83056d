"""GGUF files as mapped tensors, and headers that are cut short, damaged or hostile."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from rectiflux.benchmarks.reference.quantized import quantize_gguf
from rectiflux.flux_core.quant.formats import GGUFWeight
from rectiflux.flux_core.weights import load_transformer, read_metadata, read_weights

from .refusals import refusal

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
    """Floats as torch tensors, quantized ones as blocks; a byte changed on disk changes in a tensor."""
    values = np.arange(128, dtype=np.float32).reshape(2, 64)
    writer = GGUFWriter(tmp_path / "f", "flux")
    writer.add_string("general.name", "a name")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for kind in ("F32", "F16", "BF16", "Q8_0"):
        writer.add_tensor(kind, quantize_gguf(values, kind), raw_dtype=GGMLQuantizationType[kind])
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
        assert torch.equal(read.float(), torch.from_numpy(values).to(dtype).float())
    assert isinstance(file.tensors["Q8_0"], GGUFWeight)
    assert file.tensors["Q8_0"].shape == (2, 64)
    with (tmp_path / "f").open("r+b") as opened:
        opened.seek(gguf.GGUFReader(tmp_path / "f").tensors[0].data_offset)
        opened.write(struct.pack("<f", 7.0))
    assert isinstance(file.tensors["F32"], torch.Tensor)
    assert file.tensors["F32"][0, 0] == 7.0


def valid() -> bytes:
    return padded(header([tensor("a", [64, 2], F32, 0), tensor("b", [32], Q4_0, 512)]), 512 + 18)


def test_a_valid_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(valid())
    assert {n: t.shape for n, t in read_weights(tmp_path / "f").tensors.items()} == {"a": (2, 64), "b": (32,)}


HUGE = 2**62
CUT, DAMAGED = "is cut short", "is damaged"
BAD: dict[str, tuple[bytes, str, str]] = {
    "data cut": (valid()[:-1], CUT, f"{len(valid()) - 1} of {len(valid())} bytes"),
    "header cut": (valid()[:60], CUT, "60 bytes"),
    "only the magic": (b"GGUF", CUT, "4 bytes"),
    "version 1": (header([], version=1), "", "version 1,"),
    "big-endian": (header([], version=3 << 24), "", "version 50331648,"),
    "many tensors": (header([], counts=(HUGE, 0)), DAMAGED, "tensors"),
    "many keys": (header([], counts=(0, HUGE)), DAMAGED, "keys"),
    "long key": (header([], counts=(0, 1)) + struct.pack("<Q", HUGE) + b"x", CUT, "33 bytes"),
    "long string": (header([], [key("a", STRING, struct.pack("<Q", 2**63))]), CUT, ""),
    "long array": (header([], [key("a", ARRAY, struct.pack("<IQ", 0, HUGE))]), DAMAGED, "an array of"),
    "missing array": (header([], [key("a", ARRAY, struct.pack("<IQ", 0, 3_000_000))]), CUT, ""),
    "array of arrays": (header([], [key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), DAMAGED, "type 9"),
    "unknown value": (header([], [key("a", 77, b"")]), DAMAGED, "type 77"),
    "repeated key": (header([], [key("a", UINT32, bytes(4))] * 2), DAMAGED, "the key a"),
    "alignment of 0": (header([], [key("general.alignment", UINT32, bytes(4))]), DAMAGED, "alignment is 0"),
    "alignment as text": (header([], [key("general.alignment", STRING, text("32"))]), DAMAGED, "alignment"),
    "name not UTF-8": (header([tensor(b"\xff\xfe", [4], F32, 0)]), DAMAGED, "UTF-8"),
    "no dimensions": (header([tensor("a", [], F32, 0)]), DAMAGED, "0 dimensions"),
    "a million dimensions": (
        header([], counts=(1, 0)) + text("a") + struct.pack("<I", 10**6),
        DAMAGED,
        "1,000,000 dimensions",
    ),
    "absurd shape": (header([tensor("a", [2**40, 2**40], F32, 0)]), DAMAGED, "1099511627776"),
    "empty": (header([tensor("a", [0], F32, 0)]), DAMAGED, "shape [0]"),
    "half a block": (header([tensor("a", [48, 2], Q4_0, 0)]), DAMAGED, "[2, 48]"),
    "unsupported type": (padded(header([tensor("a", [256], IQ1_S, 0)]), 50), "", "IQ1_S"),
    "unknown type": (header([tensor("a", [4], 999, 0)]), "", "999"),
    "outside": (padded(header([tensor("a", [4], F32, 2**40)]), 16), CUT, "of 1,099,511,"),
    "not aligned": (padded(header([tensor("a", [4], F32, 8)]), 32), DAMAGED, "multiple of 32"),
    "overlap": (
        padded(header([tensor("a", [64], F32, 0), tensor("b", [64], F32, 32)]), 512),
        DAMAGED,
        "b overlaps a",
    ),
    "repeated tensor": (
        padded(header([tensor("a", [8], F32, 0), tensor("a", [8], F32, 32)]), 64),
        DAMAGED,
        "tensor",
    ),
}


@pytest.mark.parametrize(("data", "problem", "value"), BAD.values(), ids=BAD)
def test_bad_files(
    tmp_path: Path, data: bytes, problem: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by our validation of the header, before the package's reader opens the file."""
    monkeypatch.setattr(gguf, "GGUFReader", None)
    (tmp_path / "f").write_bytes(data)
    for load in (read_metadata, load_transformer):
        message = refusal(load, tmp_path / "f")
        assert problem in message and value in message


def test_every_cut_is_reported(tmp_path: Path) -> None:
    """Cut at any byte, the file is called cut short; never something else, never a crash."""
    whole = valid()
    for length in range(4, len(whole), 7):
        (tmp_path / "f").write_bytes(whole[:length])
        assert CUT in refusal(read_weights, tmp_path / "f")


def test_every_flipped_byte_of_a_header_is_survived(tmp_path: Path) -> None:
    """A file with any one byte changed loads, or is refused in a sentence."""
    whole = valid()
    for place in range(4, 128):
        for value in (0, 1, 127, 255):
            (tmp_path / "f").write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                read_weights(tmp_path / "f")
            except ValueError as refused:
                assert "download it again" in str(refused) or "choose" in str(refused)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(valid())
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refusal(read_weights, tmp_path / "f")


def test_a_language_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(padded(header([tensor("blk.0.attn_q.weight", [4], F32, 0)]), 16))
    assert "is a language model, not a FLUX.1 transformer" in refusal(load_transformer, tmp_path / "f")
