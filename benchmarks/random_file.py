"""A file with FLUX.1 [dev]'s names and shapes and random weights, written piece by piece.

All weights are slices of one pool of random values, so that 24 GB cost no more than the writing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from ..flux_core.model.spec import FLUX_DEV, FluxSpec
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.quant.gguf import BLOCK_TYPES, dequantize
from .reference.quantized import random_blocks

STD = 0.01
"""Standard deviation of the weights: close enough to 1 / sqrt(3072) for finite velocities."""
POOL = 1 << 24
"""Values in the pool."""
FP8 = torch.float8_e4m3fn
NAMES = {torch.bfloat16: "BF16", FP8: "F8_E4M3"}

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class RandomPool:
    """Bytes of random weights of one format, in units that a tensor contains whole."""

    data: memoryview
    unit: int
    weights: int
    """Weights in a unit."""

    def size(self, count: int) -> int:
        """Bytes of `count` weights."""
        return count // self.weights * self.unit

    def write(self, file: BinaryIO, count: int, start: int) -> None:
        """Write `count` weights, from the unit `start` of the pool on, wrapping around."""
        left, at = self.size(count), start * self.unit % len(self.data)
        while left:
            piece = self.data[at : at + left]
            file.write(piece)
            left, at = left - len(piece), 0


def dense_pool(dtype: torch.dtype) -> RandomPool:
    """Normally distributed weights in a dtype of torch."""
    values = (STD * torch.randn(POOL, generator=torch.Generator().manual_seed(0))).to(dtype)
    return RandomPool(memoryview(values.view(torch.uint8).numpy()), dtype.itemsize, 1)


def gguf_pool(kind: str) -> RandomPool:
    """Blocks of a GGUF type, every bit random, with scales for a standard deviation of STD."""
    block = BLOCK_TYPES[kind]
    sample = torch.from_numpy(random_blocks(kind, 256, 16, largest=1e-4))
    largest = 1e-4 * STD / float(dequantize(sample, kind).std())
    data = random_blocks(kind, 1, POOL // block.size, largest=largest)
    return RandomPool(memoryview(data.reshape(-1)), block.bytes, block.size)


def shapes_of(spec: FluxSpec) -> dict[str, torch.Size]:
    """Names and shapes of a transformer's file."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in FluxTransformer(spec).state_dict().items()}


def is_matrix(name: str, shape: torch.Size) -> bool:
    """Whether published files quantize this tensor."""
    return len(shape) == 2 and not name.startswith("img_in.")


def write_random_safetensors(path: Path, dtype: torch.dtype, spec: FluxSpec, on_progress: OnProgress) -> None:
    """Matrices in `dtype`, the rest in bfloat16; safetensors' own writer would need all of it in memory."""
    small = dense_pool(torch.bfloat16)
    large = small if dtype == torch.bfloat16 else dense_pool(dtype)
    header, end = {}, 0
    pools = {}
    for name, shape in shapes_of(spec).items():
        pools[name] = pool = large if is_matrix(name, shape) else small
        start, end = end, end + pool.size(shape.numel())
        kind = NAMES[dtype if pool is large else torch.bfloat16]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (name, entry) in enumerate(header.items()):
            pools[name].write(file, torch.Size(entry["shape"]).numel(), 7919 * index)
            on_progress(entry["data_offsets"][1], end)
        to_disk(file)


def write_random_gguf(path: Path, kind: str, spec: FluxSpec, on_progress: OnProgress) -> None:
    """Matrices in a GGUF type, the rest in float32, like city96's converter."""
    large, small = gguf_pool(kind), dense_pool(torch.float32)
    writer, tensors = GGUFWriter(path, "flux"), []
    for name, shape in shapes_of(spec).items():
        quantized = is_matrix(name, shape) and shape[1] % large.weights == 0
        pool = large if quantized else small
        stored = (*shape[:-1], pool.size(shape[-1])) if quantized else tuple(shape)
        gguf_type = GGMLQuantizationType[kind] if quantized else GGMLQuantizationType.F32
        data_type = np.dtype(np.uint8) if quantized else np.dtype(np.float32)
        writer.add_tensor_info(name, stored, data_type, pool.size(shape.numel()), raw_dtype=gguf_type)
        tensors.append((pool, shape.numel()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0] if writer.fout else None
    assert file is not None
    total, done = sum(pool.size(count) for pool, count in tensors), 0
    writer.write_padding(file, file.tell())
    for index, (pool, count) in enumerate(tensors):
        pool.write(file, count, 7919 * index)
        writer.write_padding(file, pool.size(count))
        done += pool.size(count)
        on_progress(done, total)
    to_disk(file)
    writer.close()


def to_disk(file: BinaryIO) -> None:
    """Flush the file to the disk and drop it from the page cache, so that it is read from the disk."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


FORMATS: dict[str, Callable[[Path, FluxSpec, OnProgress], None]] = {
    "bf16": lambda path, spec, on_progress: write_random_safetensors(path, torch.bfloat16, spec, on_progress),
    "fp8": lambda path, spec, on_progress: write_random_safetensors(path, FP8, spec, on_progress),
    "Q4_K": lambda path, spec, on_progress: write_random_gguf(path, "Q4_K", spec, on_progress),
}
ENDINGS = {"bf16": ".safetensors", "fp8": ".safetensors", "Q4_K": ".gguf"}
BITS = {"bf16": 16, "fp8": 8, "Q4_K": 4.5}
SPEC = FLUX_DEV


def estimated_bytes(name: str, spec: FluxSpec) -> int:
    """The approximate size of a file in a format of FORMATS."""
    return int(sum(shape.numel() for shape in shapes_of(spec).values()) * BITS[name] / 8 * 1.01)
