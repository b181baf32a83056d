"""Files: where tensors come from, what is counted, and what damaged or hostile ones do."""

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
from .test_conventions import H, paint, whole

PROJ = "diffusion_model.double_blocks.0.img_attn.proj"


def test_a_file_is_read_with_its_name_and_metadata(tmp_path: Path) -> None:
    model = flux_transformer()
    change = make_change(model, "transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj", rank=2)
    tensors = {k: t for k, t in peft([change], "transformer.", alpha=True).items() if "alpha" not in k}
    path = tmp_path / "painter.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": f'{{"transformer.lora_alpha": {change.alpha}}}'})
    lora = read_lora(path, SPEC)
    assert lora.name == "painter.safetensors"
    adapted, _ = with_lora(model, [LoraUse(lora, 0.7)])
    assert relative_error(paint(adapted), paint(merged(model, [change], 0.7))) < 1e-5


def test_a_file_cannot_lend_its_name_to_another_model(tmp_path: Path) -> None:
    """What a file is its keys say: this one is called after FLUX."""
    path = tmp_path / "flux_style.safetensors"
    save_file({"lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.zeros(1, 4)}, path)
    with pytest.raises(ValueError, match=r"flux_style.safetensors is a LoRA for a Stable Diffusion UNet"):
        read_lora(path, SPEC)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a.lora_A.weight", ("a", "lora_down.weight")),
        ("a.lora_A.default.weight", ("a", "lora_down.weight")),
        ("a.lora_B.default_0.weight", ("a", "lora_up.weight")),
        ("a.lora_B", ("a", "lora_up.weight")),
        ("a.lora_down.weight", ("a", "lora_down.weight")),
        ("a.lora.up.weight", ("a", "lora_up.weight")),
        ("a.lora_linear_layer.down.weight", ("a", "lora_down.weight")),
        ("attn.processor.to_q_lora.up.weight", ("attn.processor.to_q", "lora_up.weight")),
        (
            "double_blocks.0.processor.qkv_lora1.down.weight",
            ("double_blocks.0.processor.qkv_lora1", "lora_down.weight"),
        ),
        (
            "single_blocks.0.processor.proj_lora.up.weight",
            ("single_blocks.0.processor.proj_lora", "lora_up.weight"),
        ),
        ("a.lora_B.bias", ("a", "up_bias")),
        ("a.lora_magnitude_vector", ("a", "dora_scale")),
        ("a.lora_magnitude_vector.default.weight", ("a", "dora_scale")),
        ("a.magnitude", ("a", "dora_scale")),
        ("a.lokr_w2_b", ("a", "lokr_w2_b")),
        ("a.hada_t1", ("a", "hada_t1")),
        ("a.oft_blocks", ("a", "oft_blocks")),
        ("a.diff_b", ("a", "diff_b")),
        ("a.w_norm", ("a", "diff")),
        ("b.query_norm.scale", ("b.query_norm", "set_weight")),
        ("b.key_norm.scale", ("b.key_norm", "set_weight")),
        ("b.norm_q.weight", ("b.norm_q", "set_weight")),
        ("b.norm_added_k.weight", ("b.norm_added_k", "set_weight")),
        ("b.norm.weight", None),
        ("b.scale", None),
        ("a.weight", None),
        ("lora_A.weight", None),
        (".alpha", None),
        ("a" * 500 + ".alpha", None),
    ],
)
def test_keys_are_cut_into_layer_and_role(key: str, expected: tuple[str, str] | None) -> None:
    assert parse_key(key) == expected


# Counting


def report_of(tensors: dict[str, Tensor], strength: float = 1.0) -> Report:
    return with_lora(flux_transformer(), [LoraUse(read_lora(tensors, SPEC, name="a.safetensors"), strength)])[
        1
    ]


