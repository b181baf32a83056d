"""`bench time-spent`: operations by part, a step divided by hand, lower bounds, quick mode; no time."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from rectiflux.benchmarks import floors, time_spent
from rectiflux.benchmarks.floors import Flop, bandwidth, matmul_rate, step_bytes, step_flop
from rectiflux.benchmarks.interleaved import Clock
from rectiflux.benchmarks.speed_inputs import Inputs, random_model
from rectiflux.benchmarks.speed_settings import Settings
from rectiflux.benchmarks.step_parts import (
    OVERHEAD,
    PARTS,
    Part,
    by_context,
    part_of,
)
from rectiflux.benchmarks.time_spent import divide
from rectiflux.flux_core.backends import cpu_attention
from rectiflux.flux_core.model.spec import FLUX_DEV, FluxSpec
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TINY = FluxSpec(64, 1, 1, 1, context_in=16, vec_in=8, guidance_embed=True)


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("mkldnn::_linear_pointwise", "linear layers"),
        ("aten::addmm", "linear layers"),
        ("aten::_scaled_mm", "linear layers"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_scaled_dot_product_cudnn_attention", "attention"),
        ("aten::native_layer_norm", "norms and modulation"),
        ("aten::linalg_vector_norm", "q/k norm and rotary"),
        ("aten::mul_", "q/k norm and rotary"),
        ("aten::gelu", "GELU"),
        ("aten::addcmul", "gated residuals"),
        ("aten::cat", "copies"),
        ("aten::view", OVERHEAD),
        ("aten::empty", OVERHEAD),
        ("aten::cos", "other"),
    ],
)
def test_the_part_of_an_operation(operation: str, part: str) -> None:
    assert part_of(operation) == part


@pytest.mark.parametrize("kind", ["wall", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operation_of_a_step_belongs_to_a_part(kind: str, dtype: torch.dtype) -> None:
    """On a CPU, by the profiler and by our own timing."""
    model = random_model(TINY, dtype, torch.device("cpu"))
    with torch.no_grad():
        step = Inputs(model, 32, 4).our_step(model)
        took = by_context(list(time_spent.operations_of(step, Clock(kind))))
    assert {part_of(name) for name, _ in took} | {OVERHEAD} == set(PARTS) - {"other"}
    assert all(seconds >= 0 for _, seconds in took)
    assert sum("scaled_dot_product_flash" in name for name, _ in took) == 2, "one per block"


def test_attention_by_onednn_is_attention() -> None:
    """As cpu_attention.py computes it where torch's own is slow: packed matmuls around a softmax."""
    q, k, v = torch.randn(3, 1, 2, 80, 64).unbind()
    with torch.no_grad():
        run = partial(cpu_attention.attend, q, k, v)
        took = by_context(list(time_spent.operations_of(run, Clock("cpu"))))
    parts = Counter(part_of(name) for name, _ in took)
    assert parts["attention"] == 10 and parts["linear layers"] == 0, (
        "of 2 heads: 2 packings, 2 matmuls, a softmax"
    )


def test_a_gelu_in_four_operations_is_one() -> None:
    """With an allocation in between; other multiplications and sigmoids keep their names."""
    names = "addcmul.out empty mul_ sigmoid_ mul.out mul sigmoid mul addcmul mul_".split()
    found = by_context([(f"aten::{name}", float(i)) for i, name in enumerate(names)])
    assert [name for name, _ in found[:5]] == ["aten::gelu", "aten::empty", *["aten::gelu"] * 3]
    assert [name for name, _ in found[5:]] == [f"aten::{name}" for name in names[5:]]
    assert [seconds for _, seconds in found] == list(map(float, range(len(names))))


def test_a_step_is_divided_by_hand() -> None:
    """Of 10 s linear layers take 6, GELU 2, an unknown operation 1; the last second is overhead."""
    took = {"aten::mm": 6.0, "aten::gelu": 2.0, "aten::cos": 1.0, "aten::view": 0.25}
    step = divide("case", 10.0, took, {"linear layers": 3.0, "GELU": 1.0, "gated residuals": 9.0})
    parts = {part.name: part for part in step.parts}
    assert tuple(parts) == PARTS and step.other == ("aten::cos",)
    assert parts["linear layers"] == Part("linear layers", 6.0, 3.0)
    assert parts[OVERHEAD] == Part(OVERHEAD, 1.0, 0.0)
    assert parts["gated residuals"].floor == 0.0, "a part without time has no floor"
    assert step.floor_share == 0.4
    assert step.lines().splitlines()[-1] == "floor_share case 0.400"
    scaled = divide("case", 5.0, {"aten::mm": 6.0, "aten::gelu": 4.0}, {})
    assert [part.seconds for part in scaled.parts if part.seconds] == [3.0, 2.0]


