"""Checkpoint files as people have them, in genuine ComfyUI: loaded, or refused in one sentence."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rectiflux.benchmarks.reference.quantized_files import write_gguf
from rectiflux.benchmarks.reference.text import llama_names, tokenizer
from rectiflux.flux_core.weights import read_state_dict
from safetensors.torch import save_file

from ..nodes import graphs
from ..nodes.tiny import NAMES, SPEC, TXT_WIDTH, WORDS, write_tokenizer, write_transformer
from .pictures import our_graph, picture
from .server import ComfyServer, PromptFailed

LAYER = torch.zeros(4, 4, dtype=torch.int8)


def with_file(files: graphs.Prompt, node: str, **inputs: str) -> graphs.Prompt:
    prompt = copy.deepcopy(our_graph(files, steps=2))
    prompt[node]["inputs"] |= inputs
    return prompt


def refusal_of(comfy: ComfyServer, prompt: graphs.Prompt) -> str:
    with pytest.raises(PromptFailed) as refused:
        picture(comfy, prompt)
    details: dict[str, Any] = refused.value.details
    assert "exception_message" in details, details
    return details["exception_message"]


def test_layouts_of_other_programs_are_named(comfy: ComfyServer, base: Path, files: graphs.Prompt) -> None:
    models = base / "models"
    svdq = {
        "transformer_blocks.0.qkv_proj.qweight": LAYER,
        "transformer_blocks.0.qkv_proj.wscales": LAYER.half(),
    }
    folder = models / "diffusion_models" / "svdq-folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    for path in (folder.with_name("svdq.safetensors"), folder / "transformer_blocks.safetensors"):
        save_file(svdq, path)
    query = "encoder.block.0.layer.0.SelfAttention.q"
    awq = {f"{query}.qweight": LAYER, f"{query}.scaled_zeros": LAYER.half()}
    save_file(awq, models / "text_encoders" / "awq.safetensors")
    for node, inputs, label in (
        ("model", {"model_name": "svdq.safetensors"}, "SVDQuant"),
        ("model", {"model_name": "svdq-folder"}, "SVDQuant"),
        ("clip", {"t5_name": "awq.safetensors"}, "AWQ"),
    ):
        message = refusal_of(comfy, with_file(files, node, **inputs))
        assert label in message and "choose a bf16" in message and "download" not in message
        assert all(name in message for name in inputs.values())
    picture(comfy, our_graph(files, steps=2))


def test_the_decoder_of_a_t5_in_gguf_is_ignored(comfy: ComfyServer, base: Path, files: graphs.Prompt) -> None:
    """What belongs to neither half is refused."""
    texts = base / "models" / "text_encoders"
    encoder = llama_names(read_state_dict(texts / NAMES["t5"]))
    decoder = {"dec.blk.0.attn_q.weight": torch.zeros(32, 32), "output.weight": torch.zeros(32, TXT_WIDTH)}
    neither = {"pooler.weight": torch.zeros(32, 32)}
    for name, more in (("enc.gguf", {}), ("whole.gguf", decoder), ("other.gguf", neither)):
        tensors = encoder | more
        write_gguf(tensors, texts / name, "Q8_0", "t5")
        write_tokenizer((texts / name).with_suffix(".tokenizer.json"), None, "</s>", "<pad>")
    images = [picture(comfy, with_file(files, "clip", t5_name=name)) for name in ("enc.gguf", "whole.gguf")]
    assert np.array_equal(*images)
    assert "pooler.weight" in refusal_of(comfy, with_file(files, "clip", t5_name="other.gguf"))


def test_a_larger_vocabulary_of_t5_needs_its_tokenizer(
    comfy: ComfyServer, base: Path, files: graphs.Prompt
) -> None:
    """Two words whose rows lie beyond those of T5 v1.1 give different images."""
    texts, rows = base / "models" / "text_encoders", 69328
    state = read_state_dict(texts / NAMES["t5"])
    generator = torch.Generator().manual_seed(3)
    embedding = 0.3 * torch.randn(rows, TXT_WIDTH, generator=generator)
    save_file({**state, "shared.weight": embedding}, texts / "large.safetensors")
    prompt = with_file(files, "clip", t5_name="large.safetensors")
    tokens = texts / "large.tokenizer.json"
    message = refusal_of(comfy, prompt)
    assert tokens.name in message and "69,328" in message
    write_tokenizer(tokens, None, "</s>", "<pad>")
    message = refusal_of(comfy, prompt)
    assert tokens.name in message and "69,328" in message and f" {len(WORDS) + 3} tokens" in message
    words = ["<pad>", "</s>", "<unk>"]
    words += [f"word{i}" for i in range(len(words), rows)]
    tokenizer("$A </s>", words).save(str(tokens))
    images = []
    for word in ("word60000", "word60001"):
        prompt["positive"]["inputs"]["prompt"] = word
        images.append(picture(comfy, prompt))
    assert not np.array_equal(*images)


def test_a_file_that_is_cut_short_or_holds_nan(comfy: ComfyServer, base: Path, files: graphs.Prompt) -> None:
    """Changed between two prompts; the whole file runs again afterwards, with the same pixels."""
    path = base / "models" / "diffusion_models" / "changing.safetensors"
    write_transformer(path, SPEC)
    prompt = with_file(files, "model", model_name=path.name)
    first = picture(comfy, prompt)
    os.truncate(path, path.stat().st_size // 2)
    prompt["noise"]["inputs"]["seed"] += 1
    assert "changing.safetensors is cut short" in refusal_of(comfy, prompt)
    path.unlink()
    write_transformer(path, SPEC)
    prompt["noise"]["inputs"]["seed"] -= 1
    assert np.array_equal(picture(comfy, prompt), first)
    state = {name: tensor.clone() for name, tensor in read_state_dict(path).items()}
    state["single_blocks.0.linear1.weight"][0] = float("nan")
    path.unlink()
    save_file(state, path)
    message = refusal_of(comfy, prompt)
    assert "single_blocks.0.linear1.weight of changing.safetensors" in message
