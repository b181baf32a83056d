"""Safetensors headers, folders and quantised tensors that are wrong: one sentence each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.models import autoencoder, diffusers_state_dict, flux_transformer
from rectiflux.benchmarks.reference.quantized_files import write_quantized_safetensors
from rectiflux.flux_core.weights import load_autoencoder, load_transformer, read_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


def hostile(entries: dict, body: int = 0, length: int = 0) -> bytes:
    header = json.dumps(entries).encode().ljust(length)
    return len(header).to_bytes(8, "little") + header + bytes(body)


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            hostile({}, length=(1 << 24) + 8, body=64),
            "^the header of f is 16,777,224 bytes long, no model's is above",
        ),
        (
            hostile({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, 24),
            "^f is damaged: its header does not describe its",
        ),
        (hostile({"a": entry(0, 16, [2**62, 2**62])}, 16), "^f is damaged: its header does not describe its"),
        (hostile({"a": entry(0, 16, [5])}, 16), "^f is damaged: its header does not describe its"),
        (hostile({"a": entry(16, 0, [4])}, 16), "^f is damaged: its header does not describe its"),
        (hostile({"a": entry(0, 16, [4], "X9")}, 16), "^f is damaged: its header does not describe its"),
        (hostile({"a": entry(0, 10**12, [250_000_000_000])}, 16), "^f is cut short: [0-9,]+ of 1,000,000,0"),
    ],
    ids=["16 MB of JSON", "overlap", "absurd shape", "shape", "backwards", "dtype", "outside"],
)
def test_hostile_headers(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "f").write_bytes(data)
    for load in (read_weights, load_transformer, load_autoencoder):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "f")


def folder(tmp_path: Path) -> Path:
    """Two shards of a small transformer, with their index."""
    state = diffusers_state_dict(flux_transformer())
    names = sorted(state)
    files = [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    ]
    index = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        save_file({name: state[name] for name in names if index[name] == file}, tmp_path / file)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    return tmp_path


def test_shards(tmp_path: Path) -> None:
    file = read_weights(folder(tmp_path))
    assert len(file.paths) == 2
    assert file.size == sum(path.stat().st_size for path in file.paths)
    assert file.tensors.keys() == diffusers_state_dict(flux_transformer()).keys()
    assert load_transformer(tmp_path).spec == flux_transformer().spec


INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda f: (f / SHARD).unlink(),
            FileNotFoundError,
            f"^{SHARD}, which {INDEX} lists, does not exist; download the whole folder again$",
        ),
        (
            lambda f: (f / INDEX).write_text("{"),
            ValueError,
            f"^{INDEX} is not an index of shards .*; download it again$",
        ),
        (
            lambda f: (f / INDEX).write_text('{"weight_map": {}}'),
            ValueError,
            r"is not an index of shards \(it lists none\); download it again$",
        ),
        (
            lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../../secret.safetensors"}}'),
            ValueError,
            r"is not an index of shards \(it names '../../secret.safetensors'\); download it again$",
        ),
        (
            lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'),
            ValueError,
            "is not an index of shards",
        ),
        (
            lambda f: [path.unlink() for path in f.iterdir()],
            ValueError,
            "holds no .safetensors file of a transformer; choose a model's file, or its folder as",
        ),
        (
            lambda f: save_file({"x_embedder.bias": torch.zeros(1)}, f / SHARD),
            ValueError,
            f"^{SHARD} holds x_embedder.bias again; remove the file that does not belong there$",
        ),
    ],
    ids=["missing shard", "broken index", "empty index", "escape", "no name", "empty folder", "twice"],
)
def test_folders(tmp_path: Path, damage: Callable, error: type[Exception], message: str) -> None:
    damage(folder(tmp_path))
    with pytest.raises(error, match=message):
        load_transformer(tmp_path)


def test_a_folder_of_another_part_is_named(tmp_path: Path) -> None:
    save_file(autoencoder().state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ValueError, match="is a VAE, not a FLUX.1 transformer; choose a FLUX.1 transformer here"
    ):
        load_transformer(tmp_path)


def test_more_blocks_than_can_be(tmp_path: Path) -> None:
    """Told before any is built."""
    state = dict(flux_transformer().state_dict())
    state |= {f"single_blocks.{i}.x": torch.zeros(1) for i in range(1200)}
    save_file(state, tmp_path / "f.safetensors")
    says = "^f.safetensors: it counts 1,202 blocks, FLUX.1 has 57; download it again$"
    with pytest.raises(ValueError, match=says):
        load_transformer(tmp_path / "f.safetensors")


def test_a_missing_part_of_a_joined_layer(tmp_path: Path) -> None:
    state = diffusers_state_dict(flux_transformer())
    del state["single_transformer_blocks.1.proj_mlp.weight"]
    save_file(state, tmp_path / "f.safetensors")
    says = "lacks single_transformer_blocks.1.proj_mlp.weight; it is incomplete, download it again$"
    with pytest.raises(ValueError, match=says):
        load_transformer(tmp_path / "f.safetensors")


def test_parts_that_do_not_fit_each_other(tmp_path: Path) -> None:
    state = diffusers_state_dict(flux_transformer())
    state["transformer_blocks.0.attn.to_k.weight"] = torch.zeros(64, 3)
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(
        ValueError, match=r"^f.safetensors is damaged: \[64, 64\], \[64, 3\], \[64, 64\] belong in one"
    ):
        load_transformer(tmp_path / "f.safetensors")
    state = diffusers_state_dict(flux_transformer())
    state["norm_out.linear.weight"] = torch.zeros(3, 64)
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(
        ValueError, match="norm_out.linear.weight has 3 rows, which have no halves; download it"
    ):
        load_transformer(tmp_path / "f.safetensors")


def bytes_of(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


STATE = "txt_in.weight.quant_state.bitsandbytes__nf4"
FITS = "is damaged: what describes txt_in.weight .nf4. does not fit it; download it again"


def comfy(value: object) -> State:
    return {"txt_in.comfy_quant": bytes_of(value)}


def state(**about: object) -> State:
    return {STATE: bytes_of(about)}


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (
            "comfy_quant",
            comfy({"format": "nvfp4"}),
            r"is quantised as nvfp4 \(txt_in\), which is not read here; choose a bf16, fp8 or GGUF file",
        ),
        (
            "comfy_quant",
            comfy({"format": "int8_tensorwise", "convrot": True}),
            r"is quantised as int8_tensorwise \(rotated\) \(txt_in\), which is not read",
        ),
        ("comfy_quant", comfy([1]), "is damaged: its txt_in.comfy_quant is no JSON object; download it"),
        ("comfy_quant", comfy({}), "is damaged: the format of txt_in is not told; download it again"),
        (
            "comfy_quant",
            comfy({"format": "int8_tensorwise"}),
            "is damaged: txt_in is torch.uint8, not int8; download it again",
        ),
        (
            "scale_weight",
            {"txt_in.scale_weight": torch.ones(7)},
            r"is damaged: txt_in has 7 scales for \[64, 32\] numbers; download it again",
        ),
        (
            "scale_weight",
            {"txt_in.scale_weight": torch.ones(1, dtype=torch.int32)},
            "is damaged: the scale of txt_in is no number; download it again",
        ),
        ("NF4", {STATE: bytes_of("x")}, f"is damaged: its {STATE} is no JSON object; download it again"),
        ("NF4", state(shape=[64, 32]), FITS),
        ("NF4", state(shape=[64, 33], blocksize=64), FITS),
        ("NF4", state(shape=[64, 32], blocksize=0), FITS),
        ("NF4", state(shape=[-64, -32], blocksize=64), FITS),
        ("NF4", state(shape=[2**61 + 256, 8], blocksize=64), FITS),  # 64 * 32 modulo 2^64
        ("NF4", {"txt_in.weight.absmax": torch.ones(3)}, FITS),
        ("NF4", {"txt_in.weight.quant_map": torch.ones(3)}, FITS),
        ("nested NF4", {"txt_in.weight.nested_quant_map": torch.ones(3)}, FITS),
        ("nested NF4", {"txt_in.weight.nested_absmax": torch.ones(3)}, FITS),
    ],
)
def test_quantised_tensors_that_do_not_fit(tmp_path: Path, form: str, change: State, message: str) -> None:
    write_quantized_safetensors(
        flux_transformer(context_in=32, vec_in=64).state_dict(), tmp_path / "whole", form
    )
    whole = load_file(tmp_path / "whole")
    assert whole.keys() >= change.keys()
    save_file({**whole, **change}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=f"^f.safetensors {message}"):
        load_transformer(tmp_path / "f.safetensors")


@pytest.mark.parametrize("metadata", ["[", "[1]", "{}", '{"layers": [1]}', '{"layers": {"txt_in": 1}}'])
def test_metadata_that_is_broken(tmp_path: Path, metadata: str) -> None:
    save_file(
        flux_transformer().state_dict(), tmp_path / "f.safetensors", {"_quantization_metadata": metadata}
    )
    with pytest.raises(ValueError, match="^f.safetensors is damaged: .*; download it again$"):
        load_transformer(tmp_path / "f.safetensors")
