"""A safetensors file as a dictionary of mapped tensors; what is wrong with another file, in one sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, UntypedStorage

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What stands before the transformer's names in all-in-one checkpoints."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""The dtypes of model files by their names in a safetensors header; others the library reads itself."""

MAX_HEADER = 1 << 24
"""Bytes of a safetensors header that are read: FLUX.1's takes 0.1 MB, and a thumbnail may lie beside it."""

MAGIC = {
    b"PK\x03\x04": "a pickle inside a zip (torch.save); convert it to safetensors",
    **{bytes([0x80, protocol]): "a pickle; convert it to safetensors" for protocol in range(2, 6)},
    b"GGUF": "a GGUF file; choose a .safetensors file",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file that it stands for",
    b"<": "a web page, saved in place of the model; download the model itself",
}
"""How the files begin that are most often mistaken for safetensors."""


def read_state_dict(path: str | Path, prefixes: Sequence[str] = TRANSFORMER_PREFIXES) -> dict[str, Tensor]:
    """Tensors by name, on the CPU in the file's dtypes; their memory is the mapped file, read when touched.

    Where names start with one of `prefixes`, as an all-in-one checkpoint's do, only these are given, and
    without it. Raises FileNotFoundError for a missing file, and ValueError for a folder, a pickle, a file
    that is empty, cut short or damaged, or of another format.
    """
    path = _opened(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            prefix = next((p for p in prefixes if any(name.startswith(p) for name in names)), "")
            return _mapped(path, file, {n: n[len(prefix) :] for n in names if n.startswith(prefix)})
    except SafetensorError as error:
        raise ValueError(_what_is_wrong(path)) from error


def _mapped(path: Path, file: Any, names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of a file whose header the library has checked, under their new names.

    Asked for one by one, the library touches a byte of each tensor, and the system reads ahead from there:
    up to half of a large file comes off the disk that nobody needs yet. Laid over one map, nothing does.
    """
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    storage: Any = UntypedStorage.from_file(str(path), False, path.stat().st_size)
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    tensors = {}
    for name, new in names.items():
        dtype, shape = DTYPES.get(header[name]["dtype"]), header[name]["shape"]
        start, stop = (8 + length + offset for offset in header[name]["data_offsets"])
        if dtype is None or start % dtype.itemsize:  # an older file may not be aligned
            tensors[new] = file.get_tensor(name)
        else:
            tensors[new] = whole[start:stop].view(dtype).view(shape)
    return tensors


def safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The file's metadata, empty when it has none. Raises as `read_state_dict`."""
    path = _opened(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(_what_is_wrong(path)) from error


def _opened(path: str | Path) -> Path:
    """The path, when a safetensors file may be there whose header is no larger than a model's can be."""
    path = checked(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < length < path.stat().st_size:
        raise ValueError(
            f"the header of {path.name} is {length:,} bytes long, no model's is above {MAX_HEADER:,}; "
            "choose another file"
        )
    return path


def checked(path: str | Path) -> Path:
    """The path, when a model's file may be there. Raises what `read_state_dict` raises for the rest."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder (diffusers' layout?); choose a single .safetensors file with BFL's names"
        )
    if not path.exists():
        raise FileNotFoundError(f"model file {path} does not exist; check its name and folder")
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path.name} is a pickle ({path.suffix}), which could run code; convert it to safetensors"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty (0 bytes); download it again")
    return path


def _what_is_wrong(path: Path) -> str:
    """One sentence on why safetensors could not open the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if length > 100_000_000 or start[8:9] != b"{":
            what = next((what for magic, what in MAGIC.items() if start.startswith(magic)), None)
            return (
                f"{path.name} is {what or 'not a safetensors file (it has no header); choose another file'}"
            )
        file.seek(8)
        header = file.read(length)
    try:
        entries = json.loads(header)
        needed = 8 + length + max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return f"the header of {path.name} is cut short or damaged ({size:,} bytes); download it again"
    if size < needed:
        return f"{path.name} is cut short: {size:,} of {needed:,} bytes are there; download it again"
    return f"{path.name} is damaged: its header does not describe its {size:,} bytes; download it again"
