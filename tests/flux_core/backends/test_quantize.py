"""Models whose layers are packed, or quantized to int8 or fp8."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from rectiflux.benchmarks.reference.models import flux_transformer, relative_error, text
from rectiflux.benchmarks.reference.quantized import fp8, gguf, nf4, weights
from rectiflux.flux_core.backends import cpu_pack
from rectiflux.flux_core.backends.cpu_int8 import Int8Linear
from rectiflux.flux_core.backends.cpu_linear import PackedLinear
from rectiflux.flux_core.backends.cpu_pack import PACKED_SIZES, layers_of, pack_weights, packed_sizes
from rectiflux.flux_core.backends.fp8 import FP8, Fp8Linear
from rectiflux.flux_core.backends.quantize import (
    check_fp8,
    check_int8,
    fp8_bytes,
    int8_bytes,
    quantize_to_fp8,
    quantize_to_int8,
)
from rectiflux.flux_core.memory import WeightStreamer
from rectiflux.flux_core.memory.streaming import weights_of
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.flux_core.quant.linear import QuantizedLinear
from torch import Tensor, nn

from .test_cpu_linear import CPU, randn

ALL_CHANGES = pytest.mark.parametrize("change", [pack_weights, quantize_to_int8, quantize_to_fp8])


@pytest.fixture(autouse=True)
def small_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_pack, "packed_sizes", lambda dtype: (1 << 16, math.inf))


def network() -> FluxTransformer:
    return flux_transformer(hidden_size=256, depth=1, depth_single=2)


def velocity(model: FluxTransformer) -> Tensor:
    prepared = model.prepare(text(3), [0.5], 6, 8)
    return model(randn(1, 12, 64, seed=4), prepared, 0.5)


def nbytes(model: FluxTransformer) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_a_packed_model_gives_the_same_velocity() -> None:
    model = network()
    expected, names = velocity(model), model.state_dict().keys()
    assert pack_weights(model) == 8 + 2 * 2  # the first and the last layer are small
    assert isinstance(model.single_blocks[0].linear1, PackedLinear)
    assert relative_error(velocity(model), expected) <= 1e-5
    assert model.state_dict().keys() == names
    assert pack_weights(model) == 0


@pytest.mark.parametrize(
    ("maker", "capability", "cpu"),
    [
        ("Intel", "AVX512", "AVX-512"),
        ("AMD", "AVX512", "AVX-512, slow MKL"),
        ("Intel", "AVX2", "AVX2"),
        ("AMD", "AVX2", "AVX2"),
    ],
)
def test_which_weights_are_packed_on_which_cpu(
    maker: str, capability: str, cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large float32 ones are left to MKL where that is as fast; bfloat16 has no alternative."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": f"{maker} X"}, raising=False)
    assert packed_sizes(torch.float32) == PACKED_SIZES[torch.float32, cpu]
    assert packed_sizes(torch.bfloat16)[1] == math.inf
    monkeypatch.setattr(cpu_pack, "packed_sizes", lambda dtype: (64 * 64, 64 * 256))
    model = flux_transformer()
    pack_weights(model)
    assert isinstance(model.img_in, PackedLinear)  # 64 x 64
    assert not isinstance(model.single_blocks[0].linear1, PackedLinear)  # 448 x 64


@ALL_CHANGES
def test_weights_are_freed_one_by_one(change: Callable[..., int]) -> None:
    """Memory does not double: when a layer is done, the weights before it are freed. Progress ends at all."""
    model = network()
    old = [weakref.ref(layer) for *_, layer in layers_of(model, ends=False)]
    alive: list[int] = []
    done: list[tuple[int, int]] = []

    def progress(*counts: int) -> None:
        done.append(counts)
        alive.append(sum(layer() is not None for layer in old))

    changed = change(model, on_progress=progress)
    left = sum(layer() is not None for layer in old)
    assert changed > 0 and left <= alive[-1] <= left + 1 and alive[0] >= len(old) - 1
    assert len(set(alive)) > changed // 2
    assert done == sorted(set(done)) and len({total for _, total in done}) == 1
    assert done[-1][0] == done[-1][1] > 0


def test_quantized_weights_and_streamed_models_are_not_packed() -> None:
    model = network()
    block = model.single_blocks[0]
    layer = block.linear2 = QuantizedLinear(nf4(weights(256, 1280))[0], torch.zeros(256), torch.float32)
    model.streaming = WeightStreamer(None)
    assert pack_weights(model) == 0
    model.streaming = None
    assert pack_weights(model) == 8 + 2 * 2 - 1 and block.linear2 is layer


def test_int8_models() -> None:
    model = network()
    expected, needed = velocity(model), int8_bytes(model)
    assert quantize_to_int8(model) == 8 + 2 * 2
    assert 0 < relative_error(velocity(model), expected) < 0.1
    codes = sum(m.quantized.codes.nbytes for m in model.modules() if isinstance(m, Int8Linear))
    assert sum(p.nbytes for p in model.parameters()) + codes == needed
    check_int8(CPU)
    with pytest.raises(ValueError, match="one would on cuda"):
        check_int8(torch.device("cuda"))


def test_fp8_models() -> None:
    """8 layers of the double block and 2 modulations, 2 of the first single block and one; no ends."""
    model = network()
    expected, needed = velocity(model), fp8_bytes(model)
    assert quantize_to_fp8(model, CPU) == 8 + 2 + 2 + 1
    assert quantize_to_fp8(model) == 0
    layers = {n.rpartition(".")[0]: m for n, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert "single_blocks.0.modulation" in layers and "double_blocks.0.img_mod" in layers
    assert not any(name.startswith(("single_blocks.1", "final_layer")) for name in layers)
    assert "" not in layers
    assert 0.005 < relative_error(velocity(model), expected) < 0.1
    scales = sum(m.quantized.scale.nbytes for m in model.modules() if isinstance(m, Fp8Linear))
    assert nbytes(model) == needed + scales
    assert [t.dtype for t in weights_of(model.single_blocks[0])].count(FP8) == 2, "blocks stream their codes"
    before = velocity(model)
    pack_weights(model)
    assert relative_error(velocity(model), before) < 1e-4


def test_weights_quantized_on_one_device_can_move_to_another() -> None:
    model = network()
    quantize_to_fp8(model, CPU, then=torch.device("meta"))
    devices = {layer.device.type for layer in model.modules() if isinstance(layer, Fp8Linear)}
    assert devices == {"meta"} and model.device == CPU


def test_which_layers_become_fp8() -> None:
    """Files in float8_e4m3fn keep their codes; other formats and sides that are no multiples of 16 stay."""
    model = flux_transformer(depth=1, depth_single=2)
    block = model.single_blocks[0]
    stored = fp8(weights(64, 320))[0]
    layer = QuantizedLinear(nf4(weights(448, 64))[0], torch.zeros(448), torch.float32)
    block.linear1, block.linear2 = layer, QuantizedLinear(stored, torch.zeros(64), torch.float32)
    mlp = model.double_blocks[0].img_mlp
    mlp[0] = QuantizedLinear(gguf(weights(256, 64))[0], None, torch.float32)
    mlp[2] = nn.Linear(256, 63)
    needed = fp8_bytes(model)
    assert quantize_to_fp8(model) == 13 - 3
    assert block.linear1 is layer and isinstance(block.linear2, Fp8Linear)
    assert block.linear2.quantized.codes.data_ptr() == stored.codes.data_ptr()
    scales = sum(m.quantized.scale.nbytes for m in model.modules() if isinstance(m, Fp8Linear))
    assert nbytes(model) == needed + scales


@pytest.mark.parametrize("change", [quantize_to_int8, quantize_to_fp8])
def test_what_cannot_be_quantized_raises(change: Callable[..., int]) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"the memory limit is 0\.0 GB"):
        change(model, limit=1 << 10)
    model.streaming = WeightStreamer(None)
    with pytest.raises(ValueError, match="not streamed"):
        change(model)


def test_devices_without_fp8() -> None:
    check_fp8(CPU)
    with pytest.raises(ValueError, match="mps"):
        check_fp8(torch.device("mps"))
