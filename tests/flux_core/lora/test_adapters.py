"""Each kind of adapter against its published formula: a layer with it is one with the merged weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.models import SPEC, flux_transformer
from rectiflux.flux_core.lora import (
    AdaptedLinear,
    LoraUse,
    dense_weight,
    read_lora,
    with_lora,
)
from rectiflux.flux_core.model.transformer import FluxTransformer
from torch import Tensor, nn

from .cases import (
    CASES,
    LAYER,
    ROWS,
    WIDTH,
    Case,
    draw,
    full,
    loha,
    loha_tucker,
    lokr_both_factored,
    lokr_whole,
    lora,
    oft,
)
from .quantized import quantized

H = SPEC.hidden_size
QKV = "double_blocks.0.img_attn.qkv"

Model = Callable[[], FluxTransformer]
weights = pytest.mark.parametrize(
    "model", [flux_transformer, lambda: quantized(part="blocks")[0]], ids=["dense", "quantized"]
)


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


def attached(cases: list[tuple[Case, float]], model: FluxTransformer) -> tuple[nn.Module, AdaptedLinear]:
    """A model's layer, and the same with files of these cases attached."""
    loras = []
    for case, strength in cases:
        tensors = {f"diffusion_model.{LAYER}.{role}": tensor for role, tensor in case.tensors.items()}
        file = read_lora(tensors, SPEC)
        assert not file.unmatched
        loras.append(LoraUse(file, strength))
    adapted, _ = with_lora(model, loras)
    layer = adapted.get_submodule(LAYER)
    assert isinstance(layer, AdaptedLinear)
    return model.get_submodule(LAYER), layer


def expected_weight(base: nn.Module, cases: list[tuple[Case, float]]) -> Tensor:
    """W + the sum of strength * (merged - W)."""
    w = dense_weight(base, torch.float32)
    return w + sum(strength * (case.merge(w) - w) for case, strength in cases)


@weights
@pytest.mark.parametrize("strength", [1.0, 0.6, -0.4])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_with_an_adapter_is_the_layer_with_the_merged_weight(
    name: str, strength: float, model: Model
) -> None:
    cases = [(CASES[name](), strength)]
    base, layer = attached(cases, model())
    weight = expected_weight(base, cases)
    x = draw(11, 2, 7, WIDTH)
    assert relative(layer(x), F.linear(x, weight, base.bias)) < 1e-5
    assert relative(layer.dense_weight(), weight) < 1e-5
    assert relative(F.linear(x, weight, base.bias), base(x)) > 1e-2


@weights
def test_adapters_of_every_kind_add_up_on_one_layer(model: Model) -> None:
    cases = [(make(), 0.1 * (i + 1) / len(CASES)) for i, make in enumerate(CASES.values())]
    base, layer = attached(cases, model())
    x = draw(11, 3, WIDTH)
    assert relative(layer(x), F.linear(x, expected_weight(base, cases), base.bias)) < 1e-5


def test_low_rank_parts_of_several_files_are_one_pair_of_products() -> None:
    """Ranks are stacked: 4 of each file, one matmul down, one up."""
    _, layer = attached([(lora(), 0.5), (lora(), 0.25), (lora(), -1.0)], flux_transformer())
    assert sorted(tuple(tensor.shape) for tensor in layer.buffers()) == [(12, WIDTH), (ROWS, 12)]


@pytest.mark.parametrize("rank", [2, 8])
def test_a_loha_keeps_no_more_than_its_factors(rank: int) -> None:
    """Thin or not (r^2 (rows + in) against rows * in), the change itself is never kept."""
    _, layer = attached([(loha(rank), 1.0)], flux_transformer())
    assert [tuple(t.shape) for t in layer.buffers()] == [(rank, WIDTH), (ROWS, rank)] * 2


@pytest.mark.parametrize("axis", [0, 1])
@weights
def test_dora_on_the_pieces_of_a_fused_layer(axis: int, model: Model) -> None:
    """OneTrainer writes q, k, v apart; the lengths are those of the piece's rows or columns."""
    base = model()
    weight = dense_weight(base.get_submodule(QKV), torch.float32).clone()
    bias = base.get_submodule(QKV).bias
    tensors: dict[str, Tensor] = {}
    expected = weight.clone()
    for i, letter in enumerate("qk"):
        stem = f"lora_transformer_transformer_blocks_0_attn_to_{letter}"
        a, b, m = draw(i, 2, H), draw(i + 5, H, 2), 1 + draw(i + 9, *((H, 1) if axis else (1, H))).abs()
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.dora_scale": m}
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
        v = weight[i * H : (i + 1) * H] + 0.5 * b @ a
        expected[i * H : (i + 1) * H] = m * v / (v**2).sum(dim=axis, keepdim=True).sqrt()
    adapted, _ = with_lora(base, [LoraUse(read_lora(tensors, SPEC), 0.5)])
    x = draw(20, 4, H)
    got = adapted.get_submodule(QKV)(x)
    assert relative(got, F.linear(x, weight + 0.5 * (expected - weight), bias)) < 1e-5


@pytest.mark.parametrize("kind", [lora, loha, loha_tucker, lokr_whole, lokr_both_factored, full, oft])
def test_the_last_modulations_halves_change_places(kind: Callable[[], Case]) -> None:
    """diffusers' norm_out.linear makes (scale, shift), BFL's last modulation (shift, scale)."""
    case = kind()
    w = draw(30, ROWS, WIDTH)
    file = read_lora({f"norm_out.linear.{role}": tensor for role, tensor in case.tensors.items()}, SPEC)
    adapter = file.entries[0].adapter
    assert adapter is not None
    swapped = torch.cat([w[ROWS // 2 :], w[: ROWS // 2]])
    got = w + adapter.delta(w)
    expected = case.merge(swapped)
    assert relative(got, torch.cat([expected[ROWS // 2 :], expected[: ROWS // 2]])) < 1e-5


def test_a_bias_of_the_up_layer_is_scaled_and_a_difference_of_the_bias_is_not() -> None:
    """PEFT's lora_bias is inside of the scaled part; `.diff_b` is a difference as it stands."""
    model = flux_transformer()
    up_bias, difference = draw(1, ROWS), draw(2, ROWS)
    case = lora()
    tensors = {f"diffusion_model.{LAYER}.{role}": tensor for role, tensor in case.tensors.items()}
    tensors[f"diffusion_model.{LAYER}.lora_B.bias"] = up_bias
    tensors[f"diffusion_model.{LAYER}.diff_b"] = difference
    adapted, report = with_lora(model, [LoraUse(read_lora(tensors, SPEC), 0.5)])
    base, layer = model.get_submodule(LAYER), adapted.get_submodule(LAYER)
    bias = base.bias + 0.5 * (1.5 * up_bias + difference)
    assert torch.allclose(layer.bias, bias, atol=1e-6)
    x = draw(3, 4, WIDTH)
    w = dense_weight(base)
    assert relative(layer(x), F.linear(x, w + 0.5 * (case.merge(w) - w), bias)) < 1e-5
    assert report.files[0].matched() == 5


def test_dense_weight_of_what_has_none() -> None:
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    for layer in (nn.LayerNorm(3), packed):
        with pytest.raises(TypeError, match=type(layer).__name__):
            dense_weight(layer)
