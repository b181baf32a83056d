"""Files -> the MODEL, CLIP and VAE of the embedded editor, on a device, as far as they fit there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..flux_core.backends.cpu_pack import pack_weights
from ..flux_core.backends.onednn import can_pack
from ..flux_core.backends.quantize import check_int8, fp8_bytes, quantize_to_fp8, quantize_to_int8
from ..flux_core.memory import fits, limit_of, stream
from ..flux_core.model.autoencoder import AutoEncoder
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.sampling import preview
from ..flux_core.sampling.step_cache import Caching
from ..flux_core.weights import Checkpoint, Source, load_autoencoder, load_transformer
from ..flux_core.weights import load_text_encoders as load_core_text_encoders
from ..host import context
from .host import WEIGHT_DTYPES
from .run_report import in_percent


@dataclass(frozen=True)
class EmbeddedModel:
    """A MODEL of the embedded editor: the network, how to preview its latents, and its step cache."""

    network: FluxTransformer
    preview: preview.Factors | None = None
    caching: Caching | None = None


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def progress() -> Callable[[int, int], None]:
    """A callback for (done, total) that shows percents at the running node; raises when interrupted."""
    return in_percent(context.progress)


def load_model(source: Source, weight_dtype: str, memory_limit: str, device: torch.device) -> EmbeddedModel:
    """A MODEL from a FLUX.1 transformer's file, with at most `memory_limit` of its weights on the device.

    On a CPU, the weights of a model that fits are packed (flux_core/backends/cpu_pack.py).
    """
    checkpoint = Checkpoint.open(source)
    if weight_dtype == "int8":
        network = _load_int8(checkpoint, device, memory_limit)
    elif weight_dtype == "fp8":
        network = _load_fp8(checkpoint, device, memory_limit)
    else:
        dtype = WEIGHT_DTYPES[weight_dtype]
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        network = load_transformer(checkpoint, dtype, device, progress(), limit_of(memory_limit, device))
    if device.type == "cpu" and fits(network, device):  # otherwise its weights stay mapped from the file
        pack_weights(network, progress())
    return EmbeddedModel(network, preview.from_metadata(checkpoint.metadata))


def _load_int8(checkpoint: Checkpoint, device: torch.device, memory_limit: str) -> FluxTransformer:
    """A network quantized to int8. Raises ValueError where it cannot run or does not fit."""
    check_int8(device)
    dtype = torch.bfloat16 if can_pack(device, torch.bfloat16) else torch.float32
    network = load_transformer(checkpoint, dtype, device, progress())
    quantize_to_int8(network, limit_of(memory_limit, device), progress())
    return network


def _load_fp8(checkpoint: Checkpoint, device: torch.device, memory_limit: str) -> FluxTransformer:
    """A network quantized to fp8; on a GPU it is streamed if it does not fit."""
    limit, on_cpu = limit_of(memory_limit, device), device.type == "cpu"
    dtype = torch.float32 if on_cpu and not can_pack(device, torch.bfloat16) else torch.bfloat16
    network = load_transformer(checkpoint, dtype, on_progress=progress())
    is_resident = limit is None or fp8_bytes(network) <= limit
    quantize_to_fp8(network, device if is_resident else None, limit if on_cpu else None, progress())
    return network if on_cpu else stream(network, device, limit)


def load_text_encoders(clip: Source, t5: Source, device: torch.device) -> TextEncoders:
    """A CLIP from the files of both text encoders; what does not fit on the device runs on the CPU.

    A CPU without bf16 matmuls gets float32: a file's float16 takes three times as long there. Quantized
    layers stay quantized, so that no copy of all weights is made.
    """
    load = partial(load_core_text_encoders, Checkpoint.open(clip), Checkpoint.open(t5))
    cpu_dtype = None if can_pack(torch.device("cpu"), torch.bfloat16) else torch.float32
    if device.type == "cpu":
        return load(cpu_dtype, on_progress=progress())
    encoders, cpu_encoders = load(on_progress=progress()), None
    for name in ("t5", "clip"):
        if fits(getattr(encoders, name), device):
            getattr(encoders, name).to(device)
        elif cpu_dtype is not None:
            cpu_encoders = cpu_encoders or load(cpu_dtype)
            setattr(encoders, name, getattr(cpu_encoders, name))
    return encoders


def load_vae(source: Source, device: torch.device) -> AutoEncoder:
    """A VAE from an autoencoder's file, in float32 on a CPU."""
    dtype = torch.float32 if device.type == "cpu" else None
    return load_autoencoder(source, dtype, device, progress())
