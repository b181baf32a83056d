"""A checkpoint: parts, shards, files of ComfyUI, description; each file is opened once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from rectiflux.benchmarks.reference.models import autoencoder, diffusers_state_dict, flux_transformer
from rectiflux.benchmarks.reference.quantized_files import (
    wide_transformer,
    write_gguf,
    write_quantized_safetensors,
)
from rectiflux.flux_core.model.spec import FLUX_DEV, FLUX_SCHNELL, FluxSpec
from rectiflux.flux_core.weights import Checkpoint, Part, describe, load_autoencoder, load_transformer
from rectiflux.flux_core.weights import safetensors_file as safetensors_module
from rectiflux.flux_core.weights.describe import variant_of
from safetensors.torch import save_file

from .refusals import refusal

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def folder(tmp_path: Path) -> Path:
    """Two shards of a small transformer, with their index."""
    state = diffusers_state_dict(flux_transformer())
    index = {name: SHARDS[i % 2] for i, name in enumerate(sorted(state))}
    for shard in SHARDS:
        save_file({name: state[name] for name in index if index[name] == shard}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    return tmp_path


def test_shards(tmp_path: Path) -> None:
    file = Checkpoint.open(folder(tmp_path)).part()
    assert [path.name for path in file.paths] == SHARDS
    assert file.size == sum((tmp_path / shard).stat().st_size for shard in SHARDS)
    assert file.tensors.keys() == diffusers_state_dict(flux_transformer()).keys()
    assert load_transformer(tmp_path).spec == flux_transformer().spec


def test_one_open_serves_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, VAE, metadata, sizes and the description of an all-in-one file, and of a folder's shards."""
    opened = []
    original = safetensors.safe_open

    def recording(path: Path, **options: str) -> object:
        opened.append(Path(path).name)
        return original(path, **options)

    monkeypatch.setattr(safetensors_module, "safe_open", recording)
    transformer, vae = flux_transformer(), autoencoder()
    whole = {f"model.diffusion_model.{name}": t.bfloat16() for name, t in transformer.state_dict().items()}
    whole |= {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    save_file(whole, tmp_path / "all.safetensors", {"modelspec.title": "krea"})
    checkpoint = Checkpoint.open(tmp_path / "all.safetensors")
    assert Checkpoint.open(checkpoint) is checkpoint
    assert checkpoint.transformer_spec() == transformer.spec
    assert checkpoint.weights(Part.TRANSFORMER).dtype == torch.bfloat16
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert checkpoint.weights(Part.TRANSFORMER).parameter_count == count
    assert load_transformer(checkpoint, torch.float32).dtype == torch.float32
    assert load_transformer(checkpoint).dtype == torch.bfloat16
    assert load_autoencoder(checkpoint).spec == vae.spec
    assert checkpoint.metadata == {"modelspec.title": "krea"}
    assert checkpoint.describe().startswith("FLUX.1 Krea [dev]")
    assert checkpoint.describe(Part.VAE).startswith("a VAE, fp32")
    assert opened == ["all.safetensors"]
    checkpoint = Checkpoint.open(folder(tmp_path))
    assert load_transformer(checkpoint).spec == transformer.spec
    assert checkpoint.metadata == {} and checkpoint.describe().startswith("FLUX.1 [dev] in small")
    assert opened == ["all.safetensors", *SHARDS]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", ["fp32", "comfy_quant", "GGUF"])
def test_comfyui_s_spelling_of_the_norms(tmp_path: Path, prefix: str, kind: str) -> None:
    """ModelSave and CheckpointSave of ComfyUI 0.33 write query_norm.weight for BFL's query_norm.scale."""
    original = flux_transformer(context_in=32, vec_in=64)
    state = {
        prefix + name.replace("_norm.scale", "_norm.weight"): tensor
        for name, tensor in original.state_dict().items()
    }
    assert f"{prefix}double_blocks.0.img_attn.norm.query_norm.weight" in state
    path = tmp_path / "ComfyUI_00001_.safetensors"
    if kind == "GGUF":
        write_gguf(state, path, "F32")
    elif kind == "fp32":
        save_file(state, path)
    else:
        write_quantized_safetensors(state, path, kind)
    model = load_transformer(path, torch.float32)
    assert model.spec == original.spec and describe(path).startswith("FLUX.1 [dev] in small")
    ours = model.state_dict()
    norms = {name: tensor for name, tensor in original.state_dict().items() if name.endswith("_norm.scale")}
    assert len(norms) == 2 * 4 + 3 * 2
    assert all(torch.equal(ours[name], tensor) for name, tensor in norms.items())


def test_a_norm_in_both_spellings(tmp_path: Path) -> None:
    state = dict(flux_transformer().state_dict())
    state["single_blocks.0.norm.key_norm.weight"] = torch.ones(32)
    save_file(state, tmp_path / "f.safetensors")
    assert "single_blocks.0.norm.key_norm" in refusal(load_transformer, tmp_path / "f.safetensors")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "broken index": (lambda f: (f / INDEX).write_text("{"), INDEX),
    "empty index": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "lists none"),
    "escape": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../../x.safetensors"}}'), "'../../x"),
    "no name": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'), INDEX),
    "empty folder": (lambda f: [path.unlink() for path in f.iterdir()], "of a transformer"),
    "twice": (lambda f: save_file({"x_embedder.bias": torch.zeros(1)}, f / SHARDS[1]), "x_embedder.bias"),
    "other part": (
        lambda f: ((f / INDEX).unlink(), save_file(autoencoder().state_dict(), f / SHARDS[0])),
        "is a VAE, not a FLUX.1 transformer",
    ),
}


