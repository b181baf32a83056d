"""Tests for a CUDA device: `python3 run.py test tests/gpu`; skipped where there is none.

RECTIFLUX_TEST_DEVICE=cpu runs those that need no card on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DEVICE = torch.device(os.environ.get("RECTIFLUX_TEST_DEVICE", "cuda"))
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark these tests, and skip them without a device."""
    here = DEVICE.type == "cpu" or torch.cuda.is_available()
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker("gpu")
        item.add_marker(
            pytest.mark.filterwarnings("default")
        )  # they differ between versions of torch and drivers
        if not here:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def card() -> torch.device:
    """The device, for tests that cannot run on a CPU."""
    if DEVICE.type != "cuda":
        pytest.skip("needs a CUDA device")
    return DEVICE


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """float32 without TF32, in which cuDNN rounds its inputs to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cudnn.allow_tf32 = before
