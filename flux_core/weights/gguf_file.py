"""A GGUF file as tensors, read by the `gguf` package once its header has been validated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..quant.formats import GGUFWeight, QuantizedWeight
from .gguf_header import check_gguf

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""GGUF types that torch has as dtypes."""


def is_gguf(path: Path) -> bool:
    """Whether a file begins with GGUF's magic bytes."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_gguf(path: Path) -> tuple[dict[str, Tensor | QuantizedWeight], dict[str, str], GGUFReader]:
    """Tensors by name, the file's single values as text, and the open reader.

    Types that torch has are tensors, packed ones `GGUFWeight`; the memory of both is the mapped file. Raises
    ValueError for a file that is cut short, damaged, or of unsupported types.
    """
    reader = open_gguf(path)
    tensors: dict[str, Tensor | QuantizedWeight] = {}
    for tensor in reader.tensors:
        kind, data = tensor.tensor_type.name, torch.from_numpy(tensor.data)
        tensors[tensor.name] = data.view(FLOATS[kind]) if kind in FLOATS else GGUFWeight(data, kind)
    values = {key: field.contents() for key, field in reader.fields.items() if len(field.types) == 1}
    return tensors, {key: str(value) for key, value in values.items()}, reader


def gguf_value(reader: GGUFReader, key: str) -> Any:
    """The value of a key, a list for an array, or None."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def open_gguf(path: Path) -> GGUFReader:
    """The package's reader over a private mapping: writing to its tensors does not change the file."""
    try:
        from gguf import GGUFReader  # here, because ComfyUI imports the pack at its start
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path.name} is a GGUF file, which needs the Python package gguf; install it: pip install gguf"
        ) from error
    check_gguf(path)
    try:
        return GGUFReader(path, "c")
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(f"the header of {path.name} is damaged ({error}); download it again") from error
