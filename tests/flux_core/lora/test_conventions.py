"""Every convention: a file in it gives the velocity of the weights W + s (alpha / rank) B A."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from rectiflux.benchmarks.reference.models import (
    SPEC,
    diffusers_transformer,
    diffusers_velocity,
    flux_transformer,
    relative_error,
    text,
)
from rectiflux.flux_core.lora import LoraUse, read_lora, with_lora
from rectiflux.flux_core.lora.conventions import find_target
from rectiflux.flux_core.model.names import layer_names
from rectiflux.flux_core.model.transformer import FluxTransformer
from torch import Tensor, nn

from .files import Change, dotted, kohya, make_change, merged, peft, xlabs

H = SPEC.hidden_size
MLP = SPEC.mlp_size
SIGMA = 0.6

LINEAR = [name for name, module in flux_transformer().named_modules() if isinstance(module, nn.Linear)]
BLOCKS = [name for name in LINEAR if "blocks" in name]
PIECES = {"img_attn.qkv": "to_{}", "txt_attn.qkv": "add_{}_proj", "linear1": "to_{}"}
"""BFL's fused layers, and diffusers' names of their pieces."""


def velocity(model: FluxTransformer) -> Tensor:
    """The velocity of fixed tokens and a fixed prompt."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(1, 6, model.spec.in_channels, generator=generator)
    with torch.no_grad():
        return model(tokens, model.prepare(text(1), [SIGMA], 4, 6), SIGMA)


