"""The case for GPUs, every line of it on the CPU with a tiny model: what it counts, tells, skips; no time."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from rectiflux.benchmarks import floors, speed_gpu
from rectiflux.benchmarks.floors import Flop, matmul_rate, step_bytes, step_flop
from rectiflux.benchmarks.interleaved import Clock, Ratio
from rectiflux.benchmarks.speed_gpu import Group, Plan, full_size
from rectiflux.benchmarks.speed_inputs import Inputs, random_model
from rectiflux.benchmarks.speed_settings import Settings, Skipped, Told
from rectiflux.flux_core.backends.quantize import quantize_to_fp8
from rectiflux.flux_core.model.spec import FLUX_DEV, FLUX_SCHNELL, FluxSpec
from rectiflux.flux_core.model.transformer import FluxTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TINY = FluxSpec(64, 1, 1, 1, context_in=16, vec_in=8, guidance_embed=True)
DISTILLED = FluxSpec(64, 1, 1, 1, context_in=16, vec_in=8)


def tiny(**changes: Any) -> Plan:
    plan = Plan((("dev", TINY, 3),), (32,), (1,), ("bf16",), text=4, whole=1e9, backend="eager")
    return replace(plan, **changes)


def settings_of(folder: Path, end: float = float("inf")) -> Settings:
    return Settings(True, 0.0, Clock(), folder, end)


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(floors.SIDES, "cpu", (32,))
    monkeypatch.setattr(floors, "best_of", lambda run, clock: float(run() is not None))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler."""

    def refuse(model: FluxTransformer) -> FluxTransformer:
        raise ValueError("compiling needs g++ on the PATH,\nfound none")

    monkeypatch.setattr(speed_gpu, "compile_blocks", refuse)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' compiled twin left eager, which is quicker."""
    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", lambda self, **options: None)


