"""Small text encoders of transformers with random weights, as files and as modules."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from .models import randomise

WORDS = ["<pad>", "</s>", "<s>", "<unk>", "a", "red", "green", "circle", "square", "of", "on", "blue", "fox"]
TXT_LENGTH, CLIP_LENGTH = 9, 7
T5_WIDTH, CLIP_WIDTH = 24, 64


def tokenizer(template: str) -> Tokenizer:
    """One token a word, with the marks of the template."""
    result = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(mark, WORDS.index(mark)) for mark in ("</s>", "<s>") if mark in template]
    result.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return result


def t5_model(seed: int = 2) -> T5EncoderModel:
    """A T5 v1.1 encoder: gated GELU, more than one block, heads that do not divide the width."""
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=T5_WIDTH,
        d_kv=8,
        num_heads=2,
        d_ff=40,
        num_layers=3,
        feed_forward_proj="gated-gelu",
    )
    model = T5EncoderModel(config).eval().requires_grad_(False)
    randomise(model, seed)
    return model


def clip_model(seed: int = 3) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=CLIP_WIDTH,
        num_attention_heads=1,
        num_hidden_layers=2,
        intermediate_size=48,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=None,
    )
    model = CLIPTextModel(config).eval().requires_grad_(False)
    randomise(model, seed)
    return model


def save_text_encoders(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """Paths of a CLIP and a T5 file as they are published, with their tokenizers beside them."""
    clip_path, t5_path = folder / "clip.safetensors", folder / "t5.safetensors"
    clip = {f"text_model.{name}": tensor.to(dtype) for name, tensor in clip_model().state_dict().items()}
    clip["text_projection.weight"] = torch.zeros(4, 4, dtype=dtype)
    t5 = {name: tensor.to(dtype) for name, tensor in t5_model().state_dict().items()}
    del t5["encoder.embed_tokens.weight"]
    save_file(clip, clip_path, {"eos_token_id": json.dumps(1)})
    save_file(t5, t5_path, {"txt_length": str(TXT_LENGTH)})
    tokenizer("<s> $A </s>").save(str(folder / "clip.tokenizer.json"))
    tokenizer("$A </s>").save(str(folder / "t5.tokenizer.json"))
    return clip_path, t5_path