def velocity_in_diffusers(model: FluxTransformer2DModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(1, 6, SPEC.in_channels, generator=generator)
    return diffusers_velocity(model, tokens, text(1), SIGMA, 4, 6)


def whole(model: FluxTransformer, names: list[str] = LINEAR) -> list[Change]:
    """A change of each of BFL's layers, under its own name."""
    return [make_change(model, name, name, rank=2 + i % 3) for i, name in enumerate(names)]


def onetrainer(model: FluxTransformer) -> list[Change]:
    """Changes under OneTrainer's names: BFL's, fused layers by number."""
    changes = []
    for name in LINEAR:
        module = {"img_in": "img_in.proj"}.get(name, name)
        if name.endswith("qkv"):
            rows = [slice(i * H, (i + 1) * H) for i in range(3)]
        elif name.endswith("linear1"):
            rows = [slice(0, H), slice(H, 2 * H), slice(2 * H, 3 * H), slice(3 * H, 3 * H + MLP)]
        else:
            changes.append(make_change(model, module, name))
            continue
        changes += [
            make_change(model, f"{name}.{i}", name, piece, seed=i + 1) for i, piece in enumerate(rows)
        ]
    return changes


def x_flux(model: FluxTransformer, single: bool) -> list[Change]:
    """Changes under XLabs' names; its single blocks' qkv is the first three quarters of linear1."""
    changes = []
    for i in range(SPEC.depth):
        block, processor = f"double_blocks.{i}", f"double_blocks.{i}.processor"
        for number, stream in (("1", "img"), ("2", "txt")):
            changes.append(make_change(model, f"{processor}.qkv_lora{number}", f"{block}.{stream}_attn.qkv"))
            changes.append(
                make_change(model, f"{processor}.proj_lora{number}", f"{block}.{stream}_attn.proj")
            )
    for i in range(SPEC.depth_single if single else 0):
        block, processor = f"single_blocks.{i}", f"single_blocks.{i}.processor"
        changes.append(make_change(model, f"{processor}.qkv_lora", f"{block}.linear1", slice(0, 3 * H)))
        changes.append(make_change(model, f"{processor}.proj_lora", f"{block}.linear2"))
    return changes


Case = tuple[Callable[[FluxTransformer], list[Change]], Callable[[list[Change]], dict[str, Tensor]], str]

BFL_NAMED: dict[str, Case] = {
    "kohya": (whole, kohya, "kohya"),
    "BFL PEFT, diffusion_model.": (whole, lambda c: peft(c, "diffusion_model."), "BFL's names"),
    "BFL PEFT, base_model.model.": (whole, lambda c: peft(c, "base_model.model."), "BFL's names"),
    "BFL PEFT, no prefix": (
        lambda model: whole(model, BLOCKS),
        lambda c: peft(c, ""),
        "BFL's names",
    ),
    "BFL names, kohya's endings": (whole, lambda c: dotted(c, "diffusion_model."), "BFL's names"),
    "OneTrainer, BFL's names split": (onetrainer, lambda c: dotted(c, "transformer."), "OneTrainer, BFL's"),
    "XLabs": (lambda model: x_flux(model, True), xlabs, "XLabs"),
    "XLabs without single blocks": (lambda model: x_flux(model, False), xlabs, "XLabs"),
    "XLabs under diffusion_model.": (
        lambda model: x_flux(model, True),
        lambda c: xlabs(c, "diffusion_model."),
        "XLabs",
    ),
}


def assert_velocity(
    model: FluxTransformer, tensors: dict[str, Tensor], convention: str, expected: Tensor
) -> None:
    """Every key of a file of the convention is applied, and at strength 0.7 the velocity is as expected."""
    lora = read_lora(tensors, model.spec)
    assert lora.convention.startswith(convention)
    adapted, report = with_lora(model, [LoraUse(lora, 0.7)])
    assert report.files[0].matched() == len(tensors) and not report.files[0].unmatched()
    assert relative_error(velocity(adapted), expected) < 1e-5
    assert relative_error(velocity(model), expected) > 1e-2


@pytest.mark.parametrize("name", BFL_NAMED)
def test_a_lora_named_after_bfls_layers(name: str) -> None:
    make, write, convention = BFL_NAMED[name]
    model = flux_transformer()
    changes = make(model)
    expected = velocity(merged(model, changes, 0.7))
    assert_velocity(model, write(changes), convention, expected)


def diffusers_changes(reference: FluxTransformer2DModel) -> list[Change]:
    """A change of each linear layer of diffusers' transformer, under its name there."""
    names = [name for name, module in reference.named_modules() if isinstance(module, nn.Linear)]
    return [make_change(reference, name, name, rank=1 + i % 4) for i, name in enumerate(names)]


def stray(changes: list[Change]) -> dict[str, Tensor]:
    """Names that end in an underscore, as some of SimpleTuner's do."""
    return {key.replace(".", "_.", 1): tensor for key, tensor in kohya(changes).items()}


DIFFUSERS_NAMED: dict[str, tuple[Callable[[list[Change]], dict[str, Tensor]], str]] = {
    "transformer.": (lambda c: peft(c, "transformer."), "diffusers"),
    "base_model.model.": (lambda c: peft(c, "base_model.model."), "diffusers"),
    "no prefix": (lambda c: peft(c, ""), "diffusers"),
    "with alphas": (lambda c: peft(c, "transformer.", alpha=True), "diffusers"),
    "OneTrainer": (lambda c: kohya(c, "lora_transformer_"), "OneTrainer, diffusers'"),
    "SimpleTuner": (lambda c: kohya(c, "lycoris_"), "LyCORIS"),
    "kohya's format": (kohya, "kohya's format with diffusers"),
    "stray underscores": (stray, "kohya's format with diffusers"),
}


@pytest.mark.parametrize("name", DIFFUSERS_NAMED)
def test_a_lora_named_after_diffusers_layers_does_what_it_does_in_diffusers(name: str) -> None:
    """The weights are merged in diffusers' own layout: q, k, v apart, the last modulation (scale, shift)."""
    write, convention = DIFFUSERS_NAMED[name]
    model = flux_transformer()
    reference = diffusers_transformer(model)
    changes = diffusers_changes(reference)
    expected = velocity_in_diffusers(merged(reference, changes, 0.7))
    assert_velocity(model, write(changes), convention, expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_settings_give_alpha_where_no_tensor_does(rslora: bool) -> None:
    """diffusers stores them as JSON; rsLoRA divides by the root of the rank (arXiv:2312.03732)."""
    model = flux_transformer()
    layers = ("double_blocks.0.img_attn.proj", "double_blocks.1.img_attn.proj")
    names = ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.to_out.0")
    changes = [make_change(model, n, layer, rank=4) for n, layer in zip(names, layers, strict=True)]
    tensors = {key: t for key, t in peft(changes, "transformer.", alpha=True).items() if "alpha" not in key}
    settings = {
        "transformer.r": 4,
        "transformer.lora_alpha": 6,
        "transformer.alpha_pattern": {"transformer_blocks.1.attn.to_out.0": 10},
        "transformer.use_rslora": rslora,
    }
    lora = read_lora(tensors, model.spec, {"lora_adapter_metadata": json.dumps(settings)})
    adapted, _ = with_lora(model, [LoraUse(lora)])
    divisor = 2.0 if rslora else 4.0
    for change, alpha in zip(changes, (6.0, 10.0), strict=True):
        expected = model.get_submodule(change.module).weight + alpha / divisor * (change.up @ change.down)
        got = adapted.get_submodule(change.module).dense_weight()
        assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("metadata", ["", "{", "[1]", "[" * 100_000, '{"transformer.lora_alpha": "x"}'])
def test_settings_that_cannot_be_parsed_give_no_alpha(metadata: str) -> None:
    model = flux_transformer()
    change = make_change(model, "transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj")
    lora = read_lora(peft([change], "transformer."), model.spec, {"lora_adapter_metadata": metadata})
    assert lora.entries[0].adapter.alpha is None


def test_no_two_layers_share_a_name_that_is_written_with_underscores() -> None:
    """Otherwise kohya's names would not be unique: the table would hold fewer names than were put in."""
    names = [name.replace(".", "_") for name in layer_names(SPEC)]
    assert len(names) == len(set(names))
    targets = [find_target(name, SPEC) for name in names]
    assert [target.module for target in targets if target] == list(layer_names(SPEC))


def test_a_piece_of_a_fused_layer_changes_no_other_rows() -> None:
    model = flux_transformer()
    change = make_change(
        model, "double_blocks.1.txt_attn.qkv.1", "double_blocks.1.txt_attn.qkv", slice(H, 2 * H)
    )
    adapted, _ = with_lora(model, [LoraUse(read_lora(dotted([change], "transformer."), SPEC))])
    base, layer = (m.get_submodule("double_blocks.1.txt_attn.qkv") for m in (model, adapted))
    x = torch.randn(2, 5, H, generator=torch.Generator().manual_seed(0))
    difference = layer(x) - base(x)
    assert torch.equal(difference[..., :H], torch.zeros(2, 5, H))
    assert torch.equal(difference[..., 2 * H :], torch.zeros(2, 5, H))
    assert torch.allclose(
        difference[..., H : 2 * H], change.scale * x @ change.down.T @ change.up.T, atol=1e-5
    )


@pytest.mark.parametrize("spelling", ["scale", "weight"])
@pytest.mark.parametrize("ending", ["", ".diff"])
def test_norms_in_both_spellings(spelling: str, ending: str) -> None:
    """BFL's `.scale`, and `.weight` as ComfyUI 0.33 saves; as a replacement, and as a difference."""
    norms = [name for name in layer_names(SPEC) if name.endswith("_norm")]
    values = {name: torch.rand(SPEC.head_dim, generator=torch.Generator().manual_seed(1)) for name in norms}
    key = "diffusion_model.{}" + (ending or f".{spelling}")
    tensors = {key.format(name): value for name, value in values.items()}
    change = make_change(flux_transformer(), "img_in", "img_in", slice(None))
    model = flux_transformer()
    lora = read_lora({**tensors, **dotted([change], "diffusion_model.")}, SPEC)
    assert not lora.unmatched
    adapted, _ = with_lora(model, [LoraUse(lora, 1.0)])
    for name, value in values.items():
        old = model.get_submodule(name).scale if ending else 0.0
        assert torch.allclose(adapted.get_submodule(name).scale, old + value)
