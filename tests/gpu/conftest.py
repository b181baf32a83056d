"""What only a card can show: `python3 run.py test tests/gpu`, beside a torch with CUDA; elsewhere skipped.

RECTIFLUX_TEST_DEVICE=cpu tries the tests themselves on a CPU, as far as they need no card.
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
    """Marks these tests, and skips them where there is no device for them."""
    here = DEVICE.type == "cpu" or torch.cuda.is_available()
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker("gpu")
        item.add_marker(pytest.mark.filterwarnings("default"))  # each torch and driver has its own
        if not here:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def card() -> torch.device:
    """For what no CPU stands in for."""
    if DEVICE.type != "cuda":
        pytest.skip("needs a CUDA device")
    return DEVICE


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """float32 as such: cuDNN would round its inputs to 10 bits (TF32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cudnn.allow_tf32 = before
