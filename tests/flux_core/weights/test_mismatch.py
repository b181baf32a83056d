"""Files that are another model, incomplete, or whose shapes make none: refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.models import autoencoder, diffusers_state_dict, flux_transformer
from rectiflux.benchmarks.reference.text import save_text_encoders
from rectiflux.flux_core.weights import (
    load_autoencoder,
    load_text_encoders,
    load_transformer,
    read_state_dict,
)
from safetensors.torch import save_file
from torch import Tensor

from .refusals import refusal

State = dict[str, Tensor]


def saved(tmp_path: Path, tensors: State, name: str = "model.safetensors") -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name)
    return tmp_path / name


def without(*prefixes: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def with_tensors(**tensors: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


BFL: dict[str, tuple[Callable[[State], State], str]] = {
    "one missing": (without("single_blocks.1.linear2.bias"), "1 tensor (single_blocks.1.linear2.bias)"),
    "many missing": (without("double_blocks.1.txt"), "12 tensors"),
    "unknown": (with_tensors(img_in__scale_weight=torch.ones(1)), "img_in.scale_weight"),
    "shape": (with_tensors(single_blocks__0__linear1__weight=torch.ones(3, 5)), "[448, 64]"),
    "integers": (with_tensors(img_in__weight=torch.ones(64, 64, dtype=torch.int8)), "torch.int8"),
    "size unknown": (without("txt_in.weight"), "txt_in.weight"),
    "blocks": (with_tensors(**{f"single_blocks__{i}__x": torch.zeros(1) for i in range(1200)}), "1,202"),
}
DIFFUSERS = {
    "missing part": (
        without("single_transformer_blocks.1.proj_mlp.w"),
        "MLP part of single_blocks.1.linear1",
    ),
    "part of other width": (
        with_tensors(transformer_blocks__0__attn__to_k__weight=torch.zeros(64, 3)),
        "[64, 64], [64, 3], [64, 64]",
    ),
    "odd rows": (with_tensors(norm_out__linear__weight=torch.zeros(3, 64)), "norm_out.linear.weight has 3"),
}


@pytest.mark.parametrize(("damage", "problem"), BFL.values(), ids=BFL)
def test_transformers_that_do_not_match(tmp_path: Path, damage: Callable, problem: str) -> None:
    path = saved(tmp_path, damage(flux_transformer().state_dict()))
    assert problem in refusal(load_transformer, path)


@pytest.mark.parametrize(("damage", "problem"), DIFFUSERS.values(), ids=DIFFUSERS)
def test_diffusers_transformers_that_do_not_match(tmp_path: Path, damage: Callable, problem: str) -> None:
    path = saved(tmp_path, damage(diffusers_state_dict(flux_transformer())))
    assert problem in refusal(load_transformer, path)


def test_autoencoders_that_do_not_match(tmp_path: Path) -> None:
    state = dict(autoencoder().state_dict())
    four_channels = {"decoder.conv_in.weight": state["decoder.conv_in.weight"][:, :4]}
    assert "4 latent channels" in refusal(load_autoencoder, saved(tmp_path, state | four_channels))
    del state["encoder.down.1.block.0.conv1.weight"]
    problem = refusal(load_autoencoder, saved(tmp_path, state))
    assert "encoder.down.1.block.0.conv1.weight" in problem


def test_other_models_are_named(tmp_path: Path) -> None:
    clip, t5 = save_text_encoders(tmp_path)
    vae = saved(tmp_path, autoencoder().state_dict(), "ae.safetensors")
    flux = saved(tmp_path, flux_transformer().state_dict(), "flux.safetensors")
    lora = saved(tmp_path, {"lora_unet_single_blocks_0_linear1.alpha": torch.zeros(1)}, "l.safetensors")
    cases: list[tuple[Callable, tuple[Path, ...], str]] = [
        (load_transformer, (vae,), "ae.safetensors is a VAE, not a FLUX.1 transformer"),
        (load_transformer, (t5,), "t5.safetensors is a T5 text encoder, not a FLUX.1 transformer"),
        (load_autoencoder, (clip,), "clip.safetensors is a CLIP text encoder, not a VAE"),
        (load_autoencoder, (flux,), "flux.safetensors is a FLUX.1 transformer, not a VAE"),
        (load_text_encoders, (clip, flux), "is a FLUX.1 transformer, not a T5 text encoder"),
        (load_text_encoders, (vae, t5), "ae.safetensors is a VAE, not a CLIP text encoder"),
        (load_transformer, (lora,), "is a LoRA, not a FLUX.1 transformer; load it with the LoRA node"),
    ]
    for load, paths, problem in cases:
        assert problem in refusal(load, *paths)


SHAPES = [torch.tensor(1.0), torch.zeros(0), torch.zeros(0, 5), torch.zeros(7), torch.zeros(2, 3, 4)]
SIZED = {
    "flux": ["img_in.weight", "txt_in.weight", "double_blocks.0.img_attn.norm.query_norm.scale"],
    "vae": ["encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.down.1.block.0.conv1.weight"],
    "clip": ["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.weight"],
    "t5": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
}
"""Tensors from whose shapes a model's sizes are read."""


@pytest.mark.parametrize("shape", SHAPES, ids=lambda tensor: str([*tensor.shape]))
def test_shapes_of_no_model_are_the_file_s_fault(tmp_path: Path, shape: Tensor) -> None:
    clip, t5 = save_text_encoders(tmp_path)
    cases: dict[str, tuple[State, Callable, dict[str, str]]] = {
        "flux": (flux_transformer().state_dict(), load_transformer, {}),
        "vae": (autoencoder().state_dict(), load_autoencoder, {}),
        "clip": (read_state_dict(clip), lambda path: load_text_encoders(path, t5), {"eos_token_id": "1"}),
        "t5": (read_state_dict(t5), lambda path: load_text_encoders(clip, path), {}),
    }
    path = tmp_path / "x.safetensors"
    for model, (tensors, load, metadata) in cases.items():
        for name in SIZED[model]:
            save_file({**tensors, name: shape}, path, metadata)
            with pytest.raises(ValueError, match="^x.safetensors[: ].*(; |heads must have)"):
                load(path)
