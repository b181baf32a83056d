"""fp8 layers compute exactly what their codes say, whether a card multiplies them or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.models import flux_transformer, relative_error, text
from rectiflux.benchmarks.reference.quantized import fp8, gguf, nf4, weights
from rectiflux.flux_core.backends import fp8 as module
from rectiflux.flux_core.backends.cpu_pack import pack_weights
from rectiflux.flux_core.backends.fp8 import FP8, Fp8Linear, can_multiply, quantize_rows_fp8, to_fp8
from rectiflux.flux_core.backends.quantize import fp8_bytes, quantize_to_fp8
from rectiflux.flux_core.lora.adapters import LowRank
from rectiflux.flux_core.lora.linear import AdaptedLinear, Part
from rectiflux.flux_core.memory import WeightStreamer
from rectiflux.flux_core.memory.streaming import weights_of
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.flux_core.quant.formats import ConcatenatedWeight, DenseWeight, ScaledWeight
from rectiflux.flux_core.quant.linear import QuantizedLinear, compute_dtype, device_of, weight_count
from torch import Tensor

BF16 = torch.bfloat16
CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Fp8Linear, Tensor, Tensor]:
    weight, b = drawn(48, 64), drawn(48, seed=1)
    return Fp8Linear(to_fp8(weight), b if bias else None, dtype), weight, b


def twin(x: Tensor, weight: Tensor) -> Tensor:
    """s_x s_w (q_x . q_w) in float64, from nothing but the definition."""
    numbers = []
    for rows in (x, weight):
        scale = rows.float().abs().amax(1, keepdim=True) / 448
        numbers.append((rows.float() / scale).to(FP8).double() * scale.double())
    return numbers[0] @ numbers[1].T


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """As on a card that multiplies fp8: torch's product of the CPU, which must be asked as a card's must."""
    calls: list[dict[str, Any]] = []
    inner = torch.ops.aten._scaled_mm

    def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Any, **how: Any) -> Tensor:
        assert a.dtype == b.dtype == FP8 and scale_a.dtype == scale_b.dtype == torch.float32
        assert a.is_contiguous() and b.t().is_contiguous(), "row-major times column-major"
        assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
        assert scale_a.is_contiguous() and scale_b.is_contiguous()
        assert not any(side % 16 for side in b.shape) and (bias is None or bias.dtype == BF16)
        calls.append(how)
        return inner(a, b, scale_a, scale_b, bias, **how)

    monkeypatch.setattr(torch.ops.aten, "_scaled_mm", product)
    monkeypatch.setattr(module, "can_multiply", lambda device: True)
    return calls


# Numbers


def test_codes_are_rounded_shares_of_the_largest() -> None:
    """By hand: 448 / 448 is 1. From 16 to 32 codes are 2 apart: 19 goes to 20, whose code is even."""
    codes, scale = quantize_rows_fp8(torch.tensor([[448.0, 19.0, -17.0, 0.4], [0.0, 0.0, 0.0, 0.0]]))
    assert codes.float().tolist() == [[448.0, 20.0, -16.0, 0.40625], [0.0, 0.0, 0.0, 0.0]]
    assert float(scale[0]) == 1.0 and float(scale[1]) > 0
    codes, scale = quantize_rows_fp8(torch.tensor([[-896.0, 3.0], [1e-20, 0.0]]))
    assert codes.float().tolist() == [[-448.0, 1.5], [0.0, 0.0]] and float(scale[0]) == 2.0


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_of_a_row_never_overflows(seed: int) -> None:
    """What is above 464 would be no number."""
    x = drawn(2000, 5, seed=seed) * torch.logspace(-6, 6, 2000)[:, None]
    codes, scale = quantize_rows_fp8(x)
    assert codes.float().isfinite().all() and (codes.float().abs().amax(1) == 448).all()
    bound = (x.abs() / 16).maximum(scale * 2**-10)
    assert ((codes.float() * scale - x).abs() <= bound * 1.0001).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (5, 64), (2, 3, 64)])
def test_it_computes_what_its_codes_say(bias: bool, shape: tuple[int, ...]) -> None:
    layer, weight, b = layer_of(bias)
    x = drawn(*shape, seed=2)
    y = layer(x)
    expected = twin(x.reshape(-1, 64), weight) + (b.double() if bias else 0)
    assert y.shape == (*shape[:-1], 48) and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected.view(y.shape), rtol=1e-6, atol=1e-6)
    assert y.numel() == 0 or 0.01 < relative_error(y, F.linear(x, weight, b if bias else None)) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_a_card_gives_the_same_numbers(dtype: torch.dtype, card: list[dict[str, Any]]) -> None:
    """To a rounding of bfloat16, which is what it answers in."""
    layer, weight, b = layer_of(dtype=dtype)
    x = drawn(2, 5, 64, seed=2).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 5, 48)
    expected = twin(x.flatten(0, 1), weight) + b.to(dtype).to(BF16).double()
    torch.testing.assert_close(y.double().flatten(0, 1), expected, rtol=2**-7, atol=2**-6)
    assert card == [{"out_dtype": BF16, "use_fast_accum": True}]


def test_which_devices_can(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    capability, fails = (9, 0), False

    def product(x: Any, weight: Any, bias: Tensor) -> Tensor:
        if fails:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")
        return torch.full((16, 16), 17.0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(module, "_product", product)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    assert not can_multiply(CPU) and can_multiply(torch.device("cuda", 0))
    capability = (8, 6)
    assert not can_multiply(torch.device("cuda", 1)) and can_multiply(torch.device("cuda", 0))
    capability, fails = (12, 0), True
    assert not can_multiply(torch.device("cuda", 2)) and not can_multiply(torch.device("cuda", 2))
    assert [record.getMessage() for record in caplog.records] == [
        "fp8 is multiplied as bf16, torch cannot on cuda:2: CUBLAS_STATUS_NOT_SUPPORTED"
    ]
    module._tried.cache_clear()


# What files have


def test_codes_of_files_are_handed_over() -> None:
    """DenseWeight and scaled, whole and in parts: the numbers stay exactly what they were."""
    scaled, numbers = fp8(drawn(48, 64))
    plain = drawn(48, 64).to(FP8)
    rows = ScaledWeight(plain, torch.linspace(0.5, 2, 48)[:, None])
    joined = ConcatenatedWeight((scaled, DenseWeight(plain), rows))
    expected = [
        (scaled, numbers),
        (DenseWeight(plain), plain.float()),
        (rows, plain.float() * rows.scale),
        (joined, torch.cat([numbers, plain.float(), plain.float() * rows.scale])),
    ]
    for stored, values in expected:
        layer = Fp8Linear(to_fp8(stored), None, torch.float32)
        assert torch.equal(layer.dense_weight(torch.float32), values)
        assert layer.stored_scale.shape == (len(values), 1)
    assert to_fp8(scaled).codes.data_ptr() == scaled.codes.data_ptr()
    assert torch.equal(
        to_fp8(DenseWeight(drawn(48, 64).half())).codes, quantize_rows_fp8(drawn(48, 64).half())[0]
    )


# A layer among others


def test_it_is_kept_through_every_dtype() -> None:
    layer, weight, _ = layer_of()
    codes = layer.stored_codes
    assert layer.bfloat16().dtype == compute_dtype(layer) == BF16 and layer.bias.dtype == BF16
    assert layer.stored_codes is codes and layer.stored_scale.dtype == torch.float32
    assert (device_of(layer), weight_count(layer)) == (CPU, 48 * 64 + 48)
    assert torch.equal(copy.deepcopy(layer)(drawn(3, 64)), layer(drawn(3, 64)))
    assert "64, 48, fp8 e4m3fn scaled" in repr(layer) and layer.weight.is_meta
    other = layer_of()[0]
    other.load_state_dict(layer.float().state_dict())
    assert torch.equal(other(drawn(3, 64)), layer(drawn(3, 64)))
    assert device_of(layer.to("meta")).type == "meta" and weight_count(layer) == 0


def test_gradients_reach_the_inputs() -> None:
    layer, _, _ = layer_of()
    x = drawn(3, 64).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense_weight(torch.float32).sum(0).expand(3, -1))


def test_loras_go_beside_it() -> None:
    layer, _, _ = layer_of()
    down, up, x = drawn(4, 64, seed=3), drawn(48, 4, seed=4), drawn(5, 64, seed=2)
    adapted = AdaptedLinear(layer, [Part(LowRank(down, up), None, None, 0.5)], torch.float32)
    torch.testing.assert_close(adapted(x), layer(x) + 0.5 * x @ (up @ down).T, rtol=1e-5, atol=1e-4)
    merged = layer.dense_weight(torch.float32) + 0.5 * up @ down
    torch.testing.assert_close(adapted.dense_weight(), merged, rtol=1e-5, atol=1e-5)
    assert adapted.device == CPU


def test_compilers_can_trace_it() -> None:
    layer = layer_of()[0]
    x = drawn(5, 64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)


# Models


def network() -> FluxTransformer:
    return flux_transformer(depth=1, depth_single=2)


def velocity(model: FluxTransformer) -> Tensor:
    prepared = model.prepare(text(3), [0.5], 6, 8)
    return model(drawn(1, 12, 64, seed=4), prepared, 0.5)


def test_fp8_models() -> None:
    """8 layers of the double block and 2 modulations, 2 of the first single block and one; no ends."""
    model = network()
    expected, needed = velocity(model), fp8_bytes(model)
    assert quantize_to_fp8(model, CPU) == 8 + 2 + 2 + 1
    assert quantize_to_fp8(model) == 0
    places = {
        name.rpartition(".")[0] for name, layer in model.named_modules() if isinstance(layer, Fp8Linear)
    }
    assert "single_blocks.0.modulation" in places and "double_blocks.0.img_mod" in places
    assert (
        not any(name.startswith(("single_blocks.1", "final_layer")) for name in places) and "" not in places
    )
    assert 0.005 < relative_error(velocity(model), expected) < 0.1
    scales = sum(m.stored_scale.nbytes for m in model.modules() if isinstance(m, Fp8Linear))
    assert sum(t.nbytes for t in (*model.parameters(), *model.buffers())) == needed + scales
    prepared = model.prepare(text(3), [0.5], 6, 8)
    tokens = drawn(1, 12, 64, seed=4)
    before = model(tokens, prepared, 0.5)
    pack_weights(model)
    assert relative_error(model(tokens, prepared, 0.5), before) < 1e-4


def test_what_is_quantised_in_one_place_is_kept_in_another() -> None:
    model = network()
    quantize_to_fp8(model, CPU, then=torch.device("meta"))
    places = {layer.device.type for layer in model.modules() if isinstance(layer, Fp8Linear)}
    assert places == {"meta"} and model.device == CPU


def test_a_block_can_be_streamed_with_its_codes() -> None:
    model = network()
    quantize_to_fp8(model)
    dtypes = [tensor.dtype for tensor in weights_of(model.single_blocks[0])]
    assert dtypes.count(FP8) == 2


def test_quantised_files_and_odd_sides_stay() -> None:
    model = network()
    block = model.single_blocks[0]
    stored = fp8(weights(64, 320))[0]
    kept = QuantizedLinear(nf4(weights(448, 64))[0], torch.zeros(448), torch.float32)
    block.linear1, block.linear2 = kept, QuantizedLinear(stored, torch.zeros(64), torch.float32)
    mlp = model.double_blocks[0].img_mlp
    mlp[0] = QuantizedLinear(gguf(weights(256, 64))[0], None, torch.float32)
    mlp[2] = torch.nn.Linear(256, 63)
    needed = fp8_bytes(model)
    assert quantize_to_fp8(model) == 13 - 3
    assert block.linear1 is kept and isinstance(block.linear2, Fp8Linear)
    assert block.linear2.stored_codes.data_ptr() == stored.codes.data_ptr()
    scales = sum(m.stored_scale.nbytes for m in model.modules() if isinstance(m, Fp8Linear))
    assert sum(t.nbytes for t in (*model.parameters(), *model.buffers())) == needed + scales


def test_what_cannot_be_quantised_says_why() -> None:
    model = network()
    with pytest.raises(
        ValueError, match=r"in fp8 the model takes 0\.0 GB, the memory limit is 0\.0 GB; raise"
    ):
        quantize_to_fp8(model, limit=1 << 10)
    model.streaming = WeightStreamer(None)
    with pytest.raises(
        ValueError, match="fp8 needs a model that is not streamed, got one that is larger than"
    ):
        quantize_to_fp8(model)
