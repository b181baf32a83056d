"""The tiny models in other files: quantized, dequantized, all-in-one checkpoints and pipeline folders."""

from __future__ import annotations

import json
from pathlib import Path

from rectiflux.benchmarks.reference.models import diffusers_state_dict
from rectiflux.benchmarks.reference.quantized_files import FORMS, write_gguf, write_quantized_safetensors
from rectiflux.flux_core.weights import load_transformer, read_state_dict
from safetensors.torch import save_file
from torch import Tensor

from .tiny import NAMES, TXT_LENGTH, write_tokenizer

PREFIXES = {
    "diffusion_models": "model.diffusion_model.",
    "clip": "text_encoders.clip_l.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
    "vae": "vae.",
}
"""Prefixes of each part's tensor names in ComfyUI's all-in-one files."""


def quantized_transformer(models: Path, form: str, name: str = NAMES["diffusion_models"]) -> tuple[str, str]:
    """File names of a quantized transformer and of its dequantized weights in float32."""
    folder, stem = models / "diffusion_models", f"tiny-{form.replace(' ', '-')}"
    state = read_state_dict(folder / name)
    if form in FORMS:
        file = f"{stem}.safetensors"
        values = write_quantized_safetensors(state, folder / file, form)
    else:
        file = f"{stem}.gguf"
        values = write_gguf(state, folder / file, form)
    dense = f"{stem}-dense.safetensors"
    save_file({name: tensor.float().contiguous() for name, tensor in values.items()}, folder / dense)
    return file, dense


def tokenizers(folder: Path) -> dict[str, str]:
    """Write the two tokenizers of a pipeline folder; returns the metadata that its text encoders need."""
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    eos = write_tokenizer(folder / "tokenizer" / "tokenizer.json", "<start>", "<|endoftext|>", None)
    write_tokenizer(folder / "tokenizer_2" / "tokenizer.json", None, "</s>", "<pad>")
    return {"txt_length": str(TXT_LENGTH), "eos_token_id": str(eos)}


def parts(models: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts of the four tiny models."""
    folders = {"clip": "text_encoders", "t5": "text_encoders"}
    return {kind: read_state_dict(models / folders.get(kind, kind) / NAMES[kind]) for kind in PREFIXES}


def all_in_one(models: Path) -> str:
    """Write a checkpoint of all four, with tokenizers in folders beside its own; returns its name."""
    folder = models / "checkpoints" / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        PREFIXES[kind] + name: tensor.clone()
        for kind, state in parts(models).items()
        for name, tensor in state.items()
    }
    save_file(tensors, folder / "all.safetensors", tokenizers(folder.parent))
    return "tiny/all.safetensors"


def pipeline(models: Path) -> str:
    """Write a pipeline folder as diffusers does, the transformer in two shards; returns its name."""
    folder = models / "checkpoints" / "tiny-pipeline"
    metadata = tokenizers(folder)
    state = parts(models)
    model = load_transformer(models / "diffusion_models" / NAMES["diffusion_models"])
    names = list(renamed := diffusers_state_dict(model))
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for inner in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        (folder / inner).mkdir(exist_ok=True)
    for file, held in shards.items():
        save_file({name: renamed[name].contiguous() for name in held}, folder / "transformer" / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    for kind, inner in (("clip", "text_encoder"), ("t5", "text_encoder_2"), ("vae", "vae")):
        copied = {name: tensor.clone() for name, tensor in state[kind].items()}
        save_file(copied, folder / inner / "model.safetensors", metadata)
    (folder / "model_index.json").write_text("{}")
    return "tiny-pipeline"
