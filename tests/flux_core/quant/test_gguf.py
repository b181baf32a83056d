"""Every GGUF type against the `gguf` package's own dequantization: exactly the same values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from rectiflux.benchmarks.reference.quantized import QUANTIZABLE, quantize_gguf, random_blocks
from rectiflux.flux_core.quant.gguf import BLOCK_TYPES, dequantize


def expected(data: np.ndarray, kind: str) -> torch.Tensor:
    return torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[kind]))


def test_the_table_has_the_packages_block_sizes() -> None:
    supported = "BF16 F16 F32 Q8_0 Q5_1 Q5_0 Q4_1 Q4_0 Q6_K Q5_K Q4_K Q3_K Q2_K IQ4_NL IQ4_XS"
    assert set(BLOCK_TYPES) == set(supported.split())
    for kind, block in BLOCK_TYPES.items():
        assert (block.size, block.bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_random_bytes(kind: str) -> None:
    data = random_blocks(kind, 6, 5)
    found = dequantize(torch.from_numpy(data), kind)
    assert found.dtype == torch.float32
    assert found.shape == (6, 5 * BLOCK_TYPES[kind].size)
    assert found.abs().max() > 0
    assert torch.equal(found, expected(data, kind))


@pytest.mark.parametrize("kind", QUANTIZABLE)
def test_quantized_weights(kind: str) -> None:
    """The package's bytes for normal weights: the same values, and close to the weights."""
    weights = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    data = quantize_gguf(weights, kind)
    found = dequantize(torch.from_numpy(data), kind)
    assert torch.equal(found, expected(data, kind))
    steps = {
        "F32": 1e30,
        "F16": 2**11,
        "BF16": 2**8,
        "Q8_0": 127,
        "Q5_1": 31,
        "Q5_0": 16,
        "Q4_1": 15,
        "Q4_0": 8,
    }
    assert np.abs(found.numpy() - weights).max() <= 1.1 * np.abs(weights).max() / steps[kind]


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_rows_are_independent(kind: str) -> None:
    """Rows can be sliced, and bytes may start at any address."""
    data = torch.from_numpy(random_blocks(kind, 4, 3, seed=2))
    whole = dequantize(data, kind)
    shifted = torch.cat([torch.zeros(2, dtype=torch.uint8), data.flatten()])[2:].view(data.shape)
    if kind != "F32":  # torch requires aligned float32
        assert torch.equal(dequantize(shifted[1:3], kind), whole[1:3])
    assert torch.equal(dequantize(data[2:], kind), whole[2:])


def test_a_block_by_hand() -> None:
    """Q4_0 with d = 0.5: 0..15 in the low nibbles, 15..0 in the high ones."""
    data = [*np.array([0.5], np.float16).view(np.uint8), *(i | (15 - i) << 4 for i in range(16))]
    values = dequantize(torch.tensor(data, dtype=torch.uint8), "Q4_0")
    assert values.tolist() == [(i - 8) / 2 for i in [*range(16), *range(15, -1, -1)]]


def test_an_unknown_type_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="IQ1_S"):
        dequantize(torch.zeros(1, 50, dtype=torch.uint8), "IQ1_S")
