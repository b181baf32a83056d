"""Every benchmark refuses invalid options, and names the option and the value."""

from __future__ import annotations

import importlib

import pytest
import torch


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("adherence", "--seeds", "0"),
        ("adherence", "--size", "large"),
        ("adherence", "--variant", "max"),
        ("caching", "--thresholds", "-0.1"),
        ("family", "--steps", "many"),
        ("family", "--variants", "max"),
        ("family", "--figure", "nowhere/x.png"),
        ("fidelity", "--threads", "0"),
        ("flow", "--json", "nowhere/x"),
        ("flow", "--figure", "nowhere/x.png"),
        ("full_size", "--sides", "100"),
        ("full_size", "--formats", "Q9"),
        ("full_size", "--limit", "much"),
        ("speed", "--cases", "full,half"),
        ("speed", "--device", "cuda"),
        ("time_spent", "--cases", "half"),
        ("time_spent", "--device", "cuda"),
    ],
)
def test_an_invalid_option_is_named(
    name: str, option: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmark = importlib.import_module(f"rectiflux.benchmarks.{name}")
    with pytest.raises(SystemExit):
        benchmark.main([option, value])
    error = capsys.readouterr().err
    assert f"run.py bench {name.replace('_', '-')}" in error and option in error
