"""Files in, modules out: safetensors are mapped, recognised by their keys, and become a model's parameters.

  files.py    a safetensors file as a dictionary of mapped tensors; what is wrong with a file, in one sentence
  kinds.py    which model a file holds, told by its keys
  loaders.py  file -> FluxTransformer, AutoEncoder, without a random initialisation in between
  text.py     two files and two tokenizers -> TextEncoders

No numerics live here, and no pickle is ever opened.
"""

from .files import read_state_dict
from .kinds import kind_of
from .loaders import load_autoencoder, load_transformer
from .source import read_metadata, read_weights
from .text import load_text_encoders

__all__ = [
    "kind_of",
    "load_autoencoder",
    "load_text_encoders",
    "load_transformer",
    "read_metadata",
    "read_state_dict",
    "read_weights",
]
