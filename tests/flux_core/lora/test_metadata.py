"""alpha from a file's metadata, in each form that trainers write it, and what of it cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core.lora import LoRA, LoraFile, LoraUse, read_lora, with_lora
from rectiflux.flux_core.model.transformer import FluxTransformer
from safetensors.torch import save_file
from torch import Tensor

from ...nodes.tiny import SPEC

RANK, HIDDEN = 16, SPEC.hidden_size
LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
QK_OF_BLOCK_0 = r"transformer_blocks\.0\.attn\.to_[qk]"
CLIP = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def tensors(prefix: str = "transformer.") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    found = {}
    for block in range(2):
        for layer in LAYERS:
            stem = f"{prefix}transformer_blocks.{block}.{layer}"
            found[f"{stem}.lora_A.weight"] = 0.05 * torch.randn(RANK, HIDDEN, generator=generator)
            found[f"{stem}.lora_B.weight"] = 0.05 * torch.randn(HIDDEN, RANK, generator=generator)
    return found


def tiny_model() -> FluxTransformer:
    return FluxTransformer(SPEC)


def scales(lora: LoraFile) -> dict[str, float]:
    """Scales by the layer's name in the file."""
    found = {}
    for entry in lora.entries:
        assert isinstance(entry.adapter, LoRA)
        found[entry.keys[0].removesuffix(".lora_A.weight").removeprefix("transformer.")] = entry.adapter.scale
    return found


def read(metadata: dict[str, str], **more: Tensor) -> LoraFile:
    return read_lora(tensors() | more, SPEC, metadata, "style.safetensors")


def adapter(**settings: object) -> dict[str, str]:
    """PEFT's settings as diffusers stores them."""
    written = {f"transformer.{key}": value for key, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(written)}


