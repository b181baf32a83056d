"""The valid files that fuzz.py mutates: every format of the three kinds of models, as small as they go."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rectiflux.benchmarks.reference.models import autoencoder, diffusers_state_dict, flux_transformer
from rectiflux.benchmarks.reference.quantized_files import write_gguf, write_quantized_safetensors
from rectiflux.benchmarks.reference.text import llama_names, save_text_encoders, t5_state, tokenizer
from rectiflux.benchmarks.reference.text import t5_model as small_t5
from rectiflux.flux_core.quant.linear import OpaqueWeightLinear
from rectiflux.flux_core.weights import (
    describe,
    load_autoencoder,
    load_text_encoders,
    load_transformer,
)
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Seed:
    """A folder of valid files, those that are mutated, and how they are loaded and used."""

    folder: Path
    mutated: tuple[str, ...]
    load: Callable[[Path], None]


def use(model: nn.Module) -> None:
    """Dequantize every layer, as a run would."""
    for layer in model.modules():
        if isinstance(layer, OpaqueWeightLinear):
            layer.dense_weight(torch.float32)


def transformer_of(name: str) -> Callable[[Path], None]:
    def load(folder: Path) -> None:
        describe(folder / name)
        use(load_transformer(folder / name))

    return load


def vae_of(folder: Path) -> None:
    describe(folder / "ae.safetensors", "vae")
    load_autoencoder(folder / "ae.safetensors")


def text_of(t5: str) -> Callable[[Path], None]:
    def load(folder: Path) -> None:
        encoders = load_text_encoders(folder / "clip.safetensors", folder / t5)
        use(encoders.t5)
        encoders.encode(["a red fox"])

    return load


def write_seeds(root: Path) -> list[Seed]:
    """All seeds below `root`, each in its own folder."""
    state = {n: t.bfloat16() for n, t in flux_transformer(context_in=32, vec_in=64).state_dict().items()}
    seeds = [_transformer(root, "plain", state)]
    seeds.append(_transformer(root, "diffusers", diffusers_state_dict(flux_transformer())))
    for form in ("scale_weight", "comfy_quant", "NF4", "nested NF4", "SCB"):
        folder = _folder(root, form.replace(" ", "-"))
        write_quantized_safetensors(state, folder / "f.safetensors", form)
        seeds.append(Seed(folder, ("f.safetensors",), transformer_of("f.safetensors")))
    for kind in ("Q8_0", "Q5_1"):
        folder = _folder(root, kind)
        write_gguf(state, folder / "f.gguf", kind)
        seeds.append(Seed(folder, ("f.gguf",), transformer_of("f.gguf")))
    folder = _folder(root, "vae")
    save_file(autoencoder().state_dict(), folder / "ae.safetensors")
    seeds.append(Seed(folder, ("ae.safetensors",), vae_of))
    return [*seeds, *_text(root), _shards(root, state)]


def _folder(root: Path, name: str) -> Path:
    (root / name).mkdir(parents=True)
    return root / name


def _transformer(root: Path, name: str, state: dict[str, Tensor]) -> Seed:
    folder = _folder(root, name)
    save_file(
        {n: t.contiguous() for n, t in state.items()}, folder / "f.safetensors", {"modelspec.title": "dev"}
    )
    return Seed(folder, ("f.safetensors",), transformer_of("f.safetensors"))


def _text(root: Path) -> list[Seed]:
    """Text encoders with their tokenizers; T5 as safetensors and as GGUF."""
    plain, packed = _folder(root, "text"), _folder(root, "text-gguf")
    save_text_encoders(plain)
    save_text_encoders(packed)
    model = small_t5(7, d_model=64, d_kv=16, num_heads=4, d_ff=96, num_layers=2)
    write_gguf(llama_names(t5_state(model)), packed / "t5xxl.gguf", "Q8_0", "t5encoder")
    tokenizer("$A </s>").save(str(packed / "t5xxl.tokenizer.json"))
    files = ("clip.safetensors", "t5.safetensors", "clip.tokenizer.json", "t5.tokenizer.json")
    return [
        Seed(plain, files, text_of("t5.safetensors")),
        Seed(plain, files[2:], text_of("t5.safetensors")),
        Seed(packed, ("t5xxl.gguf",), text_of("t5xxl.gguf")),
    ]


def _shards(root: Path, state: dict[str, Tensor]) -> Seed:
    """A folder of two shards with an index and a config.json."""
    folder = _folder(root, "shards") / "flux"
    folder.mkdir()
    names = list(state)
    held = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in held.items():
        save_file({name: state[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in held.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel", "num_layers": 2})
    )
    mutated = ("flux/model.safetensors.index.json", "flux/config.json", "flux/a.safetensors")
    return Seed(root / "shards", mutated, transformer_of("flux"))
