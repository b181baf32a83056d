"""The cases of kernels and recorded steps, every line of them on the CPU with a tiny model; no time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rectiflux.benchmarks import speed_kernels, switches
from rectiflux.benchmarks.speed_kernels import kernels, recorded
from rectiflux.benchmarks.speed_settings import Outcome, Settings, Skipped, Told
from rectiflux.benchmarks.turns import Clock, Ratio
from rectiflux.flux_core import fused, graphs
from rectiflux.flux_core.spec import FluxSpec

TINY = FluxSpec(64, 2, 1, 1, context_in=16, vec_in=8, guidance_embed=True)
NAMES = ["norm", "residual", "residual-norm", "heads-1", "heads-2", "gelu", "fp8", "fp8-wide"]


def settings_of(folder: Path) -> Settings:
    return Settings(True, 0.0, Clock(), folder)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kernels that serve wherever they are switched on, count, and leave the work to torch."""
    found: Counter[str] = Counter()
    for name in set(fused.__all__) - {"LARGE", "serves"}:
        monkeypatch.setattr(fused, name, lambda *_, name=name: found.update([name]))
    monkeypatch.setattr(fused, "serves", lambda x: "all" not in fused._off)
    monkeypatch.setattr("rectiflux.flux_core.fp8.can_multiply", lambda device: True)
    return found


def test_each_kernel_is_compared(launched: Counter[str], tmp_path: Path) -> None:
    """A run that sees whether it runs at all, one that warms, and four in two turns; torch's have none."""
    told = list(kernels(settings_of(tmp_path), TINY))
    assert [one.case for one in told if isinstance(one, Ratio)] == [f"kernel-{name}-768" for name in NAMES]
    assert len(told) == len(NAMES)
    once = 1 + speed_kernels.TOGETHER * 5
    twice = dict.fromkeys(("queries_keys_values", "rows_in_fp8", "gated_residual"), 2 * once)
    plainly = dict.fromkeys(("modulated_norm", "residual_and_norm", "beside_gelu"), once)
    assert launched == {**plainly, **twice}


def test_a_kernel_that_fails_is_told(
    launched: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fused, "beside_gelu", lambda *_: fused._off.add("beside_gelu"))
    before = set(fused._off)
    told = list(kernels(settings_of(tmp_path), TINY))
    assert Skipped("kernel-gelu-768", "the kernel does not run here") in told and len(told) == len(NAMES)
    assert fused._off == before, "and forgotten"


def test_recordings_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(graphs.CpuRecorder, "unrecorded", 0)
    told: list[Outcome] = list(recorded(settings_of(tmp_path), TINY, 4))
    assert [one.case for one in told if isinstance(one, Ratio)] == [
        "recorded-eager-512",
        "recorded-eager-256",
    ]
    lines = [one.line for one in told if isinstance(one, Told)]
    assert lines[0] == "recorded-eager-512: largest difference 0.0e+00 of the largest value"
    assert [one for one in told if isinstance(one, Skipped)] == [
        Skipped(f"recorded-compiled-{side}", "nothing records such a model here") for side in (512, 256)
    ]


def test_switches_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[Any, ...]:
        return set(fused._off), fused.LARGE, graphs.os.environ.get("RECTIFLUX_GRAPHS")

    for value in (None, "0"):
        monkeypatch.delenv("RECTIFLUX_GRAPHS", raising=False)
        if value is not None:
            monkeypatch.setenv("RECTIFLUX_GRAPHS", value)
        before = state()
        with switches.kernels(True), switches.recordings(True):
            assert state() == (set(), 0, "1")
        with switches.kernels(False), switches.recordings(False):
            assert state() == ({"all"}, before[1], "0")
        assert state() == before


def test_they_are_for_cards(tmp_path: Path) -> None:
    for case in (kernels, recorded):
        assert list(case(settings_of(tmp_path))) == [Skipped(case.__name__, "for --device cuda")]