def test_the_report_counts_and_names_what_came_to_nothing() -> None:
    model = flux_transformer()
    tensors = kohya(whole(model)[:4])
    strange = [f"lora_unet_double_blocks_{i}_nothing.lora_down.weight" for i in range(7)]
    tensors |= {key: torch.zeros(1, 1) for key in strange}
    report = report_of(tensors)
    assert report.text().splitlines() == [
        "a.safetensors: kohya; LoRA of rank 2 to 4 for 4 layers",
        "matched: 12 keys",
        f"unmatched: 7 keys: {', '.join(strange[:5])} and 2 more",
    ]
    assert report.files[0].unmatched() == tuple(strange)


def test_the_report_tells_what_does_not_fit_and_what_is_not_connected() -> None:
    tensors = kohya(whole(flux_transformer())[:1])
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    tensors |= {
        f"{stem}.lora_down.weight": torch.zeros(2, 3072),
        f"{stem}.lora_up.weight": torch.zeros(3072, 2),
    }
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(2, 8)
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.zeros(8, 2)
    assert report_of(tensors).text().splitlines() == [
        "a.safetensors: kohya; LoRA of rank 2 for 3 layers",
        "matched: 3 keys",
        f"unmatched: 2 keys: {stem}.lora_down.weight, {stem}.lora_up.weight",
        f"does not fit: double_blocks.0.img_attn.proj has a weight of [{H}, {H}] here, "
        "the file's is for [3072, 3072]",
        "not connected: 2 keys for CLIP-L",
    ]


def test_a_lora_of_another_size_is_an_error_that_gives_both() -> None:
    tensors = {f"{PROJ}.lora_A.weight": torch.zeros(2, 3072), f"{PROJ}.lora_B.weight": torch.zeros(3072, 2)}
    message = (
        f"nothing in a.safetensors fits this model: double_blocks.0.img_attn.proj has a weight of [{H}, {H}] "
        "here, the file's is for [3072, 3072]; choose a LoRA that was made for a model of these sizes"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        report_of(tensors)


def test_a_lora_of_a_model_with_guidance_says_what_a_model_without_lacks() -> None:
    model = flux_transformer()
    tensors = kohya([make_change(model, name, name) for name in ("guidance_in.in_layer", "img_in")])
    schnell = flux_transformer(guidance_embed=False)
    lora = read_lora(tensors, SPEC)
    _, report = with_lora(schnell, [LoraUse(lora)])
    assert report.files[0].matched() == 3
    assert report.files[0].misfits[0].why == "this model has no guidance_in.in_layer"


@pytest.mark.parametrize(
    ("role", "tensor", "why"),
    [
        ("diff", torch.zeros(H), "has a weight of [64, 64] here, the file's difference has one dimension"),
        ("diff_b", torch.zeros(3), "has 64 outputs here, the file's bias has 3"),
        ("set_weight", torch.zeros(3, 3), "has a weight of [64, 64] here, the file's is [3, 3]"),
        ("oft_blocks", torch.zeros(2, 4, 4), "has a weight of [64, 64] here, the file's is for 8 rows"),
        ("diff", torch.zeros(H, 2), "has a weight of [64, 64] here, the file's is for [64, 2]"),
    ],
)
def test_values_that_do_not_fit_a_layer(role: str, tensor: Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"double_blocks.0.img_attn.proj {why}")):
        report_of({f"{PROJ}.{role}": tensor})


NORM = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"diff": torch.zeros(3)}, "has [32] as its scale here, the file has [3]"),
        ({"diff_b": torch.zeros(32)}, "has nothing as its bias here, the file has [32]"),
        (
            {"lora_A.weight": torch.zeros(1, 32), "lora_B.weight": torch.zeros(32, 1)},
            "is a norm, to which no adapter can be attached",
        ),
    ],
)
def test_values_that_do_not_fit_a_norm(tensors: dict[str, Tensor], why: str) -> None:
    message = f"double_blocks.0.img_attn.norm.query_norm {why}"
    with pytest.raises(ValueError, match=re.escape(message)):
        report_of({f"{NORM}.{role}": tensor for role, tensor in tensors.items()})


# Damage


