"""File -> module on the CPU or a device, without a random initialisation in between.

A module is built on the meta device, where parameters have shapes and no memory, and is then given the
file's mapped tensors themselves (`assign=True`). Nothing is filled with random numbers first and nothing is
held twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..spec import FluxSpec
from ..transformer import FluxTransformer
from ..vae import AutoEncoder, AutoEncoderSpec
from .files import read_state_dict
from .kinds import AUTOENCODER, TRANSFORMER, Kind, expect

log = logging.getLogger(__name__)

VAE_PREFIXES = ("vae.", "first_stage_model.")
COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LATENT_CHANNELS = 16

Module = TypeVar("Module", bound=nn.Module)


def load_transformer(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> FluxTransformer:
    """FLUX.1 transformer from a safetensors file with BFL's names, alone or in an all-in-one checkpoint.

    Its sizes are read off the tensors, its dtype is the file's unless `dtype` is given (`choose_dtype`
    tells what mixed and 8-bit files become). Raises what `read_state_dict` raises, and ValueError for
    another kind of model, for missing or unknown tensors and for shapes that don't fit each other.
    """
    state_dict = read_state_dict(path)
    file = Path(path).name
    expect(state_dict, TRANSFORMER, file)
    with sizes_of(file, TRANSFORMER, state_dict), torch.device("meta"):
        model = FluxTransformer(FluxSpec.from_state_dict(state_dict))
    return fill(model, state_dict, file, dtype, device)


def load_autoencoder(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> AutoEncoder:
    """FLUX.1 autoencoder from a safetensors file with BFL's names, alone or in an all-in-one checkpoint.

    Otherwise as `load_transformer`; also refuses autoencoders of other latent channels than FLUX.1's 16.
    """
    state_dict = read_state_dict(path, VAE_PREFIXES)
    file = Path(path).name
    expect(state_dict, AUTOENCODER, file)
    with sizes_of(file, AUTOENCODER, state_dict):
        spec = AutoEncoderSpec.from_state_dict(state_dict)
    if spec.z_channels != LATENT_CHANNELS:
        raise ValueError(
            f"{file} is a VAE with {spec.z_channels} latent channels, FLUX.1's has {LATENT_CHANNELS}; "
            "choose FLUX.1's ae.safetensors"
        )
    with sizes_of(file, AUTOENCODER, state_dict), torch.device("meta"):
        model = AutoEncoder(spec)
    return fill(model, state_dict, file, dtype, device)


@contextmanager
def sizes_of(file: str, kind: Kind, state_dict: dict[str, Tensor]) -> Iterator[None]:
    """A block that reads a model's sizes off its tensors; ValueError names `file` where they make no model.

    The shapes in a damaged or hostile file may be anything, so whatever fails on them is the file's fault.
    """
    empty = next((name for name, tensor in state_dict.items() if not tensor.numel()), None)
    if empty is not None:
        got = [*state_dict[empty].shape]
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


def fill(
    model: Module,
    state_dict: dict[str, Tensor],
    file: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Module:
    """The meta module with the state dict's tensors as its parameters, in eval mode, without gradients.

    Raises ValueError that names `file` unless names and shapes fit exactly. Takes the tensors out of
    `state_dict` as it goes, so that a conversion holds no tensor in both dtypes longer than needed.
    """
    _check_fit(model, state_dict, file)
    dtype = choose_dtype(state_dict, file, dtype)
    converted = {name: state_dict.pop(name).to(device=device, dtype=dtype) for name in list(state_dict)}
    model.load_state_dict(converted, assign=True)
    return model.to(device).requires_grad_(False).eval()  # .to moves buffers, which no file holds


def choose_dtype(state_dict: dict[str, Tensor], file: str, dtype: torch.dtype | None = None) -> torch.dtype:
    """The one dtype to compute in: the asked one, else the file's.

    A file that mixes dtypes gets the one most of its numbers have. Numbers in 8-bit floats can be stored
    but not multiplied by plain torch, so these become bfloat16. Raises ValueError for integers (a quantised
    file).
    """
    counts: dict[torch.dtype, int] = {}
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{file} is quantised ({name} is {tensor.dtype}); choose a bf16, fp16 or fp32 file"
            )
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    if dtype is not None:
        return dtype
    main = max(counts, key=lambda candidate: counts[candidate])
    chosen = main if main in COMPUTABLE else torch.bfloat16
    if len(counts) > 1 or chosen != main:
        log.info("%s holds %s; computing in %s", file, ", ".join(map(str, counts)), chosen)
    return chosen


def _check_fit(model: nn.Module, state_dict: dict[str, Tensor], file: str) -> None:
    """Raise ValueError with the first few names unless the tensors are exactly the module's."""
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in state_dict]
    if missing:
        raise ValueError(f"{file} lacks {_some(missing)}; it is incomplete, download it again")
    unknown = [name for name in state_dict if name not in wanted]
    if unknown:
        raise ValueError(
            f"{file} has {_some(unknown)} that this model does not know; choose an unmodified model"
        )
    for name, tensor in wanted.items():
        if tensor.shape != state_dict[name].shape:
            got, want = list(state_dict[name].shape), list(tensor.shape)
            raise ValueError(
                f"{file}: {name} must be {want} by its other tensors, got {got}; download it again"
            )


def _some(names: list[str]) -> str:
    """The count of names and the first three."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} ({', '.join(names[:3])}{more})"