FORMS = {
    "diffusers": adapter(r=16, lora_alpha=64),
    "diffusers, by part": {"lora_adapter_metadata": json.dumps({"transformer": {"lora_alpha": 64}})},
    "PEFT's settings": {"adapter_config": json.dumps({"r": 16, "lora_alpha": 64.0})},
    "flat": {"lora_alpha": "64", "r": "16"},
    "flat, a float": {"lora_alpha": "64.0"},
    "flat, of a part": {"transformer.lora_alpha": "64", "transformer.r": "16"},
    "alpha": {"alpha": "64", "rank": "16"},
    "network_alpha": {"network_alpha": "64"},
    "kohya": {"ss_network_alpha": "64", "ss_network_dim": "16"},
    "first of two": {"ss_network_alpha": "8", "lora_alpha": "64"},
    "rsLoRA": adapter(lora_alpha=16, use_rslora=True),
    "rsLoRA, flat": {"lora_alpha": "16", "use_rslora": "true"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_scale_of_alpha_tensors(form: str) -> None:
    lora = read(FORMS[form])
    assert set(scales(lora).values()) == {4.0}
    assert len(lora.notices) == 1 and "8 layers" in lora.notices[0]
    _, report = with_lora(tiny_model(), [LoraUse(lora)])
    assert f"note: {lora.notices[0]}" in report.text().splitlines()


def test_without_alpha_the_scale_is_1_and_tensors_come_first() -> None:
    assert set(scales(read({"format": "pt", "ss_network_alpha": "None"})).values()) == {1.0}
    assert set(scales(read({"ss_network_alpha": "0"})).values()) == {1.0}  # kohya: the rank
    stem = "transformer.transformer_blocks.0.attn.to_q"
    found = scales(read({"lora_alpha": "64"}, **{f"{stem}.alpha": torch.tensor(8.0)}))
    assert found.pop("transformer_blocks.0.attn.to_q") == 0.5
    assert set(found.values()) == {4.0}


@pytest.mark.parametrize(
    ("pattern", "changed"),
    [
        (QK_OF_BLOCK_0, {"0.attn.to_q", "0.attn.to_k"}),
        ("transformer_blocks.0.attn.to_q", {"0.attn.to_q"}),
        ("to_q", {"0.attn.to_q", "1.attn.to_q"}),
        ("o_q", set()),  # neither at the start nor after a dot
        ("attn", set()),  # not at the end
        (r"^transformer_blocks\.\d+\.attn\.to_v", {"0.attn.to_v", "1.attn.to_v"}),
        (r"1\..*to_(q|out\.0)", {"1.attn.to_q", "1.attn.to_out.0"}),
        (r"to_q|to_k", {f"{block}.attn.to_{x}" for block in (0, 1) for x in "qk"}),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_patterns_match_the_end_of_a_name(pattern: str, changed: set[str], flat: bool) -> None:
    patterns = {pattern: 8}
    metadata = adapter(lora_alpha=64, alpha_pattern=patterns)
    if flat:
        metadata = {"lora_alpha": "64", "alpha_pattern": json.dumps(patterns)}
    found = scales(read(metadata))
    expected = {name: 0.5 if name.removeprefix("transformer_blocks.") in changed else 4.0 for name in found}
    assert found == expected


def test_the_first_pattern_that_matches_decides() -> None:
    first = scales(read(adapter(lora_alpha=64, alpha_pattern={"to_[qk]": 8, "to_q": 32})))
    assert first["transformer_blocks.1.attn.to_q"] == 0.5
    second = scales(read(adapter(lora_alpha=64, alpha_pattern={"to_q": 32, "to_[qk]": 8})))
    assert second["transformer_blocks.1.attn.to_q"] == 2.0
    assert second["transformer_blocks.1.attn.to_k"] == 0.5


@pytest.mark.parametrize(
    "pattern",
    ["[", "(?R)", "a{5000}", "(?:a{90}){90}", "x{e<=30}", "a*" * 200, "(" * 250, r"(\w|\w\w|\.)+[!?]"],
)
def test_a_pattern_that_cannot_be_used_is_reported(pattern: str) -> None:
    """Among them one that would take for ever to match, and some that would take as long to compile."""
    lora = read(adapter(lora_alpha=64, alpha_pattern={pattern: 8}))
    assert set(scales(lora).values()) == {4.0}
    assert any(f"alpha_pattern {pattern[:80]!r} of the metadata not used" in n for n in lora.notices)


def test_many_patterns_that_take_for_ever_end_together() -> None:
    lora = read(adapter(lora_alpha=64, alpha_pattern={rf"(\w|\w\w|\.)+[!{i}]": 8 for i in range(1000)}))
    assert set(scales(lora).values()) == {4.0}
    assert len(lora.notices) == 1001


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"lora_alpha": "many"}, "lora_alpha"),
        ({"lora_alpha": "NaN"}, "lora_alpha"),
        ({"network_alpha": "1e999"}, "network_alpha"),
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata"),
        (adapter(lora_alpha=[1]), "lora_alpha"),
        (adapter(lora_alpha=16, use_dora=True), "use_dora"),
        (adapter(lora_alpha=16, init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
        (adapter(lora_alpha=16, alpha_pattern={"to_q": None}), "to_q"),
        (adapter(lora_alpha=16, alpha_pattern=["to_q"]), "alpha_pattern"),
    ],
)
def test_what_is_not_used_is_reported(metadata: dict[str, str], named: str) -> None:
    lora = read(metadata)
    assert set(scales(lora).values()) == {1.0}
    assert any("not used" in notice and named in notice for notice in lora.notices)
    assert all("\n" not in notice for notice in lora.notices)


def test_each_part_has_its_own_settings() -> None:
    encoder = {f"{CLIP}.lora_A.weight": torch.ones(2, 8), f"{CLIP}.lora_B.weight": torch.ones(8, 2)}
    settings = {"transformer.lora_alpha": 64, "text_encoder.lora_alpha": 6}
    found = scales(read({"lora_adapter_metadata": json.dumps(settings)}, **encoder))
    assert found.pop(CLIP) == 3.0
    assert set(found.values()) == {4.0}


def test_peft_writes_its_settings_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 64, "peft_type": "LORA"}))
    save_file(tensors("base_model.model."), tmp_path / "adapter_model.safetensors")
    save_file(tensors(), tmp_path / "other.safetensors")
    assert set(scales(read_lora(tmp_path / "adapter_model.safetensors", SPEC)).values()) == {4.0}
    assert set(scales(read_lora(tmp_path / "other.safetensors", SPEC)).values()) == {1.0}
    (tmp_path / "adapter_config.json").write_bytes(b"\xff{")
    assert read_lora(tmp_path / "adapter_model.safetensors", SPEC).notices


# NaN and inf


@pytest.mark.parametrize(
    ("role", "value", "dtype"),
    [
        ("lora_A.weight", float("nan"), torch.float32),
        ("lora_B.weight", float("-inf"), torch.bfloat16),
        ("alpha", float("inf"), torch.float16),
        ("dora_scale", float("nan"), torch.float16),
        ("lora_B.bias", float("nan"), torch.float32),
    ],
)
def test_values_that_are_not_finite_name_file_and_count(role: str, value: float, dtype: torch.dtype) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    damaged = tensors()
    damaged |= {f"{stem}.alpha": torch.tensor([4.0]), f"{stem}.dora_scale": torch.ones(HIDDEN)}
    damaged[f"{stem}.lora_B.bias"] = torch.zeros(HIDDEN)
    damaged = {key: tensor.to(dtype) for key, tensor in damaged.items()}
    damaged[f"{stem}.{role}"].flatten()[-1:] = value
    lora, base = read_lora(damaged, SPEC, name="nan-up.safetensors"), tiny_model()
    with pytest.raises(ValueError, match=r"nan-up\.safetensors .* 1 of its 8 layers"):
        with_lora(base, [LoraUse(lora)])
    unchanged, _ = with_lora(base, [LoraUse(lora, 0.0)])
    assert not any("Adapted" in type(module).__name__ for module in unchanged.modules())
    with_lora(base, [LoraUse(lora, blocks="double_blocks.0.img_attn=0")])


def test_large_finite_values_are_no_damage() -> None:
    large = {key: torch.full_like(tensor, 6e4).half() for key, tensor in tensors().items()}
    with_lora(tiny_model(), [LoraUse(read_lora(large, SPEC))])
