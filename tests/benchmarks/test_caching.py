"""`bench caching` with the shipped miniatures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rectiflux.benchmarks import caching
from rectiflux.flux_core.sampling.step_cache import METHODS


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


def test_a_negative_threshold_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        caching.main(["--thresholds", "-0.1"])
    assert "thresholds" in capsys.readouterr().err
