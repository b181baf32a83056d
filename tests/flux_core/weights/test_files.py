"""Safetensors files as they should be, and every way in which a file can be something else."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core.weights import read_metadata, read_state_dict
from rectiflux.flux_core.weights.safetensors_file import DTYPES
from safetensors.torch import save_file

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, {"author": "someone"})
    return path


def test_names_numbers_and_dtypes_are_the_files(file: Path) -> None:
    read = read_state_dict(file)
    assert {name: tensor.dtype for name, tensor in read.items()} == {"a": torch.float32, "b": torch.bfloat16}
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert read_metadata(str(file)) == {"author": "someone"}


def test_no_metadata_is_an_empty_dictionary(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "plain.safetensors")
    assert read_metadata(tmp_path / "plain.safetensors") == {}


def test_tensors_are_the_mapped_file(file: Path) -> None:
    """Both reads see a byte changed on the disk: nothing was copied into memory of our own."""
    first = read_state_dict(file)["a"]
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    offset = start + json.loads(data[8:start])["a"]["data_offsets"][0]
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(torch.tensor(7.0).numpy().tobytes())
    assert first[0, 0] == 7.0


def test_tensors_that_are_not_aligned(tmp_path: Path) -> None:
    """Older writers did not pad the header, and small tensors may stand before large ones."""
    entries = {
        "a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "c": {"dtype": "U16", "shape": [1], "data_offsets": [11, 13]},
    }
    body = bytes([1, 2, 255]) + torch.tensor([1.5, -2.0]).numpy().tobytes() + bytes([7, 1])
    (tmp_path / "f").write_bytes(hostile(json.dumps(entries).encode(), body))
    read = read_state_dict(tmp_path / "f")
    assert [tensor.tolist() for tensor in read.values()] == [[1, 2, -1], [1.5, -2.0], [263]]


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """Scalars and matrices, as the library writes them."""
    tensors = {"scalar": torch.tensor(2.0).to(dtype), "matrix": torch.arange(6.0).view(2, 3).to(dtype)}
    save_file(tensors, tmp_path / "f")
    read = read_state_dict(tmp_path / "f")
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].float(), tensor.float())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefix_of_all_in_one_files_is_taken_off(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "all.safetensors"
    save_file({f"{prefix}img_in.weight": torch.ones(2), "vae.decoder.bias": torch.ones(3)}, path)
    assert list(read_state_dict(path)) == ["img_in.weight"]
    assert list(read_state_dict(path, ("vae.",))) == ["decoder.bias"]
    assert len(read_state_dict(path, ())) == 2


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="model file .*gone.safetensors does not exist; check its name"
    ):
        read_state_dict(tmp_path / "gone.safetensors")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is a folder \(diffusers' layout\?\); choose a single .safetensors file"
    ):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".PT", ".pkl"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"whatever it holds, it is not opened")
    with pytest.raises(
        ValueError, match=f"model{suffix} is a pickle .* could run code; convert it to safetensors"
    ):
        read_state_dict(path)


def cut(data: bytes) -> bytes:
    return data[:-5]


def in_the_header(data: bytes) -> bytes:
    return data[:40]


def with_more_behind(data: bytes) -> bytes:
    return data + b"more"


def with_broken_offsets(data: bytes) -> bytes:
    return data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"model.safetensors is cut short: [\d,]+ of [\d,]+ bytes are there; download it again"),
        (
            in_the_header,
            r"the header of model.safetensors is cut short or damaged \(40 bytes\); download it again",
        ),
        (with_more_behind, r"model.safetensors is damaged: its header does not describe its [\d,]+ bytes"),
        (with_broken_offsets, "model.safetensors is damaged: its header does not describe"),
    ],
)
@pytest.mark.parametrize("read", [read_state_dict, read_metadata])
def test_damaged_files(file: Path, damage, message: str, read) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read(file)


def test_missing_bytes_are_counted(file: Path) -> None:
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"cut short: {whole - 5:,} of {whole:,} bytes"):
        read_state_dict(file)


def hostile(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def entry(start: int, end: int) -> bytes:
    """A file of 16 bytes and one tensor that claims to lie somewhere."""
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [start, end]}
    return hostile(json.dumps({"a": tensor}).encode(), bytes(16))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x.safetensors is empty \(0 bytes\); download it again"),
        (b"abc", "x.safetensors is not a safetensors file"),
        (bytes(range(256)) * 40, r"is not a safetensors file \(it has no header\); choose another file"),
        (pickle.dumps({"a": 1}), "x.safetensors is a pickle; convert it to safetensors"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "x.safetensors is a GGUF file; choose a .safetensors file"),
        (
            b"<!DOCTYPE html><html>not found</html>",
            "is a web page, saved in place of the model; download the",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer; fetch the file that it",
        ),
        (b"\x05\x00\x00\x00\x00\x00\x00\x00{abc}", "the header of x.safetensors is cut short or damaged"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "is not a safetensors file"),
        (
            b'\x0a\x00\x00\x00\x00\x00\x00\x00{"a": [1]}',
            "the header of x.safetensors is cut short or damaged",
        ),
        (hostile(b'{"a": ' + b"[" * 50_000), "the header of x.safetensors is cut short or damaged"),
        ((2**63).to_bytes(8, "little") + b"{}", "x.safetensors is not a safetensors file"),
        ((90_000_000).to_bytes(8, "little") + b"{}", "the header of x.safetensors is cut short or damaged"),
        (entry(0, 10**12), r"x.safetensors is cut short: \d+ of 1,000,000,000,\d+ bytes are there"),
        (entry(-16, 0), "x.safetensors is damaged: its header does not describe its"),
        (entry(8, 16), "x.safetensors is damaged: its header does not describe its"),
    ],
    ids=[
        *("empty", "short", "garbage", "pickle", "gguf", "html", "lfs", "json", "list", "entries"),
        *("nested", "huge header", "large header", "outside", "before", "gap"),
    ],
)
def test_other_formats(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_state_dict(path)


def test_torch_save_under_a_wrong_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    with pytest.raises(ValueError, match=r"is a pickle inside a zip \(torch.save\); convert it to"):
        read_state_dict(path)


def test_a_cut_file_whose_header_length_looks_like_a_pickle(tmp_path: Path) -> None:
    """A header of 640 bytes starts the file with 80 02, as pickles start."""
    path = tmp_path / "x.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).ljust(640).encode()
    path.write_bytes((640).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="x.safetensors is cut short: 652 of 656 bytes are there"):
        read_state_dict(path)
