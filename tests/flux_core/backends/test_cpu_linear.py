"""Packed layers compute what torch's do; int8 layers exactly what their codes say."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.models import flux_transformer, relative_error, text
from rectiflux.benchmarks.reference.quantized import nf4, weights
from rectiflux.flux_core.backends import cpu_int8 as int8_module
from rectiflux.flux_core.backends import cpu_linear as module
from rectiflux.flux_core.backends import cpu_pack as packing
from rectiflux.flux_core.backends.cpu_int8 import Int8Linear, max_weight_code, quantize_rows
from rectiflux.flux_core.backends.cpu_linear import PackedLinear, can_pack, gelu_in_slices
from rectiflux.flux_core.backends.cpu_pack import pack_weights
from rectiflux.flux_core.backends.quantize import int8_bytes, quantize_to_fp8, quantize_to_int8
from rectiflux.flux_core.lora.linear import AdaptedLinear, dense_weight
from rectiflux.flux_core.memory import WeightStreamer
from rectiflux.flux_core.quant.linear import QuantizedLinear, compute_dtype, device_of, weight_count
from torch import Tensor, nn

CPU = torch.device("cpu")
TESTS = Path(__file__).resolve().parents[2]
EXACT = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # of the largest output; a rounding step of bfloat16


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(
    dtype: torch.dtype = torch.float32, qkv_dim: int | None = None
) -> tuple[PackedLinear, Tensor, Tensor]:
    weight, bias = drawn(48, 64, dtype=dtype), drawn(48, seed=1, dtype=dtype)
    return PackedLinear(weight, bias, qkv_dim), weight, bias


@pytest.fixture(params=["packed", "in rows"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN's operators, and as where they are missing."""
    if request.param == "in rows":
        for each in (module, int8_module):
            monkeypatch.setattr(each, "can_pack", lambda device, dtype: False)


# Exact layers


