"""LoRAs: any convention in, a model with them attached out, and a word on every key that came to nothing.

  keys.py        a key -> the layer as the file names it, and what the tensor is
  names.py       that name -> a module of FLUX.1, and which of its rows
  roles.py       one layer's tensors -> its adapter
  file.py        a file -> LoraFile
  foreign.py     what a file is that is not for FLUX.1
  adapters.py    the kinds of adapters: the change that each makes (rotation.py: OFT and BOFT)
  terms.py       the few kinds of arithmetic that it takes; arithmetic.py gathers them for a layer
  linear.py      a linear layer with adapters, whatever form its weight is stored in
  blocks.py      strengths of single blocks, as text
  fit.py         whether a change fits a module
  attach.py      a model and LoRAs -> a copy that shares the model's numbers
  report.py      what became of the keys
  canonical.py   an adapter's tensors for a host that merges by itself

    lora = read_lora("style.safetensors", model.spec)
    styled, report = with_lora(model, [LoraUse(lora, 0.8)])

`model` is as it was, and stays so; `styled` is forgotten when it is no longer needed.
"""

from .attach import LoraUse, with_lora, with_text_lora
from .blocks import parse_blocks
from .canonical import canonical_tensors
from .file import LoraFile, read_lora
from .fit import why_not
from .linear import AdaptedLinear, dense_weight
from .report import Report

__all__ = [
    "AdaptedLinear",
    "LoraFile",
    "LoraUse",
    "Report",
    "canonical_tensors",
    "dense_weight",
    "parse_blocks",
    "read_lora",
    "why_not",
    "with_lora",
    "with_text_lora",
]