@pytest.mark.parametrize(("damage", "problem"), FOLDERS.values(), ids=FOLDERS)
def test_damaged_folders(tmp_path: Path, damage: Callable, problem: str) -> None:
    damage(folder(tmp_path))
    with pytest.raises(ValueError, match="; (download|choose|remove)") as refused:
        load_transformer(tmp_path)
    assert problem in str(refused.value)


def test_a_missing_shard(tmp_path: Path) -> None:
    (folder(tmp_path) / SHARDS[1]).unlink()
    with pytest.raises(FileNotFoundError, match=SHARDS[1]):
        load_transformer(tmp_path)


@pytest.mark.parametrize(
    ("spec", "title", "name"),
    [
        (FLUX_DEV, "", "FLUX.1 [dev]"),
        (FLUX_DEV, "flux1-krea-dev", "FLUX.1 Krea [dev]"),
        (FLUX_DEV, "Flux.1 Kontext dev", "FLUX.1 Kontext [dev]"),
        (FLUX_SCHNELL, "", "FLUX.1 [schnell]"),
        (replace(FLUX_DEV, in_channels=384), "", "FLUX.1 Fill [dev]"),
        (replace(FLUX_DEV, in_channels=128), "", "FLUX.1 Canny or Depth [dev]"),
        (replace(FLUX_DEV, in_channels=128), "FLUX.1 Depth", "FLUX.1 Depth [dev]"),
        (replace(FLUX_DEV, in_channels=96), "", "FLUX.1 [dev] with 96 inputs"),
        (replace(FLUX_SCHNELL, in_channels=96), "", "FLUX.1 without guidance, 96 inputs"),
        (replace(FLUX_DEV, depth=8), "", "FLUX.1 [dev] in small (hidden size 3072, 8 + 38 blocks)"),
    ],
)
def test_variants(spec: FluxSpec, title: str, name: str) -> None:
    assert variant_of(spec, {"modelspec.title": title}) == name
    assert variant_of(spec, {"general.name": title}) == name


@pytest.mark.parametrize(
    ("form", "label"),
    [
        ("fp8 e5m2", "fp8 e5m2"),
        ("scale_weight", "fp8 e4m3fn scaled"),
        ("metadata", "fp8 e4m3fn scaled"),
        ("comfy_quant", "fp8 e4m3fn scaled"),
        ("SCB", "int8 scaled"),
        ("nested NF4", "bitsandbytes NF4"),
        ("GGUF Q4_K", "GGUF Q4_K"),
        ("GGUF F16", "GGUF fp16"),
    ],
)
def test_described_formats(tmp_path: Path, form: str, label: str) -> None:
    state, path = wide_transformer().state_dict(), tmp_path / "f"
    if form.startswith("GGUF"):
        write_gguf(state, path, form.removeprefix("GGUF "), name="Kontext")
        name = "FLUX.1 Kontext [dev]"
    else:
        write_quantized_safetensors(state, path, form)
        name = "FLUX.1 [dev]"
    count = sum(tensor.numel() for tensor in state.values()) / 1e6
    assert describe(path) == (
        f"{name} in small (hidden size 256, 1 + 1 blocks), {label}, "
        f"{path.stat().st_size / 1e6:.1f} MB, {count:.2f} million parameters"
    )


def test_other_models_and_large_sizes_are_described(tmp_path: Path) -> None:
    """Of a sparse file of 1.1 GB only the header is read."""
    save_file({"redux_up.weight": torch.zeros(3)}, tmp_path / "r.safetensors")
    assert describe(tmp_path / "r.safetensors") == (
        "a FLUX.1 Redux adapter, fp32, 0.0 MB, 0.00 million parameters"
    )
    size = 1_100_000_000
    entry = {"dtype": "F8_E4M3", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"conv_first.weight": entry}).encode()
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert describe(path) == "a model of unknown kind, fp8 e4m3fn, 1.10 GB, 1.10 billion parameters"