def pretend(avx512: bool, monkeypatch: pytest.MonkeyPatch, maker: str = "Intel") -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if avx512 else "AVX2")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": f"{maker} X"}, raising=False)


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("qkv_dim", [None, 16])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (5, 64), (2, 3, 64)])
def test_it_is_a_linear_layer(
    dtype: torch.dtype,
    qkv_dim: int | None,
    shape: tuple[int, ...],
    avx512: bool,
    either_way: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(avx512, monkeypatch)
    layer, weight, bias = layer_of(dtype, qkv_dim)
    x = drawn(*shape, seed=2, dtype=dtype)
    expected = F.linear(x, weight, bias)
    y = layer(x)
    assert y.shape == expected.shape and y.dtype == dtype
    if x.numel():
        assert relative_error(y, expected) <= EXACT[dtype]
        gelu = F.gelu(expected, approximate="tanh")
        assert relative_error(layer.gelu(x), gelu) <= EXACT[dtype]
        first, rest = layer.split_gelu(x)
        assert first.shape[-1] == layer.qkv_dim
        torch.testing.assert_close(first, y[..., : layer.qkv_dim], rtol=0, atol=0)
        assert not rest.numel() or relative_error(rest, gelu[..., layer.qkv_dim :]) <= EXACT[dtype]


def test_compilers_see_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the blocks' number; it gives what the layer gives, in a tensor of the size that it promises."""
    pretend(True, monkeypatch)
    layer, _, bias = layer_of(qkv_dim=16)
    x, rest = drawn(2, 3, 64, seed=2), layer._kept[1]
    asked = (x, rest.number, bias[16:], 32, "gelu", "tanh")
    assert torch.equal(module._packed_product(*asked), layer.split_gelu(x)[1])
    torch.library.opcheck(module._packed_product, asked, test_utils="test_faketensor")
    int8 = Int8Linear(drawn(48, 64), None)
    codes, _ = quantize_rows(x[0])
    asked = (codes, int8._codes.number, int8.scale, int8._zeros, torch.float32)
    assert torch.equal(int8_module._int8_product(*asked), int8._sums(codes, torch.float32))
    torch.library.opcheck(int8_module._int8_product, asked, test_utils="test_faketensor")


def test_copies_of_blocks_keep_their_number() -> None:
    """And a number goes with the last copy, and its weight's memory with it."""
    layer, _, _ = layer_of()
    number, twin = int(layer._kept[0].number), copy.deepcopy(layer)
    del layer
    assert module._BLOCKS[number] is twin._kept[0]
    del twin
    assert number not in module._BLOCKS


def test_cut_inputs_are_read_as_they_lie() -> None:
    layer, weight, bias = layer_of()
    x = drawn(2, 9, 128)[:, 4:, 64:]
    assert relative_error(layer(x), F.linear(x, weight, bias)) <= 1e-6


@pytest.mark.parametrize("qkv_dim", [None, 16])
def test_the_numbers_come_back(qkv_dim: int | None, either_way: None) -> None:
    layer, weight, bias = layer_of(qkv_dim=qkv_dim)
    assert torch.equal(layer.dense_weight(torch.float32), weight)
    assert torch.equal(dense_weight(layer, torch.bfloat16), weight.bfloat16())
    assert torch.equal(layer.state_dict()["weight"], weight) and torch.equal(layer.state_dict()["bias"], bias)
    assert torch.equal(copy.deepcopy(layer).dense_weight(torch.float32), weight)
    assert (compute_dtype(layer), device_of(layer)) == (torch.float32, CPU)
    assert weight_count(layer) == 48 * 64 + 48
    assert layer.weight.is_meta and layer.weight.shape == weight.shape


def test_it_moves_as_a_layer_does() -> None:
    layer, weight, _ = layer_of(qkv_dim=16)
    assert layer.packed and "oneDNN" in repr(layer)
    assert layer.half().dtype == torch.float16 and not layer.packed and "in rows" in repr(layer)
    assert torch.equal(layer.float().dense_weight(torch.float32), weight.half().float()) and layer.packed
    assert device_of(layer.to("meta")).type == "meta" and weight_count(layer) == 0


def test_gradients_reach_the_inputs() -> None:
    layer, weight, _ = layer_of()
    x = drawn(3, 64).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


def test_only_what_can_be_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_pack(CPU, torch.float32) and not can_pack(CPU, torch.float64)
    assert not can_pack(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_pack(CPU, torch.float32) and not can_pack(CPU, torch.int8)


# int8


def test_codes_are_rounded_shares_of_the_largest() -> None:
    """By hand: 254 / 127 is 2, so that 3 lies between 1 and 2 and goes to the even one, -5 to -2."""
    codes, scale = quantize_rows(
        torch.tensor([[254.0, 3.0, -5.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, -127.0, 1.5, 2.5]])
    )
    assert codes.tolist() == [[127, 2, -2, 0], [0, 0, 0, 0], [0, -127, 2, 2]]
    assert scale.tolist() == [2.0, 0.0, 1.0]


def test_an_int8_layer_computes_what_its_codes_say(either_way: None) -> None:
    """y = s_x s_w (q_x . q_w) + b, the sums exact in integers; float32 rounds three times."""
    weight, bias, x = drawn(48, 64), drawn(48, seed=1), drawn(2, 5, 64, seed=2)
    layer = Int8Linear(weight, bias)
    qw, sw = quantize_rows(weight, max_weight_code())
    qx, sx = quantize_rows(x.flatten(0, 1))
    expected = (qx.long() @ qw.long().T).double() * sx[:, None].double() * sw.double() + bias.double()
    assert torch.equal(layer.codes, qw) and torch.equal(layer.dense_weight(torch.float32), qw * sw[:, None])
    torch.testing.assert_close(layer(x).double(), expected.view(2, 5, 48), rtol=1e-6, atol=1e-6)
    no_bias = Int8Linear(weight, None)(x).double()
    torch.testing.assert_close(no_bias, (expected - bias).view(2, 5, 48), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", EXACT)
def test_whole_numbers_are_exact_in_int8(dtype: torch.dtype) -> None:
    """With the largest code in every row the scales are 1, and nothing is lost."""
    weight = torch.zeros(3, 8)
    weight[:, 0], weight[1, 1], weight[2, 3] = float(max_weight_code()), 5.0, -2.0
    x = torch.tensor([[0.0, 3.0, 0.0, 1.0, 127.0, 0.0, 0.0, 0.0]])
    assert Int8Linear(weight.to(dtype), None)(x.to(dtype)).tolist() == [[0.0, 15.0, -2.0]]


ONE_INT8_PRODUCT = """
import torch
from rectiflux.flux_core.backends.cpu_int8 import (Int8Linear)
Int8Linear(torch.randn(48, 64), None)(torch.randn(5, 64))
"""


@pytest.mark.skipif(not can_pack(CPU, torch.int8), reason="no oneDNN here that multiplies int8")
def test_no_int8_product_is_left_to_onednns_reference_code() -> None:
    """Which takes a thousand times as long as any other."""
    script = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nimport conftest\n{ONE_INT8_PRODUCT}"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    products = [line for line in run.stdout.splitlines() if ",exec,cpu,matmul," in line]
    assert any("5x64:64x48" in line for line in products)
    assert not [line for line in products if ",matmul,ref" in line]


def test_int8_errors_on_usual_and_on_outlying_weights() -> None:
    """Rounding errs by scale / sqrt(12) at most as uniform noise: 1 % for Gaussians of 4.2 sigma at most.

    On processors with 64 levels for weights, 1.6 times as much.
    """
    x = drawn(64, 256, seed=3)
    weight = drawn(96, 256)
    outlying = weight.clone()
    outlying[:, 7] *= 100
    errors = []
    for w in (weight, outlying):
        y = F.linear(x, w)
        errors.append(float((Int8Linear(w, None)(x) - y).norm() / y.norm()))
        step_w = w.abs().amax(1, keepdim=True) / max_weight_code()
        step_x = x.abs().amax(1, keepdim=True) / 127
        noise = (x**2).sum() * (step_w**2).mean() / 12 * 96 + (step_x**2).mean() / 12 * 64 * (w**2).sum()
        assert errors[-1] == pytest.approx(float(noise**0.5 / y.norm()), rel=0.25)
    assert errors[0] < 0.015 * 127 / max_weight_code() and errors[1] > 2 * errors[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_do_not_overflow(sign: int) -> None:
    """The largest codes everywhere: where pairs of products are added in 16 bits, the most."""
    weight, x = torch.full((32, 512), 1.0), sign * torch.full((4, 512), 1.0)
    assert torch.allclose(Int8Linear(weight, None)(x), torch.full((4, 32), 512.0 * sign), rtol=1e-6)


def test_a_processor_that_overflows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(codes: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.full((codes.shape[0], 16), 32767.0 * 32)

    monkeypatch.setattr(int8_module, "_int8_sums", saturating)
    assert int8_module._levels_tried.__wrapped__() == 64
    monkeypatch.setattr(int8_module, "_int8_sums", lambda codes, *_: torch.full((16, 16), 64 * 127.0**2))
    assert int8_module._levels_tried.__wrapped__() == 127


@pytest.mark.parametrize("dtype", EXACT)
def test_gelu_in_slices(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE", 200)
    x = (4 * drawn(7, 3, 64)).to(dtype)[:, 1:]
    assert relative_error(gelu_in_slices(x), F.gelu(x, approximate="tanh")) <= EXACT[dtype]


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("shape", [(64,), (0, 64), (3, 64), (2, 3, 64)])
def test_gelu(
    shape: tuple[int, ...], dtype: torch.dtype, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both of its forms, to a place of its own or to one among others, and in the place of its input."""
    pretend(avx512, monkeypatch)
    monkeypatch.setattr(module, "SLICE", 128)
    x = (4 * drawn(*shape)).to(dtype)
    expected = F.gelu(x, approximate="tanh")
    room = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
    assert module.gelu(x, out=room[..., 32:96]).shape == x.shape
    assert not room[..., :32].any() and not room[..., 96:].any()
    changed = x.clone()
    assert module.gelu(changed, out=changed) is changed
    for found in (module.gelu(x), room[..., 32:96], changed):
        assert not x.numel() or relative_error(found, expected) <= EXACT[dtype]


def test_int8_layers_keep_their_codes_through_every_dtype() -> None:
    layer = Int8Linear(drawn(48, 64), drawn(48), 16)
    codes = layer.codes
    assert torch.equal(layer.bfloat16().codes, codes) and layer.dtype == torch.bfloat16
    x = drawn(3, 64, dtype=torch.bfloat16)
    first, rest = layer.split_gelu(x)
    y = layer(x)
    assert (
        torch.equal(first, y[:, :16]) and relative_error(rest, F.gelu(y[:, 16:], approximate="tanh")) < 0.01
    )
    assert torch.equal(copy.deepcopy(layer).codes, codes)
    x = drawn(3, 64).requires_grad_()
    layer.float()(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense_weight(torch.float32).sum(0).expand(3, -1))
    assert layer.to("meta").device.type == "meta"


# Models


@pytest.fixture
def small_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the sizes here are packed, whatever torch's own order is."""
    monkeypatch.setattr(packing, "SMALL_IN_FLOAT32", packing.SMALL)
    monkeypatch.setattr(packing, "SMALL_BESIDE_SLOW_MKL", packing.SMALL)


def network(**sizes: int) -> nn.Module:
    return flux_transformer(hidden_size=256, depth=1, depth_single=2, **sizes)


def velocity(model: nn.Module) -> Tensor:
    prepared = model.prepare(text(3), [0.5], 6, 8)
    return model(drawn(1, 12, 64, seed=4), prepared, 0.5)


def test_a_packed_model_gives_the_same_velocity(small_packed: None) -> None:
    model = network()
    expected, names = velocity(model), model.state_dict().keys()
    assert pack_weights(model) == 8 + 2 * 2  # the first and the last layer are small
    assert relative_error(velocity(model), expected) <= 1e-5
    assert model.state_dict().keys() == names
    assert pack_weights(model) == 0


@pytest.mark.parametrize("maker", ["Intel", "AMD"])
@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("dtype", EXACT)
def test_large_float32_weights_are_left_to_mkl_where_it_is_as_quick(
    dtype: torch.dtype, avx512: bool, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is with Intel's AVX-512; bfloat16 is packed at every size."""
    monkeypatch.setattr(packing, "SMALL", 0)
    monkeypatch.setattr(packing, "SMALL_IN_FLOAT32", 0)
    monkeypatch.setattr(packing, "SMALL_BESIDE_SLOW_MKL", 0)
    monkeypatch.setattr(packing, "LARGE", 64 * 256)
    pretend(avx512, monkeypatch, maker)
    model = flux_transformer().to(dtype)
    pack_weights(model)
    block = model.single_blocks[0]
    able = can_pack(torch.device("cpu"), dtype)  # bfloat16 needs a processor that multiplies it
    left = avx512 and maker == "Intel" and dtype == torch.float32
    assert isinstance(block.linear1, PackedLinear) == (able and not left)  # 448 x 64
    assert isinstance(model.img_in, PackedLinear) == able  # 64 x 64


@pytest.mark.parametrize("maker", ["Intel", "AMD"])
@pytest.mark.parametrize("avx512", [False, True])
def test_small_float32_weights_are_left_to_mkl(
    avx512: bool, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is as quick; beside a slow one smaller ones are packed, too."""
    monkeypatch.setattr(packing, "SMALL", 0)
    monkeypatch.setattr(packing, "SMALL_IN_FLOAT32", 64 * 256)
    monkeypatch.setattr(packing, "SMALL_BESIDE_SLOW_MKL", 64 * 64)
    pretend(avx512, monkeypatch, maker)
    model = flux_transformer()
    pack_weights(model)
    assert isinstance(model.single_blocks[0].linear1, PackedLinear)  # 448 x 64
    assert isinstance(model.img_in, PackedLinear) == (avx512 and maker == "AMD")  # 64 x 64


@pytest.mark.parametrize("change", [pack_weights, quantize_to_int8, quantize_to_fp8])
def test_progress_ends_at_all_of_it(change: Callable[..., int]) -> None:
    heard: list[tuple[int, int]] = []
    change(network(), on_progress=lambda done, total: heard.append((done, total)))
    done = [one for one, _ in heard]
    assert done == sorted(set(done)) and len({total for _, total in heard}) == 1
    assert heard[-1][0] == heard[-1][1] > 0


@pytest.mark.parametrize("change", [pack_weights, quantize_to_int8, quantize_to_fp8])
def test_each_weight_goes_before_the_next_is_reordered(
    change: Callable[..., int], small_packed: None
) -> None:
    """So that memory does not double: when a layer is done, all weights of those before it are gone."""
    model = network()
    old = [weakref.ref(layer) for _, _, layer in packing.layers_of(model, ends=False)]
    alive: list[int] = []
    changed = change(model, on_progress=lambda *_: alive.append(sum(one() is not None for one in old)))
    kept = sum(one() is not None for one in old)
    assert changed > 0 and kept <= alive[-1] <= kept + 1 and alive[0] >= len(old) - 1
    assert len(set(alive)) > changed // 2  # one after the other


def test_quantised_weights_stay_and_streamed_models_are_left_alone(small_packed: None) -> None:
    model = network()
    block = model.single_blocks[0]
    block.linear2 = QuantizedLinear(nf4(weights(256, 1280))[0], torch.zeros(256), torch.float32)
    kept = block.linear2
    model.streaming = WeightStreamer(None)
    assert pack_weights(model) == 0
    with pytest.raises(
        ValueError, match="int8 needs a model that is not streamed, got one that is larger than"
    ):
        quantize_to_int8(model)
    model.streaming = None
    assert pack_weights(model) == 8 + 2 * 2 - 1 and block.linear2 is kept


def test_int8_models() -> None:
    model = network()
    expected, needed = velocity(model), int8_bytes(model)
    quantised = sum(p.numel() for b in [*model.double_blocks, *model.single_blocks] for p in b.parameters())
    assert quantize_to_int8(model) == 8 + 2 * 2
    assert 0 < relative_error(velocity(model), expected) < 0.1
    held = sum(p.nbytes for p in model.parameters())
    codes = sum(layer.codes.nbytes for layer in model.modules() if isinstance(layer, Int8Linear))
    assert held + codes == needed and codes < quantised


@pytest.mark.parametrize("kind", [PackedLinear, Int8Linear])
def test_adapters_go_on_top(kind: type[nn.Module]) -> None:
    layer = kind(drawn(48, 64), drawn(48, seed=1))
    adapted = AdaptedLinear(layer, [], torch.float32)
    x = drawn(5, 64, seed=2)
    assert torch.equal(adapted(x), layer(x))
    assert torch.equal(adapted.dense_weight(), layer.dense_weight(torch.float32))
    assert adapted.device == CPU
