"""File or folder -> module on the CPU or a device, without a random initialisation in between.

A module is built on the meta device, where parameters have shapes and no memory, and is then given the
file's mapped tensors themselves (`assign=True`, see fill.py). Nothing is filled with random numbers first and
nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..memory import stream
from ..model.autoencoder import AutoEncoder, AutoEncoderSpec, channels_last
from ..model.spec import FluxSpec
from ..model.transformer import FluxTransformer
from .assemble import assemble
from .checkpoint import TRANSFORMER_PART, VAE_PART, Weight, read_weights
from .diffusers import autoencoder_names, transformer_names
from .fill import fill
from .kinds import AUTOENCODER, DIFFUSERS_TRANSFORMER, DIFFUSERS_VAE, TRANSFORMER, Kind, expect, kind_of

LATENT_CHANNELS = 16
MAX_BLOCKS = 1000


def load_transformer(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
    limit: int | None = None,
) -> FluxTransformer:
    """FLUX.1 transformer from a file or folder of any format that is read, told by its content.

    BFL's or diffusers' names, alone or in an all-in-one checkpoint; safetensors or GGUF; shards in a folder.
    Its sizes are read off the tensors, its dtype is the file's unless `dtype` is given (`choose_dtype` tells
    what mixed and quantised files become). Quantised weights stay as they are, in `QuantizedLinear` layers.
    `on_progress` hears bytes done and bytes in all. With a `limit`, bytes of weights that may be kept on the
    device, a larger model is streamed (flux_core.memory). Raises what `read_weights` raises, and
    ValueError for another kind of model, for missing or unknown tensors and for shapes that don't fit each
    other.
    """
    file = read_weights(path, TRANSFORMER_PART)
    tensors = assemble(file)
    if kind_of(tensors) == DIFFUSERS_TRANSFORMER.name:
        tensors = transformer_names(tensors, file.name)
    expect(tensors, TRANSFORMER, file.name)
    with sizes_of(file.name, TRANSFORMER, tensors), torch.device("meta"):
        model = FluxTransformer(_bounded(FluxSpec.from_state_dict(tensors)))
    fits = limit is None or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    filled = fill(model, tensors, file.name, dtype, device if fits else "cpu", on_progress)
    return stream(filled, device, limit)


def _bounded(spec: FluxSpec) -> FluxSpec:
    """The spec, when it asks for no more blocks than are built in a second."""
    blocks = spec.depth + spec.depth_single
    if blocks > MAX_BLOCKS:
        raise ValueError(f"it counts {blocks:,} blocks, FLUX.1 has 57; download it again")
    return spec


def load_autoencoder(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> AutoEncoder:
    """FLUX.1 autoencoder from a file or folder, BFL's names or diffusers', alone or in a checkpoint.

    Otherwise as `load_transformer`; also refuses autoencoders of other latent channels than FLUX.1's 16.
    """
    file = read_weights(path, VAE_PART)
    tensors = assemble(file)
    if kind_of(tensors) == DIFFUSERS_VAE.name:
        tensors = autoencoder_names(tensors)
    expect(tensors, AUTOENCODER, file.name)
    with sizes_of(file.name, AUTOENCODER, tensors):
        spec = AutoEncoderSpec.from_state_dict(tensors)
    if spec.z_channels != LATENT_CHANNELS:
        raise ValueError(
            f"{file.name} is a VAE with {spec.z_channels} latent channels, FLUX.1's has {LATENT_CHANNELS}; "
            "choose FLUX.1's ae.safetensors"
        )
    with sizes_of(file.name, AUTOENCODER, tensors), torch.device("meta"):
        model = AutoEncoder(spec)
    filled = fill(model, tensors, file.name, dtype, device, on_progress)
    channels_last(filled)
    return filled


@contextmanager
def sizes_of(file: str, kind: Kind, tensors: dict[str, Weight]) -> Iterator[None]:
    """A block that reads a model's sizes off its tensors; ValueError names `file` where they make no model.

    The shapes in a damaged or hostile file may be anything, so whatever fails on them is the file's fault.
    """
    empty = next((name for name, tensor in tensors.items() if not tensor.numel()), None)
    if empty is not None:
        got = [*tensors[empty].shape]
        raise ValueError(f"{file} is damaged: {empty} holds no numbers, it is {got}; choose another file")
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{file} lacks {error.args[0]}; it is incomplete, download it again") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except (IndexError, ArithmeticError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{file} is damaged: the shapes of its tensors do not make {kind.name}; download it again"
        ) from error
