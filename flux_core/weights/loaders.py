"""Loads a FLUX.1 transformer or autoencoder from a file or folder, without a random initialization.

A module is built on the meta device, where parameters have shapes and no memory, and then gets the file's
mapped tensors themselves (assign.py). No value is held twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..memory import stream
from ..model.autoencoder import AutoEncoder, AutoEncoderSpec, channels_last
from ..model.transformer import FluxTransformer
from .assign import assign_weights
from .checkpoint import Checkpoint, Source
from .kinds import ModelKind, expect
from .shape_errors import blame_file
from .source_files import remember_files
from .weight_file import Part

LATENT_CHANNELS = 16


def load_transformer(
    source: Source,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
    limit: int | None = None,
) -> FluxTransformer:
    """FLUX.1 transformer from a file or folder; the format is detected from the contents, not the name.

    Reads BFL's, diffusers' and ComfyUI's names, alone or in an all-in-one checkpoint, safetensors or GGUF,
    shards in a folder. Quantized weights stay quantized, in `QuantizedLinear` layers.

    Args:
        source: a path, or an open Checkpoint.
        dtype: to compute in; by default the file's own (`choose_dtype`).
        device: where the weights are put.
        on_progress: called with the bytes loaded so far and the total.
        limit: bytes of weights that may stay on the device; a larger model is streamed (flux_core.memory).

    Raises what `Checkpoint.part` raises, and ValueError for another kind of model, for missing or unknown
    tensors and for shapes that do not match each other.
    """
    checkpoint = Checkpoint.open(source)
    spec, weights = checkpoint.transformer_spec(), checkpoint.weights(Part.TRANSFORMER)
    with blame_file(weights.name, ModelKind.TRANSFORMER, weights.tensors), torch.device("meta"):
        model = FluxTransformer(spec)
    place = device if limit is None or weights.nbytes <= limit else "cpu"
    assign_weights(model, weights.tensors, weights.name, dtype, place, on_progress)
    remember_files(model, weights.file.states)
    return stream(model, device, limit)


def load_autoencoder(
    source: Source,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> AutoEncoder:
    """FLUX.1 autoencoder from a file or folder with BFL's names or diffusers', alone or in a checkpoint.

    Arguments and errors are those of `load_transformer`; autoencoders with other than FLUX.1's 16 latent
    channels are refused with a ValueError.
    """
    weights = Checkpoint.open(source).weights(Part.VAE)
    expect(weights.kind, ModelKind.VAE, weights.name)
    with blame_file(weights.name, ModelKind.VAE, weights.tensors):
        spec = AutoEncoderSpec.from_state_dict(weights.tensors)
    if spec.z_channels != LATENT_CHANNELS:
        raise ValueError(
            f"{weights.name} is a VAE with {spec.z_channels} latent channels, "
            f"FLUX.1's has {LATENT_CHANNELS}; choose FLUX.1's ae.safetensors"
        )
    with blame_file(weights.name, ModelKind.VAE, weights.tensors), torch.device("meta"):
        model = AutoEncoder(spec)
    assign_weights(model, weights.tensors, weights.name, dtype, device, on_progress)
    remember_files(model, weights.file.states)
    channels_last(model)
    return model
