"""The GPU case of `bench speed` on the CPU with a tiny model: ratios, notes, skipped cases; no time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from rectiflux.benchmarks import floors, speed_gpu
from rectiflux.benchmarks.interleaved import Clock, Ratio
from rectiflux.benchmarks.speed_gpu import Group, Plan, full_size
from rectiflux.benchmarks.speed_settings import TIME_IS_UP, Note, Settings, Skipped
from rectiflux.flux_core.model.spec import FLUX_DEV, FLUX_SCHNELL, FluxSpec
from rectiflux.flux_core.model.transformer import FluxTransformer

TINY = FluxSpec(64, 1, 1, 1, context_in=16, vec_in=8, guidance_embed=True)


def tiny(**changes: Any) -> Plan:
    plan = Plan((("dev", TINY, 3),), (32,), (1,), ("bf16",), text_tokens=4, long_loop=1e9, backend="eager")
    return replace(plan, **changes)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(floors, "best_of", lambda run, clock: float(run() is not None))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return Settings(True, 0.0, Clock(), tmp_path)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: FluxTransformer) -> FluxTransformer:
        raise ValueError("compiling needs g++ on the PATH,\nfound none")

    monkeypatch.setattr(speed_gpu, "compile_blocks", refuse)


@pytest.fixture
def eager_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' compiled twin left eager, which is faster here."""
    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", lambda self, **options: None)


def test_everything_of_a_model(settings: Settings, no_compiler: None) -> None:
    distilled = replace(TINY, guidance_embed=False)
    outcomes = list(full_size(settings, tiny(models=(("dev", TINY, 3), ("schnell", distilled, 2)))))
    ratios = {one.case: one for one in outcomes if isinstance(one, Ratio)}
    expected = ("memory-{}-bf16-1-32", "{}-bf16-1-32-eager", "{}-bf16-1-32-compiled")
    assert list(ratios) == [case.format(model) for model in ("dev", "schnell") for case in expected]
    assert ratios["memory-dev-bf16-1-32"].unit == "MB"
    assert ratios["dev-bf16-1-32-eager"].note == "ours eager, 3 steps"
    notes = "\n".join(one.text for one in outcomes if isinstance(one, Note))
    assert "dev-bf16-1: ours is eager, compiling needs g++ on the PATH, found none" in notes
    assert "matmul in bf16" in notes and "attention through torch" in notes
    differences = re.findall(r"largest difference (\S+) of", notes)
    assert len(differences) == 2 and max(map(float, differences)) < 0.05, "both sides compute the same"


def test_a_long_loop_is_shortened(settings: Settings, no_compiler: None, eager_twin: None) -> None:
    """Of 6 steps 2 are measured."""
    plan = tiny(models=(("dev", TINY, 6),), few=2, long_loop=0.0)
    notes = [one.note for one in full_size(settings, plan) if isinstance(one, Ratio)]
    assert notes[1:] == ["ours eager, 6 steps from 2"] * 2


def test_fp8_is_quantized_and_compiled(
    settings: Settings, eager_twin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[set[torch.dtype]] = []

    def keep(model: FluxTransformer) -> FluxTransformer:
        compiled.append({tensor.dtype for tensor in (*model.parameters(), *model.buffers())})
        return model

    monkeypatch.setattr(speed_gpu, "compile_blocks", keep)
    monkeypatch.setattr(speed_gpu, "matmul_rate", lambda dtype, clock, sides: 1.0)
    outcomes = list(full_size(settings, tiny(dtypes=("bf16", "fp8"))))
    assert [torch.float8_e4m3fn in dtypes for dtypes in compiled] == [False, True]
    assert Note("dev-fp8-1: ours is compiled") in outcomes
    assert "ours compiled, 3 steps" in {one.note for one in outcomes if isinstance(one, Ratio)}


def fail(error: Exception) -> Callable[..., Any]:
    def failing(*arguments: object) -> None:
        raise error

    return failing


def test_what_is_skipped(settings: Settings, no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(full_size(settings)) == [Skipped("gpu", "for --device cuda")]
    late = list(full_size(replace(settings, end=time.perf_counter()), tiny()))
    assert late[-1] == Skipped("dev-bf16-1", TIME_IS_UP)
    with monkeypatch.context() as patched:
        patched.setattr(speed_gpu, "random_model", fail(torch.OutOfMemoryError("CUDA out of memory")))
        assert list(full_size(settings, tiny()))[-1] == Skipped("dev-bf16-1", "CUDA out of memory")
    monkeypatch.setattr(speed_gpu, "matmul_rate", fail(RuntimeError("no fp8\n on this card")))
    outcomes = list(full_size(settings, tiny()))
    assert [one.case for one in outcomes if isinstance(one, Skipped)] == ["gpu-bf16", "gpu-fp8", "dev-bf16-1"]
    assert "no fp8 on this card" in outcomes[1].reason  # type: ignore[union-attr]


def test_the_plan_is_flux_in_full_size() -> None:
    """The most important first; memory for both sides' weights in bf16 and 10 GB beside."""
    order = [(batch, dtype, name) for batch, dtype, (name, _, _) in Plan().groups()]
    assert order[:4] == [(1, "bf16", "dev"), (1, "bf16", "schnell"), (1, "fp8", "dev"), (1, "fp8", "schnell")]
    assert Plan().sides == (1024, 512) and Plan().batches == (1, 4)
    assert [(spec, steps) for _, spec, steps in Plan().models] == [(FLUX_DEV, 28), (FLUX_SCHNELL, 4)]
    group = Group("dev", FLUX_DEV, 28, 1, "bf16", {}, Plan(), Settings(True, 0.0, Clock(), Path()))
    assert group.bytes_needed == 4 * 11_901_408_320 + 10**10
