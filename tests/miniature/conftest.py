"""The miniature's autoencoder with an untrained decoder, made once: its encoder is a PCA of 300 images."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from rectiflux.flux_core.model.autoencoder import AutoEncoder
from rectiflux.miniature import autoencoder


@pytest.fixture(scope="session")
def new_autoencoder() -> Callable[[], AutoEncoder]:
    """Each call gives a fresh one, which a test may change."""
    untouched = autoencoder.new_autoencoder()
    return lambda: copy.deepcopy(untouched)
