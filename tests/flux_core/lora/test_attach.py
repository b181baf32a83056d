"""LoRAs attached to a model: the base stays as it is, and the copy computes what merged weights compute."""

from __future__ import annotations

import copy

import pytest
import torch
from rectiflux.benchmarks.reference.models import SPEC, flux_transformer, relative_error
from rectiflux.flux_core.lora import AdaptedLinear, LoraUse, read_lora, with_lora
from rectiflux.flux_core.model.transformer import FluxTransformer
from torch import Tensor

from .files import Change, dotted, kohya, make_change, merged, peft, xlabs
from .test_conventions import BLOCKS, H, onetrainer, velocity, whole, x_flux


def lora_of(model: FluxTransformer, seed: int) -> tuple[list[Change], LoraUse]:
    """A LoRA in kohya's format that changes all layers of the blocks, and its changes."""
    changes = [make_change(model, name, name, rank=2, seed=seed) for name in BLOCKS]
    return changes, LoraUse(read_lora(kohya(changes), SPEC), 0.5)


def test_the_base_stays_as_it_is_and_is_shared() -> None:
    """Bit for bit, before and after use; the copy has the same parameters and the adapters' tensors."""
    model = flux_transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, tree = velocity(model), [name for name, _ in model.named_modules()]
    changes, use = lora_of(model, 1)
    adapted, _ = with_lora(model, [use])
    velocity(adapted)
    assert torch.equal(velocity(model), expected)
    assert [name for name, _ in model.named_modules()] == tree
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {id(p) for p in adapted.parameters()} == {id(p) for p in model.parameters()}
    added = sum(buffer.numel() for buffer in adapted.buffers())
    assert added == sum(change.up.numel() + change.down.numel() for change in changes)


def test_loras_stack_in_one_call_in_any_order_and_in_several_calls() -> None:
    model = flux_transformer()
    (first, one), (second, two) = lora_of(model, 1), lora_of(model, 2)
    expected = velocity(merged(merged(model, first, 0.5), second, 0.5))
    assert relative_error(velocity(with_lora(model, [one, two])[0]), expected) < 1e-5
    assert relative_error(velocity(with_lora(model, [two, one])[0]), expected) < 1e-5
    chained, _ = with_lora(with_lora(model, [one])[0], [two])
    assert relative_error(velocity(chained), expected) < 1e-5
    layer = chained.get_submodule("double_blocks.0.img_attn.qkv")
    assert isinstance(layer, AdaptedLinear) and not isinstance(layer.base, AdaptedLinear)


def test_fused_layers_and_their_pieces_stack_on_one_layer() -> None:
    """kohya's qkv whole, OneTrainer's and diffusers' q, k, v apart: rows of several kinds at once."""
    model = flux_transformer()
    fused, pieces = whole(model), onetrainer(model)
    uses = [
        LoraUse(read_lora(kohya(fused), SPEC), 0.5),
        LoraUse(read_lora(dotted(pieces, "transformer."), SPEC), -0.3),
        LoraUse(read_lora(xlabs(x_flux(model, True)), SPEC), 0.2),
    ]
    expected = merged(merged(model, fused, 0.5), pieces, -0.3)
    expected = merged(expected, x_flux(model, True), 0.2)
    assert relative_error(velocity(with_lora(model, uses)[0]), velocity(expected)) < 1e-5


def test_adapters_are_on_the_models_device() -> None:
    """The files' tensors are on the CPU; the meta device stands for any other."""
    model = flux_transformer()
    _, use = lora_of(model, 1)
    control = LoraUse(read_lora(control_file(model), SPEC))
    elsewhere = flux_transformer().to("meta")
    adapted, _ = with_lora(elsewhere, [use, control])
    assert {buffer.device.type for buffer in adapted.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in adapted.parameters()} == {"meta"}
    tokens = adapted.img_in(torch.zeros(1, 6, 2 * SPEC.in_channels, device="meta"))
    assert tokens.device.type == "meta" and tokens.shape == (1, 6, H)


