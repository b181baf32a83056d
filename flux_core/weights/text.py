"""FLUX.1's two text encoders from two files or folders, and their tokenizers from wherever they are.

Read are T5 v1.1 encoders in safetensors (plain, fp8, fp8 scaled) and GGUF, CLIP-L, the folders of diffusers
and transformers, and all-in-one checkpoints. What shapes cannot tell is read from the metadata: T5's
`txt_length`, the tokens that a text is padded to (512 unless given), and CLIP's `eos_token_id` (its last word
unless given).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..model.text_encoders import T5_LENGTH, TextEncoders, clip_from_shapes, t5_from_shapes
from .assemble import assemble
from .checkpoint import CLIP_PART, T5_PART, Weight, WeightFile, read_weights
from .fill import fill
from .kinds import CLIP, T5, T5_GGUF, expect, kind_of
from .loaders import sizes_of
from .tokenizer import CLIP_ENCODER, EMBEDDED, T5_ENCODER, find_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
UNUSED = re.compile(
    r"(text_model\.)?embeddings\.position_ids|text_projection(\.weight)?|logit_scale|vision_model\..*|visual_projection\..*"
)
"""What CLIP files hold that FLUX.1 does not use."""

LLAMA_OUTER = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}
LLAMA_BLOCK = re.compile(r"enc\.blk\.(\d+)\.(.+)\.weight")
LLAMA_PARTS = {
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "attn_norm": "0.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
    "ffn_norm": "1.layer_norm",
}
"""llama.cpp's names of T5's parts (gguf/tensor_mapping.py)."""


def load_text_encoders(
    clip_path: str | Path,
    t5_path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tokenizer_folders: Sequence[str | Path] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> TextEncoders:
    """CLIP and T5 with their tokenizers; dtypes as `load_transformer` chooses them.

    A tokenizer that is not beside its encoder is looked for in the host's `tokenizer_folders`, in the local
    cache of Hugging Face and in GGUF metadata. `on_progress` hears T5's bytes, done and in all. Raises what
    `load_transformer` raises, FileNotFoundError for a tokenizer that is nowhere, and ValueError for one that
    cannot be read and for metadata that is no number.
    """
    t5_file, clip_file = read_weights(t5_path, T5_PART), read_weights(clip_path, CLIP_PART)
    t5 = _load_t5(t5_file, dtype, device, on_progress)
    clip = _load_clip(clip_file, dtype, device)
    t5_tokenizer = find_tokenizer(t5_file, T5_ENCODER, t5.config.vocab_size, tokenizer_folders)
    clip_tokenizer = find_tokenizer(clip_file, CLIP_ENCODER, clip.config.vocab_size, tokenizer_folders)
    return TextEncoders(t5, t5_tokenizer, clip, clip_tokenizer, _number(t5_file, "txt_length") or T5_LENGTH)


def _load_t5(
    file: WeightFile,
    dtype: torch.dtype | None,
    device: torch.device | str,
    on_progress: Callable[[int, int], None] | None,
) -> T5EncoderModel:
    """The encoder of a T5 file. A file has the embedding under one name or two."""
    tensors = assemble(file)
    tensors.pop(EMBEDDED, None)
    if kind_of(tensors) == T5_GGUF.name:
        tensors = llama_names(tensors)
    expect(tensors, T5, file.name)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
    for name, other in (EMBEDDINGS, EMBEDDINGS[::-1]):
        if other in tensors:
            tensors.setdefault(name, tensors[other])
    with sizes_of(file.name, T5, tensors):
        model = t5_from_shapes(tensors)
    model = fill(model, tensors, file.name, dtype, device, on_progress)
    model.tie_weights()
    return model


def llama_names(tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """A T5 encoder's weights under transformers' names instead of llama.cpp's; unknown ones keep theirs."""
    result: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        block = LLAMA_BLOCK.fullmatch(name)
        if block is not None and block[2] in LLAMA_PARTS:
            name = f"encoder.block.{block[1]}.layer.{LLAMA_PARTS[block[2]]}.weight"
        result[LLAMA_OUTER.get(name, name)] = tensor
    return result


def _load_clip(file: WeightFile, dtype: torch.dtype | None, device: torch.device | str) -> CLIPTextModel:
    """The text half of a CLIP file, without the projection, which FLUX.1 does not use."""
    tensors = assemble(file)
    expect(tensors, CLIP, file.name)
    tensors = {n.removeprefix("text_model."): t for n, t in tensors.items() if not UNUSED.fullmatch(n)}
    eos_token_id = _number(file, "eos_token_id")
    with sizes_of(file.name, CLIP, tensors):
        model = clip_from_shapes(tensors, eos_token_id)
    if hasattr(model, "text_model"):  # transformers before 5
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    return fill(model, tensors, file.name, dtype, device)


def _number(file: WeightFile, key: str) -> int | None:
    """A positive whole number from the file's metadata, or None where it is not given."""
    value = file.metadata.get(key)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{key} in the metadata of {file.name} must be a number above 0, got {value!r}")
    return int(value)
