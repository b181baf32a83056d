"""Fused kernels and recorded steps on or off while something is measured, whatever the environment says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..flux_core import fused

GRAPHS = "RECTIFLUX_GRAPHS"


@contextmanager
def recordings(on: bool) -> Iterator[None]:
    """Whether models that have none yet may record their steps (flux_core/graphs.py)."""
    before = os.environ.get(GRAPHS)
    os.environ[GRAPHS] = "1" if on else "0"
    try:
        yield
    finally:
        del os.environ[GRAPHS]
        if before is not None:
            os.environ[GRAPHS] = before


@contextmanager
def kernels(on: bool) -> Iterator[None]:
    """All of flux_core/fused for tensors of any size, or none of it."""
    off, least = set(fused._off), fused.LARGE
    fused._off.clear()
    fused._off.update(() if on else {"all"})
    fused.LARGE = 0 if on else least
    try:
        yield
    finally:
        fused._off.clear()
        fused._off.update(off)
        fused.LARGE = least
