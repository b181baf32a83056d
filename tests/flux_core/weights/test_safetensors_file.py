"""Safetensors files as mapped tensors, and everything else that has their name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core.weights import load_autoencoder, load_transformer, read_metadata, read_state_dict
from safetensors.torch import save_file

from .refusals import refusal

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
DTYPES += [torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, {"author": "someone"})
    return path


def test_metadata_and_tensors_of_the_mapped_file(file: Path, tmp_path: Path) -> None:
    """A byte changed on disk changes in a tensor that was read before: it was not copied."""
    assert read_metadata(str(file)) == {"author": "someone"}
    read = read_state_dict(file)
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    with file.open("r+b") as opened:
        opened.seek(start + json.loads(data[8:start])["a"]["data_offsets"][0])
        opened.write(torch.tensor(7.0).numpy().tobytes())
    assert read["a"][0, 0] == 7.0
    save_file(TENSORS, tmp_path / "plain.safetensors")
    assert read_metadata(tmp_path / "plain.safetensors") == {}


def test_unaligned_tensors_and_dtypes_that_only_the_library_reads(tmp_path: Path) -> None:
    """Older writers did not pad the header, and small tensors may precede large ones."""
    entries = {
        "a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "c": {"dtype": "U16", "shape": [1], "data_offsets": [11, 13]},
    }
    body = bytes([1, 2, 255]) + torch.tensor([1.5, -2.0]).numpy().tobytes() + bytes([7, 1])
    (tmp_path / "f").write_bytes(with_header(entries, body))
    read = read_state_dict(tmp_path / "f")
    assert [tensor.tolist() for tensor in read.values()] == [[1, 2, -1], [1.5, -2.0], [263]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"scalar": torch.tensor(2.0).to(dtype), "matrix": torch.arange(6.0).view(2, 3).to(dtype)}
    save_file(tensors, tmp_path / "f")
    read = read_state_dict(tmp_path / "f")
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].float(), tensor.float())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_the_prefix_of_all_in_one_files_is_removed(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "all.safetensors"
    save_file({f"{prefix}img_in.weight": torch.ones(2), "vae.decoder.bias": torch.ones(3)}, path)
    assert list(read_state_dict(path)) == ["img_in.weight"]
    assert list(read_state_dict(path, ("vae.",))) == ["decoder.bias"]
    assert len(read_state_dict(path, ())) == 2


def test_missing_files_folders_and_pickles(tmp_path: Path) -> None:
    refusal(read_state_dict, tmp_path / "gone.safetensors", error=FileNotFoundError)
    assert "is a folder" in refusal(read_state_dict, tmp_path)
    for suffix in (".ckpt", ".pt", ".pth", ".bin", ".PT", ".pkl"):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(b"whatever it holds, it is not opened")
        assert "could run code" in refusal(read_state_dict, path)


def with_header(entries: object, body: bytes = b"", length: int = 0) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode().ljust(length)
    return len(header).to_bytes(8, "little") + header + body


def tensor_at(start: int, end: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


MISMATCH = "header does not describe"
HEADER = "cut short or damaged"
CONTENT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "short": (b"abc", "not a safetensors file"),
    "garbage": (bytes(range(256)) * 40, "no header"),
    "pickle": (pickle.dumps({"a": 1}), "is a pickle"),
    "torch.save": (b"PK\x03\x04" + bytes(60), "pickle inside a zip"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(100), "is a GGUF file"),
    "HTML": (b"<!DOCTYPE html><html>not found</html>", "web page"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "zip of a model": (b"PK\x03\x04" + bytes(22) + b"\x0e\0\0\0ae.safetensors" + bytes(40), "zip archive"),
    "ONNX": (b"\x08\x0a\x12\x07pytorch" + bytes(90), "is an ONNX model"),
    "TensorRT": (b"ftrt" + bytes(range(100)), "is a TensorRT engine"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(100), "is an archive"),
    "XML": (b'<?xml version="1.0"?><net name="flux"/>', "an XML file"),
    "a server's answer": (b'{"error":"Access to model FLUX.1-dev is restricted"}', "a text file"),
    "zeros": (bytes(4000), "filled with zeros at its start"),
    "no JSON": (with_header(b"{abc}"), HEADER),
    "a list": (with_header(b"[]"), "not a safetensors file"),
    "no entry": (with_header({"a": [1]}), HEADER),
    "deeply nested": (with_header(b'{"a": ' + b"[" * 50_000), HEADER),
    "header of 2^63 bytes": ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "header longer than the file": ((90_000_000).to_bytes(8, "little") + b"{}", HEADER),
    "16 MB of header": (with_header({}, bytes(64), (1 << 24) + 8), "16,777,224"),
    "cut": (with_header({"a": tensor_at(0, 16)}, bytes(11)), "81 of 86 bytes"),
    "cut, header as long as a pickle's magic": (
        with_header({"a": tensor_at(0, 16)}, bytes(4), 640),
        "652 of 664",
    ),
    "more behind": (with_header({"a": tensor_at(0, 16)}, bytes(20)), MISMATCH),
    "outside": (with_header({"a": tensor_at(0, 10**12)}, bytes(16)), "of 1,000,000,000,0"),
    "before": (with_header({"a": tensor_at(-16, 0)}, bytes(16)), MISMATCH),
    "gap": (with_header({"a": tensor_at(8, 16)}, bytes(16)), MISMATCH),
    "backwards": (with_header({"a": tensor_at(16, 0)}, bytes(16)), MISMATCH),
    "overlap": (with_header({"a": tensor_at(0, 16), "b": tensor_at(8, 24)}, bytes(24)), MISMATCH),
    "other shape": (with_header({"a": tensor_at(0, 16, (5,))}, bytes(16)), MISMATCH),
    "absurd shape": (with_header({"a": tensor_at(0, 16, (2**62, 2**62))}, bytes(16)), MISMATCH),
    "unknown dtype": (with_header({"a": tensor_at(0, 16, (4,), "X9")}, bytes(16)), MISMATCH),
}


@pytest.mark.parametrize(("content", "problem"), CONTENT.values(), ids=CONTENT)
def test_damaged_hostile_and_other_files(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert problem in refusal(read_state_dict, path)
    loaders: tuple[Callable, ...] = (read_metadata, load_transformer, load_autoencoder)
    for load in loaders if content[:4] != b"GGUF" else ():
        assert problem in refusal(load, path)