def test_floors_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A matmul of 2 FLOP/s and a copy of 4 bytes/s; two images of 4 image and 3 text tokens, fp32."""
    monkeypatch.setattr(time_spent, "matmul_rate", lambda dtype, clock, sides: 2.0)
    copied: list[int] = []
    monkeypatch.setattr(time_spent, "bandwidth", lambda count, clock: copied.append(count) or 4.0)
    model = random_model(TINY, torch.float32, torch.device("cpu"))
    settings = Settings(True, 0.0, Clock(), tmp_path)
    found = time_spent.floors(model, Inputs(model, 32, 3, batch=2), settings)
    flop, moved = step_flop(TINY, 3, 4, 2), step_bytes(TINY, 3, 4, 4)
    assert copied == [2 * 7 * 256 * 4]
    assert found["linear layers"] == flop.linear / 2 and found["attention"] == flop.attention / 2
    assert found["GELU"] == 2 * moved["GELU"] / 4 and found.keys() == {"linear layers", "attention", *moved}


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both cases; without the miniature one is skipped, and without any case the exit code is 1."""
    file, figure, threads = tmp_path / "f.json", tmp_path / "f.png", str(torch.get_num_threads())
    arguments = ["--quick", "--threads", threads, "--clock", "cpu"]
    assert time_spent.main([*arguments, "--json", str(file), "--figure", str(figure)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert [case["case"] for case in figures["cases"]] == ["miniature-128", "full-64"]
    for case in figures["cases"]:
        assert sum(part["seconds"] for part in case["parts"]) == pytest.approx(case["seconds"])
    assert capsys.readouterr().out.splitlines()[-1] == f"floor_share {figures['floor_share']:.3f}"
    with Image.open(figure) as drawn:
        assert drawn.width > 600
    missing = [*arguments, "--models", str(tmp_path), "--cases", "miniature"]
    assert time_spent.main(missing) == 1
    assert "skipped miniature" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("side", "linear", "attention"), [(1024, 59.49e12, 14.87e12), (512, 19.83e12, 1.65e12)]
)
def test_flop_of_flux(side: int, linear: float, attention: float) -> None:
    """With 512 text tokens: 74.4 and 21.5 TFLOP in total."""
    flop = step_flop(FLUX_DEV, 512, (side // 16) ** 2)
    assert flop.linear == pytest.approx(linear, rel=1e-3)
    assert flop.attention == pytest.approx(attention, rel=1e-2)
    assert step_flop(FLUX_DEV, 512, (side // 16) ** 2, batch=4).total == 4 * flop.total


def test_flop_by_torchs_own_count() -> None:
    """torch counts the matmuls of our step: all but text projection and modulations."""
    inputs = Inputs(model := random_model(TINY, torch.float32, torch.device("cpu")), 64, 5, batch=2)
    run = inputs.our_step(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == step_flop(TINY, 5, 16, batch=2).total


def test_bytes_and_seconds_by_hand() -> None:
    """Width 64, MLP 256, a block of each kind, 4 text and 6 image tokens, 2 bytes per element."""
    assert step_bytes(TINY, 4, 6, 2) == {
        "norms and modulation": 2 * 64 * 2 * (2 * 10 + 10 + 6),
        "q/k norm and rotary": 4 * 64 * 2 * 2 * 10,
        "GELU": 2 * 256 * 2 * 2 * 10,
        "gated residuals": 3 * 64 * 2 * (2 * 10 + 10),
    }
    assert Flop(6.0, 4.0).seconds(2.0, 1.0) == 7.0


def test_the_best_rate_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 2.0, 8.0, 64.0])
    monkeypatch.setattr(floors, "can_pack", lambda device, dtype: True)
    monkeypatch.setattr(floors, "best_of", lambda run, clock: next(seconds))
    assert matmul_rate(torch.float32, Clock(), (8, 16)) == max(1024 / 4, 1024 / 2, 8192 / 8, 8192 / 64)
    monkeypatch.setattr(floors, "best_of", lambda run, clock: 0.5)
    assert bandwidth(4096, Clock()) == 2 * 4096 / 0.5
