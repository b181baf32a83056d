"""A safetensors file as mapped tensors by name; for any other file, one sentence on what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, UntypedStorage

from .file_names import PICKLES, check_encodable, has_ending
from .header_limits import check_entry

TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What the transformer's names start with in all-in-one checkpoints."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}
"""The dtypes of model files by their names in a safetensors header; the library reads tensors of others."""

MAX_HEADER = 1 << 24
"""Bytes of the longest header that is read; FLUX.1's has 0.1 MB, and may also hold a thumbnail."""

MAGIC = {
    b"<?xml": "an XML file; choose a .safetensors file",
    **{
        bytes([8, version, tag]): "an ONNX model; choose a .safetensors or .gguf file"
        for version in range(3, 16)
        for tag in (0x12, 0x3A)
    },
    **dict.fromkeys((b"ftrt", b"ptrt"), "a TensorRT engine; choose a .safetensors or .gguf file"),
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg"), "a GGML file of before GGUF; choose a .gguf file"),
    **dict.fromkeys(
        (b"7z\xbc\xaf", b"Rar!", b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd"),
        "an archive; choose the .safetensors file inside it",
    ),
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff", b"RIFF"), "an image or a film; choose a .safetensors file"),
    b"\x89HDF": "an HDF5 file; choose a .safetensors file",
    b"\x93NUMPY": "a NumPy array; choose a .safetensors file",
    bytes(64): "filled with zeros at its start, as an unfinished download is; download it again",
    b"PK\x03\x04": "a pickle inside a zip (torch.save); convert it to safetensors",
    **{bytes([0x80, protocol]): "a pickle; convert it to safetensors" for protocol in range(2, 6)},
    b"GGUF": "a GGUF file; choose a .safetensors file",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file that it points to",
    b"<": "a web page, saved in place of the model; download the model itself",
}
"""First bytes of the files that are most often mistaken for safetensors."""


TEXT = frozenset(b"\t\n\r" + bytes(range(32, 127)))
"""Bytes of plain text, such as an error of a server."""


def read_state_dict(path: str | Path, prefixes: Sequence[str] = TRANSFORMER_PREFIXES) -> dict[str, Tensor]:
    """Tensors by name, on the CPU in the file's dtypes; their memory is the mapped file, read when accessed.

    If any name starts with one of `prefixes`, as in an all-in-one checkpoint, only those tensors are returned
    and without it. Raises FileNotFoundError for a missing file, and ValueError for a folder, a pickle, a file
    that is empty, cut short or damaged, or of another format.
    """
    tensors, _ = read_safetensors(path)
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in tensors)), "")
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, mapped, and its metadata, empty if it has none. Raises as `read_state_dict`."""
    path = check_path(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < length < path.stat().st_size:
        raise ValueError(
            f"the header of {path.name} has {length:,} bytes, at most {MAX_HEADER:,} are read; "
            "choose another file"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return _mapped(path, file), dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(_what_is_wrong(path)) from error


def _mapped(path: Path, file: Any) -> dict[str, Tensor]:
    """The tensors of a file whose header the library has validated.

    Requesting each from the library would touch a byte of every tensor, and the system's read-ahead would
    then load up to half of a large file. Views of one mapping load nothing.
    """
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    storage: Any = UntypedStorage.from_file(str(path), False, path.stat().st_size)
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    tensors = {}
    for name in file.keys():
        dtype, shape = DTYPES.get(header[name]["dtype"]), header[name]["shape"]
        check_entry(path.name, name, shape)
        start, stop = (8 + length + offset for offset in header[name]["data_offsets"])
        if dtype is None or start % dtype.itemsize:  # older writers did not align
            tensors[name] = file.get_tensor(name)
        else:
            tensors[name] = whole[start:stop].view(dtype).view(shape)
    return tensors


def check_path(path: str | Path) -> Path:
    """The path, unless it cannot be a model file. Raises as `read_state_dict`."""
    path = Path(path)
    check_encodable(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder (diffusers' layout?); choose a single .safetensors file with BFL's names"
        )
    if not path.exists():
        raise FileNotFoundError(f"model file {path} does not exist; check its name and folder")
    if has_ending(path, PICKLES):
        raise ValueError(
            f"{path.name} is a pickle ({path.suffix}), which could run code; convert it to safetensors"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty (0 bytes); download it again")
    return path


def _other_format(start: bytes) -> str:
    """What a file is that begins with these bytes, and what to do."""
    if (
        start.startswith(b"PK\x03\x04")
        and b".pkl" not in start
        and start[30:31].isalnum()
        and b"/" not in start
    ):
        return "a zip archive; choose the .safetensors file inside it"
    what = next((what for magic, what in MAGIC.items() if start.startswith(magic)), None)
    if what is None and len(start) > 8 and all(byte in TEXT for byte in start):
        what = "a text file, saved in place of the model; download the model itself"
    return what or "not a safetensors file (it has no header); choose another file"


def _what_is_wrong(path: Path) -> str:
    """One sentence on why safetensors could not open the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if length > 100_000_000 or start[8:9] != b"{":
            return f"{path.name} is {_other_format(start)}"
        file.seek(8)
        header = file.read(length)
    try:
        entries = json.loads(header)
        needed = 8 + length + max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return f"the header of {path.name} is cut short or damaged ({size:,} bytes); download it again"
    if size < needed:
        return f"{path.name} is cut short: it has {size:,} of {needed:,} bytes; download it again"
    return f"{path.name} is damaged: its header does not describe its {size:,} bytes; download it again"
