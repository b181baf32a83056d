"""LoRA files in any convention in, a model with adapters out, and a report on every key that was not used.

  conventions.py  how trainers write keys, as tables; a key -> a module, which of its rows, a tensor's role
  adapter.py      what all adapters have in common; the kinds: additive.py (LoRA, LoHa, LoKr, full
                  differences), dora.py, rotation.py (OFT, BOFT)
  entry.py        one layer's tensors -> its adapter; whether it fits a module
  file.py         a file -> LoraFile; foreign.py: which other model a file is for
  metadata.py     alpha in a file's metadata
  linear.py       a linear layer with adapters, whatever format its weight has
  attach.py       a model and LoRAs -> a copy that shares the model's parameters
  blocks.py       strengths of single blocks, as text
  report.py       which keys were used

    lora = read_lora("style.safetensors", model.spec)
    styled, report = with_lora(model, [LoraUse(lora, 0.8)])

`model` stays as it was; discard `styled` when it is no longer needed.
"""

from .additive import FullDifference, LoHa, LoKr, LoRA
from .attach import LoraUse, with_lora, with_text_lora
from .blocks import parse_blocks
from .dora import DoRA
from .entry import Entry, incompatibility
from .file import LoraFile, read_lora
from .linear import AdaptedLinear, LoRAStack, Part, dense_weight
from .report import Report
from .rotation import OFT

__all__ = [
    "OFT",
    "AdaptedLinear",
    "DoRA",
    "Entry",
    "FullDifference",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAStack",
    "LoraFile",
    "LoraUse",
    "Part",
    "Report",
    "dense_weight",
    "incompatibility",
    "parse_blocks",
    "read_lora",
    "with_lora",
    "with_text_lora",
]
