"""LoRAs of the text encoders, in every spelling, against transformers' encoders with merged weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from rectiflux.benchmarks.reference.models import SPEC, flux_transformer, relative_error
from rectiflux.benchmarks.reference.text import TXT_LENGTH, clip_model, t5_model, tokenizer
from rectiflux.flux_core.lora import LoraUse, read_lora, with_lora, with_text_lora
from rectiflux.flux_core.model.text_encoders import TextEncoders
from torch import Tensor, nn

from .files import Change, kohya, make_change, peft

LAYERS = ("self_attn", "mlp", "SelfAttention", "DenseReluDense")


def encoders() -> TextEncoders:
    return TextEncoders(t5_model(), tokenizer("$A </s>"), clip_model(), tokenizer("<s> $A </s>"), TXT_LENGTH)


def changes(model: nn.Module, prefix: str = "") -> list[Change]:
    """A change of each linear layer of the blocks, named as published files name it, after `prefix`."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f".{part}." in name for part in LAYERS)
    ]
    made = []
    for name in names:
        published = name if name.startswith(("text_model.", "encoder.block")) else f"text_model.{name}"
        made.append(make_change(model, f"{prefix}{published}", name, rank=2))
    return made


def merge(model: nn.Module, made: list[Change], strength: float) -> None:
    with torch.no_grad():
        for change in made:
            model.get_submodule(change.module).weight += strength * change.scale * change.up @ change.down


Write = Callable[[list[Change], list[Change]], dict[str, Tensor]]

SPELLINGS: dict[str, Write] = {
    "kohya": lambda clip, t5: kohya(clip, "lora_te1_") | kohya(t5, "lora_te3_"),
    "OneTrainer": lambda clip, t5: kohya(clip, "lora_te1_") | kohya(t5, "lora_te2_"),
    "one prefix": lambda clip, t5: kohya(clip, "lora_te_") | kohya(t5, "lora_te_"),
    "ComfyUI": lambda clip, t5: (
        peft(clip, "text_encoders.clip_l.transformer.") | peft(t5, "text_encoders.t5xxl.transformer.")
    ),
    "OneTrainer, newer": lambda clip, t5: peft(clip, "clip_l.") | peft(t5, "t5."),
    "PEFT": lambda clip, t5: peft(clip, "text_encoder.") | peft(t5, "text_encoder_2."),
    "diffusers before PEFT": lambda clip, t5: {
        key.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"): tensor
        for key, tensor in (peft(clip, "text_encoder.") | peft(t5, "text_encoder_2.")).items()
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_prompt_is_encoded_as_with_merged_weights(name: str) -> None:
    base, expected = encoders(), encoders()
    clip, t5 = changes(base.clip), changes(base.t5)
    assert len(clip) == 2 * 6 and len(t5) == 3 * 7
    tensors = SPELLINGS[name](clip, t5)
    file = read_lora(tensors, SPEC)
    adapted, report = with_text_lora(base, [LoraUse(file, strength=0.0, text_strength=0.6)])
    assert report.files[0].matched() == len(tensors) and not report.files[0].unmatched()
    merge(expected.clip, clip, 0.6)
    merge(expected.t5, t5, 0.6)
    ours, theirs, plain = (e.encode(["a red fox on blue"]) for e in (adapted, expected, base))
    assert relative_error(ours.txt, theirs.txt) < 1e-5
    assert relative_error(ours.pooled, theirs.pooled) < 1e-5
    assert relative_error(plain.txt, theirs.txt) > 1e-2
    assert relative_error(plain.pooled, theirs.pooled) > 1e-2
    assert torch.equal(encoders().encode(["a red fox on blue"]).txt, plain.txt)


def test_one_report_of_a_file_for_transformer_and_encoders() -> None:
    model, base = flux_transformer(), encoders()
    block = make_change(model, "double_blocks.0.img_attn.proj", "double_blocks.0.img_attn.proj")
    tensors = kohya([block]) | kohya(changes(base.clip), "lora_te1_")
    use = LoraUse(read_lora(tensors, SPEC, name="a.safetensors"), 0.5)
    _, on_model = with_lora(model, [use])
    assert (on_model.files[0].matched(), "not connected: 36 keys for CLIP-L") == (
        3,
        on_model.text().splitlines()[-1],
    )
    _, on_text = with_text_lora(base, [use])
    assert on_model.joined(on_text).text().splitlines() == [
        "a.safetensors: kohya; LoRA of rank 2 to 3 for 13 layers",
        "matched: 39 keys",
        "unmatched: 0 keys",
    ]


def test_norms_of_the_encoders_can_be_changed() -> None:
    base, expected = encoders(), encoders()
    t5 = torch.linspace(0.5, 1.0, base.t5.config.d_model)
    clip = torch.linspace(-0.5, 0.5, base.clip.config.hidden_size)
    tensors = {
        "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.layer_norm.diff": t5,
        "text_encoders.t5xxl.transformer.encoder.final_layer_norm.diff": t5,
        "lora_te1_text_model_final_layer_norm.w_norm": clip,
        "lora_te1_text_model_final_layer_norm.b_norm": 2 * clip,
        "lora_te1_text_model_encoder_layers_0_layer_norm2.diff": clip,
    }
    adapted, report = with_text_lora(base, [LoraUse(read_lora(tensors, SPEC), text_strength=0.5)])
    assert report.files[0].matched() == len(tensors)
    inner = getattr(expected.clip, "text_model", expected.clip)
    with torch.no_grad():
        expected.t5.encoder.block[1].layer[0].layer_norm.weight += 0.5 * t5
        expected.t5.encoder.final_layer_norm.weight += 0.5 * t5
        inner.final_layer_norm.weight += 0.5 * clip
        inner.final_layer_norm.bias += clip
        inner.encoder.layers[0].layer_norm2.weight += 0.5 * clip
    ours, theirs = (e.encode(["a red fox"]) for e in (adapted, expected))
    assert relative_error(ours.txt, theirs.txt) < 1e-5
    assert relative_error(ours.pooled, theirs.pooled) < 1e-5


def test_layers_that_an_encoder_does_not_have_are_reported() -> None:
    base = encoders()
    made = changes(base.t5)
    deeper = copy.copy(made[0])
    tensors = kohya(made, "lora_te2_") | {
        key.replace("block_0", "block_23"): tensor for key, tensor in kohya([deeper], "lora_te2_").items()
    }
    _, report = with_text_lora(base, [LoraUse(read_lora(tensors, SPEC))])
    assert report.files[0].matched() == 3 * len(made)
    assert report.files[0].misfits[0].why == "this model has no encoder.block.23.layer.0.SelfAttention.q"


def test_a_lora_of_the_transformer_alone_leaves_the_encoders_alone() -> None:
    base = encoders()
    model = flux_transformer()
    change = make_change(model, "img_in", "img_in")
    adapted, report = with_text_lora(base, [LoraUse(read_lora(kohya([change]), SPEC))])
    assert report.files[0].matched() == 0
    assert report.text().splitlines()[-1] == "not connected: 3 keys for the transformer"
    assert torch.equal(adapted.encode(["a fox"]).txt, base.encode(["a fox"]).txt)
