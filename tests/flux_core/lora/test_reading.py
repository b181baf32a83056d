"""Reading files: names and metadata, keys, the report, and damaged or hostile tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.models import SPEC, flux_transformer, relative_error
from rectiflux.flux_core.lora import LoraUse, Report, read_lora, with_lora
from rectiflux.flux_core.lora.conventions import parse_key
from safetensors.torch import save_file
from torch import Tensor

from .files import kohya, make_change, merged, peft
from .test_conventions import H, velocity, whole

PROJ = "diffusion_model.double_blocks.0.img_attn.proj"


def lora_pair(stem: str, width: int) -> dict[str, Tensor]:
    """A LoRA of zeros of a square layer."""
    return {
        f"{stem}.lora_down.weight": torch.zeros(2, width),
        f"{stem}.lora_up.weight": torch.zeros(width, 2),
    }


def test_a_file_is_read_with_its_name_and_metadata(tmp_path: Path) -> None:
    model = flux_transformer()
    change = make_change(model, "transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj", rank=2)
    tensors = {k: t for k, t in peft([change], "transformer.", alpha=True).items() if "alpha" not in k}
    path = tmp_path / "painter.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": f'{{"transformer.lora_alpha": {change.alpha}}}'})
    lora = read_lora(path, SPEC)
    assert lora.name == "painter.safetensors"
    adapted, _ = with_lora(model, [LoraUse(lora, 0.7)])
    assert relative_error(velocity(adapted), velocity(merged(model, [change], 0.7))) < 1e-5


def test_the_model_is_detected_from_the_keys_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "flux_style.safetensors"
    save_file({"lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.zeros(1, 4)}, path)
    with pytest.raises(ValueError, match=r"flux_style.safetensors is a LoRA for a Stable Diffusion UNet"):
        read_lora(path, SPEC)


@pytest.mark.parametrize(
    ("key", "layer", "role"),
    [
        ("a.lora_A.weight", "a", "lora_down.weight"),
        ("a.lora_A.default.weight", "a", "lora_down.weight"),
        ("a.lora_B.default_0.weight", "a", "lora_up.weight"),
        ("a.lora_B", "a", "lora_up.weight"),
        ("a.lora_down.weight", "a", "lora_down.weight"),
        ("a.lora.up.weight", "a", "lora_up.weight"),
        ("a.lora_linear_layer.down.weight", "a", "lora_down.weight"),
        ("attn.processor.to_q_lora.up.weight", "attn.processor.to_q", "lora_up.weight"),
        ("0.processor.qkv_lora1.down.weight", "0.processor.qkv_lora1", "lora_down.weight"),
        ("0.processor.proj_lora.up.weight", "0.processor.proj_lora", "lora_up.weight"),
        ("a.lora_B.bias", "a", "up_bias"),
        ("a.lora_magnitude_vector", "a", "dora_scale"),
        ("a.lora_magnitude_vector.default.weight", "a", "dora_scale"),
        ("a.magnitude", "a", "dora_scale"),
        ("a.lokr_w2_b", "a", "lokr_w2_b"),
        ("a.hada_t1", "a", "hada_t1"),
        ("a.oft_blocks", "a", "oft_blocks"),
        ("a.diff_b", "a", "diff_b"),
        ("a.w_norm", "a", "diff"),
        ("b.query_norm.scale", "b.query_norm", "set_weight"),
        ("b.key_norm.weight", "b.key_norm", "set_weight"),
        ("b.norm_q.weight", "b.norm_q", "set_weight"),
        ("b.norm_added_k.weight", "b.norm_added_k", "set_weight"),
    ],
)
def test_a_key_is_a_layer_and_a_role(key: str, layer: str, role: str) -> None:
    assert parse_key(key) == (layer, role)


@pytest.mark.parametrize(
    "key", ["b.norm.weight", "b.scale", "a.weight", "lora_A.weight", ".alpha", "a" * 500 + ".alpha"]
)
def test_a_key_with_an_unknown_ending(key: str) -> None:
    assert parse_key(key) is None


# Counting


def report_of(tensors: dict[str, Tensor]) -> Report:
    use = LoraUse(read_lora(tensors, SPEC, name="a.safetensors"))
    return with_lora(flux_transformer(), [use])[1]


def test_the_report_counts_unmatched_keys_and_lists_the_first() -> None:
    tensors = kohya(whole(flux_transformer())[:4])
    unknown = [f"lora_unet_double_blocks_{i}_nothing.lora_down.weight" for i in range(7)]
    report = report_of(tensors | {key: torch.zeros(1, 1) for key in unknown})
    assert report.text().splitlines() == [
        "a.safetensors: kohya; LoRA of rank 2 to 4 for 4 layers",
        "matched: 12 keys",
        f"unmatched: 7 keys: {', '.join(unknown[:5])} and 2 more",
    ]
    assert report.files[0].unmatched() == tuple(unknown)


def test_the_report_says_what_does_not_fit_and_what_is_not_connected() -> None:
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    wide = lora_pair(stem, 3072) | lora_pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8)
    assert report_of(kohya(whole(flux_transformer())[:1]) | wide).text().splitlines() == [
        "a.safetensors: kohya; LoRA of rank 2 for 3 layers",
        "matched: 3 keys",
        f"unmatched: 2 keys: {stem}.lora_down.weight, {stem}.lora_up.weight",
        f"does not fit: double_blocks.0.img_attn.proj has a weight of [{H}, {H}] here, "
        "the file's is for [3072, 3072]",
        "not connected: 2 keys for CLIP-L",
    ]


def test_a_lora_of_another_size_is_an_error_with_both_sizes() -> None:
    sizes = (
        f"a.safetensors fits this model: .*img_attn.proj .*{[H, H]} here, the file's is for {[3072, 3072]}"
    )
    with pytest.raises(ValueError, match=sizes.replace("[", r"\[")):
        report_of(lora_pair(PROJ, 3072))


def test_a_lora_of_a_model_with_guidance_says_what_a_model_without_lacks() -> None:
    model = flux_transformer()
    tensors = kohya([make_change(model, name, name) for name in ("guidance_in.in_layer", "img_in")])
    schnell = flux_transformer(guidance_embed=False)
    lora = read_lora(tensors, SPEC)
    _, report = with_lora(schnell, [LoraUse(lora)])
    assert report.files[0].matched() == 3
    assert report.files[0].misfits[0].why == "this model has no guidance_in.in_layer"


NORM = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"
PAIR = {"lora_A.weight": torch.zeros(1, 32), "lora_B.weight": torch.zeros(32, 1)}


@pytest.mark.parametrize(
    ("layer", "tensors", "why"),
    [
        (PROJ, {"diff": torch.zeros(H)}, "[64, 64] here, the file's difference has one dimension"),
        (PROJ, {"diff_b": torch.zeros(3)}, "64 outputs here, the file's bias has 3"),
        (PROJ, {"set_weight": torch.zeros(3, 3)}, "[64, 64] here, the file's is [3, 3]"),
        (PROJ, {"oft_blocks": torch.zeros(2, 4, 4)}, "[64, 64] here, the file's is for 8 rows"),
        (PROJ, {"diff": torch.zeros(H, 2)}, "[64, 64] here, the file's is for [64, 2]"),
        (NORM, {"diff": torch.zeros(3)}, "[32] as its scale here, the file has [3]"),
        (NORM, {"diff_b": torch.zeros(32)}, "nothing as its bias here, the file has [32]"),
        (NORM, PAIR, "is a norm"),
    ],
)
def test_tensors_of_another_shape_than_the_module(layer: str, tensors: dict[str, Tensor], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        report_of({f"{layer}.{role}": tensor for role, tensor in tensors.items()})
    assert layer.removeprefix("diffusion_model.") in str(error.value)


# Damaged and hostile files


WHOLE = {"lora_A.weight": torch.zeros(2, H), "lora_B.weight": torch.zeros(H, 2)}
FIRST = {"hada_w1_a": torch.zeros(H, 2), "hada_w1_b": torch.zeros(2, H)}
BROKEN: dict[str, dict[str, Tensor]] = {
    "up alone": {"lora_B.weight": torch.zeros(H, 2)},
    "down alone": {"lora_A.weight": torch.zeros(2, H)},
    "ranks that differ": {**WHOLE, "lora_B.weight": torch.zeros(H, 3)},
    "rank 0": {"lora_A.weight": torch.zeros(0, H), "lora_B.weight": torch.zeros(H, 0)},
    "a vector": {**WHOLE, "lora_A.weight": torch.zeros(2)},
    "a scalar": {**WHOLE, "lora_A.weight": torch.tensor(1.0)},
    "alpha of two": {**WHOLE, "alpha": torch.zeros(2)},
    "alpha alone": {"alpha": torch.tensor(1.0)},
    "a mid that no linear layer has": {**WHOLE, "lora_mid.weight": torch.zeros(2, 2)},
    "two kinds at once": {**WHOLE, "lokr_w1": torch.zeros(2, 2)},
    "half a LoHa": FIRST,
    "LoHa of two shapes": {**FIRST, "hada_w2_a": torch.zeros(H, 2), "hada_w2_b": torch.zeros(2, H + 1)},
    "half a LoKr": {"lokr_w1": torch.zeros(2, 2)},
    "a Tucker core that does not fit": {
        "lokr_w1": torch.zeros(2, 2),
        "lokr_w2_a": torch.zeros(3, 32),
        "lokr_w2_b": torch.zeros(3, 32),
        "lokr_t2": torch.zeros(2, 2, 1, 1),
    },
    "a dora_scale that fits nothing": {**WHOLE, "dora_scale": torch.zeros(3)},
    "OFT blocks that are not square": {"oft_blocks": torch.zeros(4, 4, 16)},
    "BOFT blocks that make no butterfly": {"oft_blocks": torch.zeros(9, 4, 16, 16)},
    "an OFT rescale of another length": {"oft_blocks": torch.zeros(4, 16, 16), "rescale": torch.zeros(3)},
    "OFT with DoRA": {"oft_blocks": torch.zeros(4, 16, 16), "dora_scale": torch.zeros(H, 1)},
    "an empty difference": {"diff": torch.zeros(0)},
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_make_no_adapter_are_unmatched_and_change_nothing(name: str) -> None:
    model = flux_transformer()
    change = make_change(model, "double_blocks.1.img_attn.proj", "double_blocks.1.img_attn.proj")
    broken = {f"{PROJ}.{role}": tensor for role, tensor in BROKEN[name].items()}
    lora = read_lora(peft([change], "diffusion_model.") | broken, SPEC)
    assert lora.unmatched == tuple(broken)
    adapted, report = with_lora(model, [LoraUse(lora)])
    assert report.files[0].matched() == 2
    assert adapted.get_parameter("double_blocks.0.img_attn.proj.weight") is model.get_parameter(
        "double_blocks.0.img_attn.proj.weight"
    )


def test_two_tensors_for_one_role_are_not_guessed_between() -> None:
    tensors = {f"{PROJ}.{role}": tensor for role, tensor in WHOLE.items()}
    tensors[f"{PROJ}.lora_down.weight"] = torch.zeros(2, H)
    assert read_lora(tensors, SPEC).unmatched == (f"{PROJ}.lora_down.weight",)


def test_a_lora_of_the_encoders_alone_is_an_error_where_none_is_connected() -> None:
    report = report_of(lora_pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8))
    with pytest.raises(ValueError, match="a.safetensors .* only CLIP-L"):
        report.checked()


def test_reports_of_other_loras_are_not_joined() -> None:
    first, second = (report_of(kohya(whole(flux_transformer())[:1])) for _ in range(2))
    assert first.joined(first).text() == first.text()
    with pytest.raises(ValueError, match="the same LoRAs"):
        first.joined(second)