BROKEN: dict[str, dict[str, Tensor]] = {
    "up alone": {"lora_B.weight": torch.zeros(H, 2)},
    "down alone": {"lora_A.weight": torch.zeros(2, H)},
    "ranks that differ": {"lora_A.weight": torch.zeros(2, H), "lora_B.weight": torch.zeros(H, 3)},
    "rank 0": {"lora_A.weight": torch.zeros(0, H), "lora_B.weight": torch.zeros(H, 0)},
    "a vector": {"lora_A.weight": torch.zeros(2), "lora_B.weight": torch.zeros(H, 2)},
    "a scalar": {"lora_A.weight": torch.tensor(1.0), "lora_B.weight": torch.zeros(H, 2)},
    "alpha of two": {
        "lora_A.weight": torch.zeros(2, H),
        "lora_B.weight": torch.zeros(H, 2),
        "alpha": torch.zeros(2),
    },
    "alpha alone": {"alpha": torch.tensor(1.0)},
    "a mid that no linear layer has": {
        "lora_A.weight": torch.zeros(2, H),
        "lora_B.weight": torch.zeros(H, 2),
        "lora_mid.weight": torch.zeros(2, 2),
    },
    "two kinds at once": {
        "lora_A.weight": torch.zeros(2, H),
        "lora_B.weight": torch.zeros(H, 2),
        "lokr_w1": torch.zeros(2, 2),
    },
    "half a LoHa": {"hada_w1_a": torch.zeros(H, 2), "hada_w1_b": torch.zeros(2, H)},
    "LoHa of two shapes": {
        "hada_w1_a": torch.zeros(H, 2),
        "hada_w1_b": torch.zeros(2, H),
        "hada_w2_a": torch.zeros(H, 2),
        "hada_w2_b": torch.zeros(2, H + 1),
    },
    "half a LoKr": {"lokr_w1": torch.zeros(2, 2)},
    "a Tucker core that does not fit": {
        "lokr_w1": torch.zeros(2, 2),
        "lokr_w2_a": torch.zeros(3, 32),
        "lokr_w2_b": torch.zeros(3, 32),
        "lokr_t2": torch.zeros(2, 2, 1, 1),
    },
    "lengths that fit nothing": {
        "lora_A.weight": torch.zeros(2, H),
        "lora_B.weight": torch.zeros(H, 2),
        "dora_scale": torch.zeros(3),
    },
    "OFT's blocks that are not square": {"oft_blocks": torch.zeros(4, 4, 16)},
    "BOFT's blocks that make no butterfly": {"oft_blocks": torch.zeros(9, 4, 16, 16)},
    "OFT's rescale of another length": {"oft_blocks": torch.zeros(4, 16, 16), "rescale": torch.zeros(3)},
    "OFT with DoRA": {"oft_blocks": torch.zeros(4, 16, 16), "dora_scale": torch.zeros(H, 1)},
}


@pytest.mark.parametrize("name", BROKEN)
def test_half_an_adapter_is_counted_as_unmatched_and_changes_nothing(name: str) -> None:
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
    tensors = {
        f"{PROJ}.lora_A.weight": torch.zeros(2, H),
        f"{PROJ}.lora_B.weight": torch.zeros(H, 2),
        f"{PROJ}.lora_down.weight": torch.zeros(2, H),
    }
    assert read_lora(tensors, SPEC).unmatched == (f"{PROJ}.lora_down.weight",)


def test_a_lora_of_the_encoders_alone_is_an_error_where_none_is_connected() -> None:
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{stem}.lora_down.weight": torch.zeros(2, 8), f"{stem}.lora_up.weight": torch.zeros(8, 2)}
    report = report_of(tensors)
    message = "a.safetensors changes nothing of what is connected here, only CLIP-L; connect the CLIP too"
    with pytest.raises(ValueError, match=message):
        report.checked()


def test_reports_of_other_loras_are_not_joined() -> None:
    first, second = (report_of(kohya(whole(flux_transformer())[:1])) for _ in range(2))
    assert first.joined(first).text() == first.text()
    with pytest.raises(ValueError, match="only reports of the same LoRAs can be joined"):
        first.joined(second)
