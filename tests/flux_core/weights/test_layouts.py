"""Layouts of quantized weights that are not supported: recognized in transformers, T5 and VAE, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.models import autoencoder, flux_transformer
from rectiflux.benchmarks.reference.quantized_files import FORMS, write_quantized_safetensors
from rectiflux.benchmarks.reference.text import save_text_encoders, t5_state
from rectiflux.flux_core.weights import (
    Checkpoint,
    Part,
    describe,
    load_autoencoder,
    load_text_encoders,
    load_transformer,
)
from rectiflux.flux_core.weights.layouts import unsupported_layout
from safetensors.torch import load_file, save_file
from torch import Tensor

from .refusals import refusal
from .test_text import model

LAYER = {
    "transformer": "transformer_blocks.0.attn.to_q",
    "t5": "encoder.block.0.layer.0.SelfAttention.q",
    "vae": "decoder.mid.attn_1.q",
}
"""A layer of each part, whose tensors are replaced by those of a layout."""


def tensors(*parts: str, dtype: torch.dtype = torch.int32) -> dict[str, Tensor]:
    return {
        part: torch.zeros(4, 4, dtype=dtype if i == 0 else torch.bfloat16) for i, part in enumerate(parts)
    }


KNOWN: dict[str, tuple[dict[str, Tensor], dict[str, str] | None, str]] = {
    "svdquant": (tensors("qweight", "wscales", "smooth_factor", "proj_down"), None, "Nunchaku"),
    "older svdquant": (tensors("qweight", "smooth", "lora_down"), None, "SVDQuant"),
    "svdquant in metadata": ({}, {"quantization_config": '{"method": "svdquant"}'}, "SVDQuant"),
    "nunchaku's class": ({}, {"model_class": "NunchakuFluxTransformer2dModelV2"}, "Nunchaku"),
    "nunchaku's awq": (tensors("qweight", "scales", "scaled_zeros", dtype=torch.int16), None, "AWQ"),
    "awq": (tensors("qweight", "qzeros", "scales"), None, "AWQ"),
    "gptq": (tensors("qweight", "qzeros", "scales", "g_idx"), None, "GPTQ"),
    "mlx": (tensors("weight", "scales", "biases", dtype=torch.uint32), None, "MLX"),
    "mflux": ({}, {"mflux_version": "0.9.0"}, "MLX"),
    "torchao": (tensors("_weight_qdata", "_weight_scale"), None, "torchao"),
    "quanto": (tensors("weight._data", "weight._scale", dtype=torch.int8), None, "optimum-quanto"),
    "hqq": (tensors("W_q", "scale", "zero"), None, "HQQ"),
    "sdnq": (tensors("weight", "scale", "zero_point", dtype=torch.uint8), None, "SDNQ"),
    "sdnq with SVD": (tensors("weight", "scale", "svd_up", "svd_down", dtype=torch.uint8), None, "SDNQ"),
    "nvfp4": (tensors("weight", "weight_scale", "weight_scale_2", dtype=torch.uint8), None, "NVFP4"),
    "fp8 in blocks": (tensors("weight", "weight_scale_inv"), None, "in blocks"),
    "compressed-tensors": (tensors("weight_packed", "weight_scale"), None, "compressed-tensors"),
    "flux-fp8-api": (tensors("float8_data", "scale", dtype=torch.float8_e4m3fn), None, "flux-fp8-api"),
}


@pytest.mark.parametrize("part", LAYER)
@pytest.mark.parametrize("name", KNOWN)
def test_it_is_named_for_every_part(tmp_path: Path, name: str, part: str) -> None:
    """Not as another model or as damaged: these files are whole. In a pipeline, the folder is named too."""
    layer, metadata, label = KNOWN[name]
    state = {f"{LAYER[part]}.{key}": tensor for key, tensor in layer.items()}
    state |= {
        "single_transformer_blocks.0.norm.linear.weight": torch.zeros(2, 2),
        "shared.weight": torch.zeros(2),
    }
    folder = tmp_path / "flux" / {"transformer": "transformer", "t5": "text_encoder_2", "vae": "vae"}[part]
    folder.mkdir(parents=True)
    path = folder / "model.safetensors"
    save_file(state, path, metadata)
    clip, _ = save_text_encoders(tmp_path)
    load = {
        "transformer": load_transformer,
        "t5": lambda path: load_text_encoders(clip, path),
        "vae": load_autoencoder,
    }[part]
    message = refusal(load, path)
    assert label in message and "choose a bf16, fp8, NF4 or GGUF file" in message
    assert not any(word in message for word in ("download", "damaged", "not a ", "incomplete"))
    assert refusal(lambda path: describe(path, part), path) == message
    assert f"flux/{folder.name}/model.safetensors" in refusal(lambda _: load(tmp_path / "flux"), path)


@pytest.mark.parametrize("form", FORMS)
def test_supported_layouts_are_not_refused(tmp_path: Path, form: str) -> None:
    for state in (flux_transformer(context_in=32, vec_in=64).state_dict(), t5_state(model())):
        write_quantized_safetensors(state, tmp_path / "f.safetensors", form)
        assert unsupported_layout(Checkpoint.open(tmp_path / "f.safetensors").part()) is None


def test_only_the_part_that_is_loaded_counts(tmp_path: Path) -> None:
    """An all-in-one file whose transformer is for Nunchaku gives its VAE."""
    vae = autoencoder().state_dict()
    whole = {f"vae.{name}": tensor for name, tensor in vae.items()}
    layer, _, _ = KNOWN["svdquant"]
    whole |= {f"model.diffusion_model.double_blocks.0.img_attn.qkv.{n}": t for n, t in layer.items()}
    save_file(whole, tmp_path / "all.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "all.safetensors")
    assert load_autoencoder(checkpoint).state_dict().keys() == vae.keys()
    assert "SVDQuant" in refusal(load_transformer, tmp_path / "all.safetensors")
    assert checkpoint.weights(Part.VAE).tensors.keys() == vae.keys()


def test_one_shard_of_a_model(tmp_path: Path) -> None:
    shard = tmp_path / "diffusion_pytorch_model-00001-of-00003.safetensors"
    save_file(flux_transformer().state_dict(), shard)
    assert "one of 3 shards" in refusal(load_transformer, shard)
    whole = tmp_path / "model-00001-of-00001.safetensors"
    save_file(load_file(shard), whole)
    load_transformer(whole)
