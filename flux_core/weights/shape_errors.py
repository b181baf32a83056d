"""Errors of reading a model's sizes from a file's tensors, as one sentence that names the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from .kinds import ModelKind
from .weight_file import Weight


@contextmanager
def blame_file(file: str, kind: ModelKind, tensors: Mapping[str, Weight]) -> Iterator[None]:
    """Context that reports any error of sizing or building a model from `tensors` as a ValueError on `file`.

    The shapes in a damaged or hostile file may be anything, so whatever fails on them is the file's fault.
    """
    empty = next((name for name, tensor in tensors.items() if not tensor.numel()), None)
    if empty is not None:
        shape = [*tensors[empty].shape]
        raise ValueError(
            f"{file} cannot be used: {empty} is empty, its shape is {shape}; choose another file"
        )
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{file} lacks {error.args[0]}; choose a file of the whole model") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except (IndexError, ArithmeticError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{file} has tensors whose shapes do not make {kind.label}; choose another file"
        ) from error
