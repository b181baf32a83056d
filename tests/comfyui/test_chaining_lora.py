"""ComfyUI's LoRA nodes on our MODEL: loaded, scheduled, extracted, saved, trained, quantized or not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors.torch import save_file

from ..nodes.model_files import quantized_transformer
from ..nodes.tiny import NAMES, SPEC, write_models
from .conftest import inside
from .test_lora import KNOWN, QKV, control, draw, generic, lokr

AGREE = 80.0
"""dB between the latents of the two networks."""
FORMS = ("NF4", "scale_weight")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    models = write_models(tmp_path_factory.mktemp("lora"))
    folder, output = models / "diffusion_models", models / "output"
    output.mkdir()
    loras = {"lora": KNOWN["kohya"], "control": control(SPEC), "norms": norms(), "lokr": generic(lokr)}
    files: dict[str, Any] = {"model": str(folder / NAMES["diffusion_models"]), "quantized": {}}
    for name, tensors in loras.items():
        files[name] = str(models / "loras" / f"{name}.safetensors")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, files[name])
    for form in FORMS:
        files["quantized"][form] = [str(folder / name) for name in quantized_transformer(models, form)]
    found = inside("inside_lora.py", json.dumps(files), output)
    print("| node | effect on ComfyUI's FLUX, dB | ours to it, dB |\n|-|-|-|")
    print_table(found)
    return found


def print_table(found: dict[str, Any], front: str = "") -> None:
    for name, values in found.items():
        if isinstance(values, dict):
            print_table(values, f"{front}{name}: ")
        elif isinstance(values, list) and all(isinstance(value, float) for value in values):
            print(f"| {front}{name} | {values[0]:.1f} | {values[1]:.1f} |")


def norms() -> dict[str, Any]:
    """A LoRA that changes q/k norms by differences, and one linear layer with its bias."""
    tensors = {
        f"diffusion_model.{module}.norm.{norm}.diff": draw(i, SPEC.head_dim)
        for i, (module, norm) in enumerate(
            (module, norm)
            for module in ("double_blocks.0.img_attn", "double_blocks.1.txt_attn", "single_blocks.1")
            for norm in ("query_norm", "key_norm")
        )
    }
    rows, width = 3 * SPEC.hidden_size, SPEC.hidden_size
    return tensors | {
        f"diffusion_model.{QKV}.lora_down.weight": draw(8, 4, width),
        f"diffusion_model.{QKV}.lora_up.weight": draw(9, rows, 4),
        f"diffusion_model.{QKV}.diff_b": draw(10, rows),
    }


NAMED = ("lora", "control", "norms", "lokr")
SCHEDULED = (
    "CreateHookLora",
    "SetHookKeyframes",
    "ConditioningSetProperties, timesteps",
    "CombineHooks",
    "hook of LoKr",
)


@pytest.mark.parametrize(
    "case",
    [f"{loader}, {name}" for loader in ("LoraLoader", "Load FLUX LoRA") for name in NAMED] + [*SCHEDULED],
)
def test_loaders_and_hooks_do_the_same_to_both_networks(found: dict[str, Any], case: str) -> None:
    """q/k norms included: a control LoRA replaces them, a trained one adds a difference."""
    effect, agreement = found[case]
    assert effect < 60, "it changes the latent, so that ignoring it would show"
    assert agreement >= AGREE


@pytest.mark.parametrize("form", FORMS)
def test_scheduled_loras_on_a_model_that_stays_quantized(found: dict[str, Any], form: str) -> None:
    """As on the dequantized weights; an interrupt, a failing patch and Unload Models leave it as it was."""
    for case, value in found["quantized"][form].items():
        if isinstance(value, list):
            assert value[0] < 60 and value[1] >= AGREE, case
        else:
            assert value in (True, "failed"), case


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_a_scheduled_lora_where_activations_are_quantized_too(found: dict[str, Any], form: str) -> None:
    """To the plain LoRA, which computes the modulations of all steps in one batch: some codes differ then."""
    effect, agreement = found["activations"][form]
    assert effect < 32 and agreement > effect + 15
    assert found["activations"][f"{form} after it"]


def test_a_lora_on_scaled_fp8_is_nearer_to_the_truth_than_comfyuis(found: dict[str, Any]) -> None:
    """The truth is the LoRA on the dequantized weights.

    ComfyUI merges the LoRA into the weight and rounds the sum to fp8 again, at random; ours adds the LoRA's
    own two matmuls to those of the fp8 weight, which stays as it is.
    """
    theirs, ours = found["scaled fp8"]["to the truth"]
    assert ours >= AGREE > theirs
    assert abs(found["scaled fp8"]["LoRA"][1] - theirs) < 1, "the whole difference is ComfyUI's rounding"


def test_what_comfyuis_nodes_save_of_our_model(found: dict[str, Any]) -> None:
    """Every key of ComfyUI's; each network's files on both, by both loaders."""
    theirs, ours, same = found["saving"].pop("LoraSave keys")
    assert theirs == ours > 100 and same
    assert len(found["saving"]) == 12
    for case, (effect, agreement) in found["saving"].items():
        assert effect < 60 and agreement >= AGREE, case


def test_trainloranode_trains_on_our_model(found: dict[str, Any]) -> None:
    """Its LoRA has the stock model's keys and loads in both.

    It is the same with and without checkpoints. The stock model's differs: its blocks write into their
    inputs, so that without checkpoints it fails, and with them blocks are computed again from other inputs.
    """
    training = found["training"]
    theirs, ours, same = training["keys"]
    assert theirs == ours and same and training["moved"] == [theirs, theirs]
    assert training["without checkpointing"] < 1e-5
    for loader in ("stock's loader", "our loader"):
        effect, agreement = training[loader]
        assert effect < 60 and agreement >= AGREE


def test_trainloranode_trains_on_a_model_that_stays_quantized(found: dict[str, Any]) -> None:
    """As on the dequantized weights; with bypass_mode too."""
    training = found["training"]
    assert training["NF4 moved"] == [training["keys"][1]] * 2
    assert training["NF4's difference"] < 2e-3
    assert training["NF4 bypassed's difference"] < 2e-2