def test_a_control_lora_needs_the_control_image() -> None:
    model = flux_transformer()
    adapted, _ = with_lora(model, [LoraUse(read_lora(control_file(model), SPEC))])
    with pytest.raises(ValueError, match="reads 128 values, got 64"):
        adapted.img_in(torch.zeros(1, 6, SPEC.in_channels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_copy_computes_in_the_models_dtype(dtype: torch.dtype) -> None:
    """As close to float32 as the base itself is: within twice the base's own rounding."""
    model = flux_transformer()
    changes, use = lora_of(model, 1)
    half = copy.deepcopy(model).to(dtype)
    adapted, _ = with_lora(half, [use])
    assert adapted.dtype == dtype and adapted.device == half.device
    assert {buffer.dtype for buffer in adapted.buffers()} == {dtype}
    rounding = relative_error(velocity(half).float(), velocity(model))
    ours = relative_error(velocity(adapted).float(), velocity(merged(model, changes, 0.5)))
    assert velocity(adapted).dtype == dtype
    assert ours < 2 * rounding


def test_a_strength_of_0_is_the_base_itself() -> None:
    model = flux_transformer()
    _, use = lora_of(model, 1)
    adapted, report = with_lora(model, [LoraUse(use.file, 0.0)])
    assert torch.equal(velocity(adapted), velocity(model))
    assert not any(isinstance(module, AdaptedLinear) for module in adapted.modules())
    assert report.files[0].matched() == 3 * len(BLOCKS)


def test_strengths_of_single_blocks_multiply_the_loras_own() -> None:
    model = flux_transformer()
    changes, use = lora_of(model, 1)
    adapted, _ = with_lora(
        model, [LoraUse(use.file, 0.5, blocks="double_blocks.0=0, single_blocks=0.5, *.modulation=2")]
    )
    expected = model
    for change in changes:
        factor = 1.0
        if change.module.startswith("double_blocks.0."):
            factor = 0.0
        elif change.module.endswith("modulation.lin"):
            factor = 2.0
        elif change.module.startswith("single_blocks."):
            factor = 0.5
        expected = merged(expected, [change], 0.5 * factor)
    assert relative_error(velocity(adapted), velocity(expected)) < 1e-5
    assert not isinstance(adapted.get_submodule("double_blocks.0.img_attn.qkv"), AdaptedLinear)


# A control LoRA, as Black Forest Labs publish them


def control_file(model: FluxTransformer) -> dict[str, Tensor]:
    """Bare BFL names, biases, norms given whole, and an img_in that reads twice the channels."""
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        stem, _, ending = name.rpartition(".")
        if ending == "scale":
            tensors[name] = torch.rand(parameter.shape, generator=generator) + 0.5
        elif ending == "weight":
            width = 2 * parameter.shape[1] if stem == "img_in" else parameter.shape[1]
            tensors[f"{stem}.lora_A.weight"] = torch.randn(2, width, generator=generator) / width**0.5
            tensors[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(parameter.shape[0], 2, generator=generator)
        else:
            tensors[f"{stem}.lora_B.bias"] = 0.1 * torch.randn(parameter.shape, generator=generator)
    return tensors


def with_control_merged(
    model: FluxTransformer, tensors: dict[str, Tensor], strength: float
) -> FluxTransformer:
    """A wider model whose weights hold the control LoRA; norms are replaced whole at any strength."""
    wide = flux_transformer(in_channels=2 * SPEC.in_channels)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["img_in.weight"] = torch.cat(
        [state["img_in.weight"], torch.zeros_like(state["img_in.weight"])], dim=1
    )
    for key, tensor in tensors.items():
        if key.endswith("lora_B.weight"):
            stem = key.removesuffix(".lora_B.weight")
            state[f"{stem}.weight"] += strength * tensor @ tensors[f"{stem}.lora_A.weight"]
        elif key.endswith("lora_B.bias"):
            state[key.replace("lora_B.bias", "bias")] += strength * tensor
        elif key.endswith("scale"):
            state[key] = tensor
    wide.load_state_dict(state)
    return wide


def test_a_control_lora_widens_img_in_and_replaces_norms() -> None:
    model = flux_transformer()
    tensors = control_file(model)
    lora = read_lora(tensors, SPEC)
    assert lora.convention == "BFL control LoRA" and not lora.unmatched
    adapted, report = with_lora(model, [LoraUse(lora, 0.8)])
    assert report.files[0].matched() == len(tensors)
    assert adapted.spec.in_channels == 2 * SPEC.in_channels and model.spec == SPEC
    assert relative_error(velocity(adapted), velocity(with_control_merged(model, tensors, 0.8))) < 1e-5


def test_a_control_lora_as_diffusers_writes_it_again() -> None:
    """Under diffusers' names, the last modulation's halves swapped, norms as `weight`."""
    model = flux_transformer()
    tensors = control_file(model)
    renamed: dict[str, Tensor] = {}
    theirs = {"img_in": "x_embedder", "final_layer.linear": "proj_out"}
    for i in range(SPEC.depth):
        theirs[f"double_blocks.{i}.img_attn.norm.query_norm"] = f"transformer_blocks.{i}.attn.norm_q"
        theirs[f"double_blocks.{i}.txt_attn.norm.key_norm"] = f"transformer_blocks.{i}.attn.norm_added_k"
        theirs[f"double_blocks.{i}.txt_attn.proj"] = f"transformer_blocks.{i}.attn.to_add_out"
    for i in range(SPEC.depth_single):
        theirs[f"single_blocks.{i}.norm.key_norm"] = f"single_transformer_blocks.{i}.attn.norm_k"
    for key, tensor in tensors.items():
        for ours, other in theirs.items():
            if key.startswith(f"{ours}."):
                renamed[f"transformer.{other}{key.removeprefix(ours).replace('.scale', '.weight')}"] = tensor
    kept = {key: t for key, t in tensors.items() if any(key.startswith(f"{ours}.") for ours in theirs)}
    lora = read_lora(renamed, SPEC)
    adapted, report = with_lora(model, [LoraUse(lora, 0.8)])
    assert report.files[0].matched() == len(renamed) == len(kept) and not lora.unmatched
    assert relative_error(velocity(adapted), velocity(with_control_merged(model, kept, 0.8))) < 1e-5


def test_a_control_lora_works_beside_an_ordinary_one_in_either_order() -> None:
    model = flux_transformer()
    tensors = control_file(model)
    changes = whole(model)
    control, style = (
        LoraUse(read_lora(tensors, SPEC), 1.0),
        LoraUse(read_lora(peft(changes, "transformer."), SPEC)),
    )
    wide = with_control_merged(model, tensors, 1.0)
    with torch.no_grad():
        for change in changes:
            weight = wide.get_submodule(change.module).weight
            weight[:, : change.down.shape[1]] += change.scale * change.up @ change.down
    expected = velocity(wide)
    assert relative_error(velocity(with_lora(model, [control, style])[0]), expected) < 1e-5
    assert relative_error(velocity(with_lora(model, [style, control])[0]), expected) < 1e-5
    chained, _ = with_lora(with_lora(model, [control])[0], [style])
    assert chained.spec.in_channels == 2 * SPEC.in_channels
    assert relative_error(velocity(chained), expected) < 1e-5
    wide_weight = chained.img_in.dense_weight()
    assert relative_error(wide_weight, wide.img_in.weight) < 1e-5


def test_a_lora_of_the_plain_model_fits_one_that_reads_more_channels() -> None:
    """Its img_in changes what the first channels do, as diffusers does for Fill."""
    model = flux_transformer(in_channels=96)
    change = make_change(flux_transformer(), "img_in", "img_in")
    adapted, _ = with_lora(model, [LoraUse(read_lora(kohya([change]), model.spec))])
    expected = model.img_in.weight.clone()
    expected[:, : SPEC.in_channels] += change.scale * change.up @ change.down
    assert relative_error(adapted.img_in.dense_weight(), expected) < 1e-5
    assert adapted.spec == model.spec


# Values of norms, whole weights


def test_differences_and_replacements_of_norms_and_weights() -> None:
    model = flux_transformer()
    generator = torch.Generator().manual_seed(8)
    scale = torch.rand(SPEC.head_dim, generator=generator) + 0.5
    whole_weight = torch.randn(H, H, generator=generator) / 8
    tensors = {
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": scale,
        "diffusion_model.single_blocks.1.norm.key_norm.set_weight": 2 * scale,
        "diffusion_model.double_blocks.1.img_attn.proj.set_weight": whole_weight,
        "diffusion_model.double_blocks.1.img_attn.proj.lora_A.weight": torch.ones(1, H),
        "diffusion_model.double_blocks.1.img_attn.proj.lora_B.weight": torch.ones(H, 1),
        "transformer.transformer_blocks.1.attn.norm_added_k.w_norm": scale,
    }
    use = LoraUse(read_lora(tensors, SPEC), 0.5)
    adapted, report = with_lora(model, [use])
    assert report.files[0].matched() == len(tensors)
    expected = flux_transformer()
    with torch.no_grad():
        expected.get_parameter("double_blocks.0.img_attn.norm.query_norm.scale").add_(0.5 * scale)
        expected.get_parameter("single_blocks.1.norm.key_norm.scale").copy_(2 * scale)
        expected.get_parameter("double_blocks.1.img_attn.proj.weight").copy_(whole_weight + 0.5)
        expected.get_parameter("double_blocks.1.txt_attn.norm.key_norm.scale").add_(0.5 * scale)
    assert relative_error(velocity(adapted), velocity(expected)) < 1e-5
    again, _ = with_lora(adapted, [LoraUse(use.file, 1.0)])
    with torch.no_grad():
        expected.get_parameter("double_blocks.0.img_attn.norm.query_norm.scale").add_(scale)
        expected.get_parameter("double_blocks.1.img_attn.proj.weight").add_(1.0)
        expected.get_parameter("double_blocks.1.txt_attn.norm.key_norm.scale").add_(scale)
    assert relative_error(velocity(again), velocity(expected)) < 1e-5
    assert torch.equal(velocity(model), velocity(flux_transformer()))
