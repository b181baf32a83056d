"""Memory layouts of quantized weights that are not supported, recognized in a header and refused by name.

A layout shows in the last parts of its tensors' names, in a dtype, or in the metadata. Sources: the state
dicts that nunchaku, AutoAWQ, GPTQModel, MLX, torchao, optimum-quanto, compressed-tensors, HQQ, SDNQ, Model
Optimizer, flux-fp8-api and ComfyUI write.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quant.formats import QuantizedWeight
from .weight_file import WeightFile

ADVICE = "choose a bf16, fp8, NF4 or GGUF file"
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32)
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")
"""The end of the name of a shard, with the number of all."""

MAX_METADATA = 4096
"""Characters of a metadata value that are searched."""


@dataclass(frozen=True)
class Layout:
    """How a layout is recognized: one layer has all of `beside`, or the value of a metadata key matches.

    `beside` are names after the layer's; with `only_integers`, the layer's weight must be an integer tensor.
    """

    label: str
    beside: tuple[str, ...] = ()
    metadata: tuple[str, str] | None = None
    only_integers: bool = False


LAYOUTS = (
    Layout("SVDQuant for Nunchaku", metadata=("quantization_config", r"svdquant|svdq")),
    Layout("SVDQuant for Nunchaku", metadata=("model_class", r"^Nunchaku")),
    Layout("SVDQuant for Nunchaku", ("qweight", "wscales")),
    Layout("SVDQuant for Nunchaku", ("qweight", "smooth_factor")),
    Layout("SVDQuant for Nunchaku", ("qweight", "smooth")),
    Layout("AWQ for Nunchaku", ("qweight", "scaled_zeros")),
    Layout("GPTQ", ("qweight", "g_idx")),
    Layout("AWQ or GPTQ", ("qweight", "scales")),
    Layout("AWQ or GPTQ", ("qweight",)),
    Layout("MLX", ("scales", "biases"), only_integers=True),
    Layout("MLX (mflux)", metadata=("mflux_version", r".")),
    Layout("torchao", ("weight_qdata",)),
    Layout("torchao", ("_weight_qdata",)),
    Layout("torchao", ("weight:_data",)),
    Layout("torchao", metadata=("tensor_subclass_names|tensor_names", r"weight")),
    Layout("optimum-quanto", ("weight._data", "weight._scale")),
    Layout("optimum-quanto", ("weight._data",)),
    Layout("optimum-quanto", ("weight_qtype",)),
    Layout("HQQ", ("W_q",)),
    Layout("SDNQ", ("svd_up", "svd_down")),
    Layout("SDNQ", ("weight", "scale", "zero_point")),
    Layout("SDNQ", ("weight", "scale"), only_integers=True),
    Layout("NVFP4", ("weight_scale_2",)),
    Layout("Model Optimizer", ("weight_quantizer._scale",)),
    Layout("Model Optimizer", ("weight_quantizer._amax",)),
    Layout("compressed-tensors", ("weight_packed",)),
    Layout("flux-fp8-api", ("float8_data",)),
    Layout("fp8 in blocks (DeepSeek's)", ("weight_scale_inv",)),
    Layout("AQLM", ("codebooks", "codes")),
    Layout("EETQ", ("weight_scales",)),
)
"""The first that matches is named; those with more names come before those with fewer."""

LAST_PARTS = tuple(sorted({part for layout in LAYOUTS for part in layout.beside}, key=len, reverse=True))


def check_layout(file: WeightFile) -> None:
    """Raise ValueError, one sentence, for one shard of a model and for a layout that is not supported."""
    shard = SHARD.search(file.paths[0].name)
    if file.folder is None and shard is not None and int(shard[1]) > 1:
        raise ValueError(
            f"{file.name} is one of {int(shard[1])} shards of a model; put all of them with their "
            ".safetensors.index.json into one folder and choose that folder, or choose a model in one file"
        )
    layout = unsupported_layout(file)
    if layout is not None:
        raise ValueError(f"{file.name} is quantized with {layout.label}, which is not supported; {ADVICE}")


def unsupported_layout(file: WeightFile) -> Layout | None:
    """The layout of the file's weights if it is one of LAYOUTS. Names, dtypes and metadata are read."""
    layers = _layers(file)
    for layout in LAYOUTS:
        if layout.metadata is not None:
            if _in_metadata(file, *layout.metadata):
                return layout
        elif any(
            parts.issuperset(layout.beside) and (not layout.only_integers or _is_integer(file, layer))
            for layer, parts in layers.items()
        ):
            return layout
    return None


def _layers(file: WeightFile) -> dict[str, set[str]]:
    """The last parts of the names of each layer, as far as any layout has them."""
    layers: dict[str, set[str]] = defaultdict(set)
    for name in file.tensors:
        part = next((part for part in LAST_PARTS if name.endswith(f".{part}")), None)
        if part is not None:
            layers[name.removesuffix(f".{part}")].add(part)
    return layers


def _in_metadata(file: WeightFile, key: str, pattern: str) -> bool:
    values = [value for name, value in file.metadata.items() if re.fullmatch(key, name)]
    return any(re.search(pattern, value[:MAX_METADATA], re.IGNORECASE) for value in values)


def _is_integer(file: WeightFile, layer: str) -> bool:
    weight = file.tensors.get(f"{layer}.weight")
    if isinstance(weight, QuantizedWeight):
        return False
    return isinstance(weight, Tensor) and weight.dtype in INTEGERS
