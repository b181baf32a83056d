"""bench caching: its measures on pictures that are known, and the form of its table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks import caching
from rectiflux.flux_core.sampling.step_cache import METHODS

NUMBERS = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_psnr() -> None:
    assert caching.psnr(NUMBERS + 0.1, NUMBERS) == pytest.approx(20.0, abs=1e-4)
    assert caching.psnr(NUMBERS, NUMBERS) == 120.0


def test_structure_on_what_is_known() -> None:
    """Flat pictures a and b have SSIM (2 a b + c) / (a^2 + b^2 + c); turned round, texture is below 0."""
    assert caching.structure(NUMBERS, NUMBERS) == pytest.approx(0.0, abs=1e-5)
    a, b = torch.full((3, 16, 16), 0.5), torch.full((3, 16, 16), 0.25)
    assert caching.structure(a, b) == pytest.approx(1 - (0.25 + 1e-4) / (0.3125 + 1e-4), abs=1e-4)
    assert caching.structure(1 - NUMBERS, NUMBERS) > 1.0
    assert caching.structure(NUMBERS, NUMBERS + 0.01 * torch.randn(3, 24, 24)) < 0.02


@pytest.mark.slow
def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A threshold of 0 skips nothing and is the full run; the forecast beats as many plain steps."""
    report = tmp_path / "figures.json"
    argv = ["--quick", "--threads", "1", "--thresholds", "0", "0.1", "--json", str(report)]
    assert caching.main(argv) == 0
    head, *lines, told, last = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in (head, *lines)}) == 1, "columns stand below each other"
    rows = json.loads(report.read_text())["figures"]["rows"]
    settings = [(row["variant"], row["method"], row["threshold"]) for row in rows]
    assert settings == [(v, m, t) for v in ("dev", "schnell") for m in METHODS for t in (0.0, 0.1)]
    for row in rows:
        if row["threshold"] == 0:
            steps = {"dev": 28, "schnell": 4}[row["variant"]]
            assert row["computed"] == row["work"] == row["plain_steps"] == steps
            assert row["psnr"] == row["plain_psnr"] == 120.0
            assert row["distance"] == pytest.approx(0.0, abs=1e-4)
    dev = next(
        row for row in rows if (row["variant"], row["method"], row["threshold"]) == ("dev", *caching.DEFAULT)
    )
    assert 2 <= dev["computed"] < 28 and dev["computed"] < dev["work"] <= dev["plain_steps"] < 28
    assert dev["psnr"] > dev["plain_psnr"] + 3
    assert told == "mini-schnell in 4 steps: the cache does nothing"
    assert re.fullmatch(r"speed_up \d+\.\d\d psnr \d+\.\d plain_psnr \d+\.\d", last)