@pytest.mark.parametrize(
    ("side", "linear", "attention"), [(1024, 59.49e12, 14.87e12), (512, 19.83e12, 1.65e12)]
)
def test_the_arithmetic_of_a_step(side: int, linear: float, attention: float) -> None:
    """Of FLUX.1 with 512 text tokens: 74.4 and 21.5 TFLOP in all."""
    flop = step_flop(FLUX_DEV, 512, (side // 16) ** 2)
    assert flop.linear == pytest.approx(linear, rel=1e-3) and flop.attention == pytest.approx(
        attention, rel=1e-2
    )
    assert round(flop.total / 1e12, 1) == {1024: 74.4, 512: 21.5}[side]
    assert step_flop(FLUX_DEV, 512, (side // 16) ** 2, batch=4).total == 4 * flop.total


def test_the_arithmetic_by_torchs_own_count() -> None:
    """torch counts the products of our step: all but text projection and modulations."""
    inputs = Inputs(model := random_model(TINY, torch.float32, torch.device("cpu")), 64, 5, batch=2)
    run = inputs.our_step(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == step_flop(TINY, 5, 16, batch=2).total


def test_bytes_and_seconds_by_hand() -> None:
    """Width 64, MLP 256, a block of each kind, 4 text and 6 image tokens, 2 bytes a number."""
    assert step_bytes(TINY, 4, 6, 2) == {
        "norms and modulation": 2 * 64 * 2 * (2 * 10 + 10 + 6),
        "q/k norm and rotary": 4 * 64 * 2 * 2 * 10,
        "GELU": 2 * 256 * 2 * 2 * 10,
        "gated residuals": 3 * 64 * 2 * (2 * 10 + 10),
    }
    assert Flop(6.0, 4.0).seconds(2.0, 1.0) == 7.0


def test_rates_are_the_best_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 2.0, 8.0, 64.0])
    monkeypatch.setattr(floors, "can_pack", lambda device, dtype: True)
    monkeypatch.setattr(floors, "best_of", lambda run, clock: next(seconds))
    assert matmul_rate(torch.float32, Clock(), (8, 16)) == max(1024 / 4, 1024 / 2, 8192 / 8, 8192 / 64)
    monkeypatch.setattr(floors, "best_of", lambda run, clock: 0.5)
    assert floors.bandwidth(4096, Clock()) == 2 * 4096 / 0.5


def test_everything_of_a_model(tmp_path: Path, eager: None) -> None:
    outcomes = list(
        full_size(settings_of(tmp_path), tiny(models=(("dev", TINY, 3), ("schnell", DISTILLED, 2))))
    )
    ratios = [one for one in outcomes if isinstance(one, Ratio)]
    expected = [
        name
        for model in ("dev", "schnell")
        for name in (f"memory-{model}-bf16-1-32", f"{model}-bf16-1-32-eager", f"{model}-bf16-1-32-compiled")
    ]
    assert [ratio.case for ratio in ratios] == expected
    assert ratios[0].unit == "MB" and ratios[1].note == "ours eager, 3 steps"
    told = "\n".join(one.line for one in outcomes if isinstance(one, Told))
    assert "dev-bf16-1: ours is eager, compiling needs g++ on the PATH, found none" in told
    assert "matrix product in bf16" in told and "dev-bf16-1-32: attention through torch" in told
    for far in re.findall(r"largest difference (\S+) of", told):
        assert float(far) < 0.05, "both sides compute the same"
    assert len(re.findall(r"% of the matrix product's rate; theirs", told)) == 4


def test_a_long_loop_is_cut_short(
    tmp_path: Path, eager: None, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 6 steps 2 are measured; both times are then three times what was measured, the ratio what it was."""
    given: list[tuple[object, object]] = []

    def compared(case: str, ours: object, theirs: object, clock: Clock, budget: float, note: str) -> Ratio:
        given.append((ours, theirs))
        return Ratio(case, 2.0, 2.0, 2.0, 2, 1.0, 2.0, note)

    monkeypatch.setattr(speed_gpu, "compare", compared)
    plan = tiny(models=(("dev", TINY, 6),), few=2, whole=0.0)
    ratios = [one for one in full_size(settings_of(tmp_path), plan) if isinstance(one, Ratio)]
    assert ratios[1] == Ratio("dev-bf16-1-32-eager", 2.0, 2.0, 2.0, 2, 3.0, 6.0, "ours eager, 6 steps from 2")
    assert len(given) == 2


def test_fp8_is_quantised_and_compiling_makes_a_copy(
    tmp_path: Path, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def quantised(model: FluxTransformer) -> int:
        calls.append("fp8")
        return quantize_to_fp8(model)

    def compiled(model: FluxTransformer) -> FluxTransformer:
        calls.append("compile")
        return model

    monkeypatch.setattr(speed_gpu, "quantize_to_fp8", quantised)
    monkeypatch.setattr(speed_gpu, "compile_blocks", compiled)
    monkeypatch.setattr(speed_gpu, "attention_backend_name", lambda model: "magic")
    outcomes = list(full_size(settings_of(tmp_path), tiny(forms=("bf16", "fp8"))))
    assert calls == ["compile", "fp8", "compile"]
    told = [one.line for one in outcomes if isinstance(one, Told)]
    assert "dev-fp8-1: ours is compiled" in told and "dev-bf16-1-32: attention through magic" in told
    assert "ours compiled, 3 steps" in {one.note for one in outcomes if isinstance(one, Ratio)}


def test_what_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: None) -> None:
    assert list(full_size(settings_of(tmp_path))) == [Skipped("gpu", "for --device cuda")]
    late = list(full_size(settings_of(tmp_path, end=time.perf_counter()), tiny()))
    assert late[-1] == Skipped("dev-bf16-1", "the time is over")

    def none(dtype: torch.dtype, clock: Clock) -> float:
        raise RuntimeError("no fp8\n on this card")

    monkeypatch.setattr(speed_gpu, "matmul_rate", none)
    outcomes = list(full_size(settings_of(tmp_path), tiny()))
    assert outcomes == [
        Skipped("gpu-bf16", "no product: no fp8 on this card"),
        Skipped("gpu-fp8", "no product: no fp8 on this card"),
        Skipped("dev-bf16-1", "bf16 cannot be multiplied here"),
    ]


def test_a_model_that_does_not_fit_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed_gpu, "random_model", full)
    assert list(full_size(settings_of(tmp_path), tiny()))[-1] == Skipped("dev-bf16-1", "CUDA out of memory")
    group = Group("dev", FLUX_DEV, 28, 1, "bf16", {}, Plan(), settings_of(tmp_path))
    assert group.bytes_needed == 4 * 11_901_408_320 + 10**10


def test_the_order_is_by_importance() -> None:
    order = [(batch, form, name) for batch, form, (name, _, _) in Plan().groups()]
    assert order[:4] == [(1, "bf16", "dev"), (1, "bf16", "schnell"), (1, "fp8", "dev"), (1, "fp8", "schnell")]
    assert [batch for batch, _, _ in order] == [1] * 4 + [4] * 4
    assert Plan().sides == (1024, 512) and [steps for _, _, steps in Plan().models] == [28, 4]
    assert Plan().models[1][1] == FLUX_SCHNELL
