"""Memory limits by name, and free memory as Linux and a container report it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core.memory import limits


@pytest.mark.parametrize(("free", "limit"), [(10 << 30, 15 << 29), (1 << 30, 0), (None, None)])
def test_limits_by_name(monkeypatch: pytest.MonkeyPatch, free: int | None, limit: int | None) -> None:
    monkeypatch.setattr(limits, "free_memory", lambda device: free)
    assert limits.limit_of("auto", "cpu") == limit
    assert limits.limit_of("6 GB", "cpu") == 6 << 30
    assert limits.limit_of("none", "cpu") is None
    with pytest.raises(ValueError, match="'7'"):
        limits.limit_of("7", "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is unknown")
def test_free_memory_of_this_machine() -> None:
    free = limits.free_memory(torch.device("cpu"))
    assert free is not None and 1 << 20 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert limits.free_memory(torch.device("meta")) is None


def test_free_memory_of_a_container(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("4096000\n", encoding="ascii")
    (tmp_path / "memory.stat").write_text("anon 4000\nfile 9999999\n", encoding="ascii")
    assert limits.container_memory(tmp_path) == 4_092_000
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert limits.container_memory(tmp_path) is None
    assert limits.container_memory(tmp_path / "missing") is None
