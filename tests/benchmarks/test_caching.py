"""`bench caching` with the shipped miniatures, and the image metrics that it uses."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks import caching
from rectiflux.benchmarks.image_metrics import psnr, ssim
from rectiflux.flux_core.sampling.step_cache import METHODS

IMAGE = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_psnr() -> None:
    """A difference of a tenth everywhere is 20 dB."""
    assert psnr(IMAGE + 0.1, IMAGE) == pytest.approx(20.0, abs=1e-4)
    assert psnr(IMAGE, IMAGE) == math.inf


def test_ssim() -> None:
    """Constant images a and b have SSIM (2 a b + c) / (a^2 + b^2 + c); inverted texture is below 0."""
    assert ssim(IMAGE, IMAGE) == pytest.approx(1.0, abs=1e-5)
    a, b = torch.full((3, 16, 16), 0.5), torch.full((3, 16, 16), 0.25)
    assert ssim(a, b) == pytest.approx((0.25 + 1e-4) / (0.3125 + 1e-4), abs=1e-4)
    assert ssim(1 - IMAGE, IMAGE) < 0.0
    noise = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(1))
    assert ssim(IMAGE, IMAGE + 0.01 * noise) > 0.98


@pytest.mark.slow
def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A threshold of 0 skips nothing and equals the full run; the forecast beats as many plain steps."""
    report = tmp_path / "figures.json"
    argv = ["--quick", "--threads", "1", "--thresholds", "0", "0.1", "--json", str(report)]
    assert caching.main(argv) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"speed_up \d+\.\d\d psnr \d+\.\d plain_psnr \d+\.\d", last)
    rows = json.loads(report.read_text())["figures"]["rows"]
    found = {(row["variant"], row["method"], row["threshold"]): row for row in rows}
    assert list(found) == [(v, m, t) for v in ("dev", "schnell") for m in METHODS for t in (0.0, 0.1)]
    for (variant, _, threshold), row in found.items():
        if threshold == 0 or variant == "schnell":
            steps = {"dev": 28, "schnell": 4}[variant]
            assert row["computed"] == row["work"] == row["plain_steps"] == steps
            assert row["psnr"] == row["plain_psnr"] == caching.MAX_PSNR
            assert row["distance"] == pytest.approx(0.0, abs=1e-4)
    dev = found[("dev", *caching.DEFAULT)]
    assert 2 <= dev["computed"] < dev["work"] <= dev["plain_steps"] < 28
    assert dev["psnr"] > dev["plain_psnr"] + 3
