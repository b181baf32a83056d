"""Small text encoders of transformers with random weights, as modules and as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from .models import randomize

WORDS = ["<pad>", "</s>", "<s>", "<unk>", "a", "red", "green", "circle", "square", "of", "on", "blue", "fox"]
TXT_LENGTH, CLIP_LENGTH = 9, 7
T5_WIDTH, CLIP_WIDTH = 24, 64

LLAMA = (
    ("encoder.block.", "enc.blk."),
    (".layer.0.SelfAttention.relative_attention_bias.", ".attn_rel_b."),
    (".layer.0.SelfAttention.", ".attn_"),
    (".layer.0.layer_norm.", ".attn_norm."),
    (".layer.1.layer_norm.", ".ffn_norm."),
    (".layer.1.DenseReluDense.wi_0.", ".ffn_gate."),
    (".layer.1.DenseReluDense.wi_1.", ".ffn_up."),
    (".layer.1.DenseReluDense.wo.", ".ffn_down."),
    ("encoder.final_layer_norm.", "enc.output_norm."),
    ("shared.", "token_embd."),
)
"""transformers' names of T5's parts and llama.cpp's (gguf/tensor_mapping.py)."""


def tokenizer(template: str, words: Sequence[str] = WORDS) -> Tokenizer:
    """A tokenizer with one token per word and the template's special tokens."""
    result = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(mark, words.index(mark)) for mark in template.split() if mark != "$A"]
    result.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return result


def t5_model(seed: int = 2, **sizes: int) -> T5EncoderModel:
    """A T5 v1.1 encoder: gated GELU, several blocks, by default a width that is not heads * head dim."""
    small = {"d_model": T5_WIDTH, "d_kv": 8, "num_heads": 2, "d_ff": 40, "num_layers": 3}
    config = T5Config(vocab_size=len(WORDS), feed_forward_proj="gated-gelu", **{**small, **sizes})
    model = T5EncoderModel(config).eval().requires_grad_(False)
    randomize(model, seed)
    return model


def clip_model(seed: int = 3, **sizes: int) -> CLIPTextModel:
    """CLIP's text model; its end token is word 1 unless `eos_token_id` is given."""
    small = {
        "vocab_size": len(WORDS),
        "hidden_size": CLIP_WIDTH,
        "num_attention_heads": 1,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "max_position_embeddings": CLIP_LENGTH,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    model = CLIPTextModel(CLIPTextConfig(pad_token_id=None, **{**small, **sizes}))
    model.eval().requires_grad_(False)
    randomize(model, seed)
    return model


def t5_state(model: T5EncoderModel) -> dict[str, Tensor]:
    """The tensors of a published file: the embedding is stored once."""
    state = dict(model.state_dict())
    del state["encoder.embed_tokens.weight"]
    return state


def llama_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A T5 encoder's state dict with llama.cpp's names, in the same order."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in LLAMA:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def save_text_encoders(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """Paths of a CLIP and a T5 file as published, with their tokenizers beside them."""
    clip_path, t5_path = folder / "clip.safetensors", folder / "t5.safetensors"
    clip = {f"text_model.{name}": tensor.to(dtype) for name, tensor in clip_model().state_dict().items()}
    clip["text_projection.weight"] = torch.zeros(4, 4, dtype=dtype)
    t5 = {name: tensor.to(dtype) for name, tensor in t5_state(t5_model()).items()}
    save_file(clip, clip_path, {"eos_token_id": json.dumps(1)})
    save_file(t5, t5_path, {"txt_length": str(TXT_LENGTH)})
    tokenizer("<s> $A </s>").save(str(folder / "clip.tokenizer.json"))
    tokenizer("$A </s>").save(str(folder / "t5.tokenizer.json"))
    return clip_path, t5_path
