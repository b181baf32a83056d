"""Tiny random models in a folder of their own, and the embedded host's folders pointing there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rectiflux.host import context
from rectiflux.host.files import Folders

from .tiny import write_models


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def embedded(tiny_models: Path, tmp_path: Path) -> Iterator[Folders]:
    """The embedded host's folders, with the tiny models in them."""
    folders = Folders.under(tmp_path / "data", models=(tiny_models,))
    with context.using(folders):
        yield folders
