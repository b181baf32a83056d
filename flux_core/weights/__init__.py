"""Checkpoint files in, modules out. The format is detected from a file's contents, not its name.

  checkpoint.py        Checkpoint: a file or folder, opened once, with its parts, metadata and description
  weight_file.py       one file of any format as mapped tensors; folders.py: shards in a folder
  safetensors_file.py  safetensors, and what is wrong with any other file
  gguf_file.py         GGUF through the `gguf` package; gguf_header.py validates it first
  assemble.py          quantized weights from values, scales and descriptions: fp8, int8, NF4
  diffusers.py         other names -> Black Forest Labs'; llama_cpp.py: llama.cpp's T5 -> transformers'
  kinds.py             ModelKind: which model a file holds
  loaders.py           file -> FluxTransformer, AutoEncoder; assign.py: without a random initialization
  text.py              two files -> TextEncoders; tokenizer.py finds tokenizers, sentencepiece.py builds them
  layouts.py           weight layouts that are not supported, by name
  finite.py            NaN and inf in weights; source_files.py: files that changed after they were loaded
  describe.py          one line on a file
  file_names.py        endings, names that are listed or refused; messages.py: values in messages

Weights stay in the mapped file as long as possible, and no pickle is ever opened.
"""

from .checkpoint import Checkpoint, Source, describe, read_metadata, read_weights
from .finite import not_finite_weight
from .kinds import ModelKind, kind_of
from .loaders import load_autoencoder, load_transformer
from .safetensors_file import read_state_dict
from .source_files import check_unchanged
from .text import load_text_encoders
from .weight_file import Part

__all__ = [
    "Checkpoint",
    "ModelKind",
    "Part",
    "Source",
    "check_unchanged",
    "describe",
    "kind_of",
    "load_autoencoder",
    "load_text_encoders",
    "load_transformer",
    "not_finite_weight",
    "read_metadata",
    "read_state_dict",
    "read_weights",
]
