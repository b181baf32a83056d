"""Files in, modules out: a file is told by its content, stays mapped, and becomes a model's parameters.

  source.py       a file or folder of any format as one dictionary of tensors that are still where they were
  files.py        a safetensors file as mapped tensors; what is wrong with a file, in one sentence
  gguf_file.py    a GGUF file through the `gguf` package; gguf_header.py checks it first
  quantised.py    codes, scales and descriptions put together: fp8, int8, NF4
  diffusers.py    diffusers' names -> Black Forest Labs'
  kinds.py        which model a file holds, told by its keys
  loaders.py      file -> FluxTransformer, AutoEncoder; fill.py: without a random initialisation in between
  text.py         two files -> TextEncoders, with what tokenizer.py finds and spiece.py builds
  about.py        a line on what a file is

No numerics live here, and no pickle is ever opened.
"""

from .checkpoint import read_metadata, read_weights
from .describe import describe
from .kinds import kind_of
from .loaders import load_autoencoder, load_transformer
from .safetensors_file import read_state_dict
from .text import load_text_encoders

__all__ = [
    "describe",
    "kind_of",
    "load_autoencoder",
    "load_text_encoders",
    "load_transformer",
    "read_metadata",
    "read_state_dict",
    "read_weights",
]
