"""`bench time-spent`: operations by part, a step divided by hand, the whole in quick mode; no time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from rectiflux.benchmarks import floors, time_spent
from rectiflux.benchmarks.interleaved import Clock
from rectiflux.benchmarks.speed_inputs import Inputs, random_model
from rectiflux.benchmarks.speed_settings import Settings
from rectiflux.benchmarks.step_parts import (
    FLOOR,
    OVERHEAD,
    PARTS,
    TIME,
    Part,
    StepTime,
    draw_bars,
    part_of,
    with_gelu,
)
from rectiflux.benchmarks.time_spent import divide
from rectiflux.flux_core.model.spec import FluxSpec

TINY = FluxSpec(64, 1, 1, 1, context_in=16, vec_in=8, guidance_embed=True)


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("mkldnn::_linear_pointwise", "linear layers"),
        ("aten::addmm", "linear layers"),
        ("aten::mm.out", "linear layers"),
        ("onednn::qlinear_pointwise", "linear layers"),
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
        took = with_gelu(list(time_spent.operations_of(step, Clock(kind))))
    assert {part_of(name) for name, _ in took} | {OVERHEAD} == set(PARTS) - {"other"}
    assert all(seconds >= 0 for _, seconds in took)
    assert sum("scaled_dot_product_flash" in name for name, _ in took) == 2, "one per block"


def test_a_gelu_in_four_operations_is_one() -> None:
    """With an allocation in between; other multiplications and sigmoids keep their names."""
    names = "addcmul.out empty mul_ sigmoid_ mul.out mul sigmoid mul addcmul mul_".split()
    found = with_gelu([(f"aten::{name}", float(i)) for i, name in enumerate(names)])
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


def test_the_fastest_of_several_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sums by name, of the run that took 8 s, not 9 or 10."""
    runs = iter([[("a", 1.0), ("b", 5.0), ("a", 3.0)], [("a", 2.0), ("b", 4.0), ("a", 2.0)], [("b", 10.0)]])
    monkeypatch.setattr(time_spent, "operations_of", lambda run, clock: next(runs))
    settings = Settings(True, 0.0, Clock(), tmp_path)
    assert time_spent.fastest(lambda: None, settings)[1] == {"a": 4.0, "b": 4.0}


def test_floors_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A matmul of 2 FLOP/s and a copy of 4 bytes/s; two images of 4 image and 3 text tokens, fp32."""
    monkeypatch.setattr(time_spent, "matmul_rate", lambda dtype, clock, sides: 2.0)
    copied: list[int] = []
    monkeypatch.setattr(time_spent, "bandwidth", lambda count, clock: copied.append(count) or 4.0)
    model = random_model(TINY, torch.float32, torch.device("cpu"))
    settings = Settings(True, 0.0, Clock(), tmp_path)
    found = time_spent.floors(model, Inputs(model, 32, 3, batch=2), settings)
    flop, moved = floors.step_flop(TINY, 3, 4, 2), floors.step_bytes(TINY, 3, 4, 4)
    assert copied == [2 * 7 * 256 * 4]
    assert found["linear layers"] == flop.linear / 2 and found["attention"] == flop.attention / 2
    assert found["GELU"] == 2 * moved["GELU"] / 4 and found.keys() == {"linear layers", "attention", *moved}


def test_bars_are_as_long_as_the_shares() -> None:
    """Half of the step, the floor half of that: as many dark pixels as light ones."""
    parts = tuple(Part(name, 0.5 if name == "attention" else 0.0, 0.25) for name in PARTS)
    parts = tuple(part if part.seconds else Part(part.name, 0.0, 0.0) for part in parts)
    image = draw_bars([StepTime("case", 1.0, parts)])
    colors = Counter({color: count for count, color in image.getcolors(1 << 20) or []})
    assert colors[FLOOR] == pytest.approx(colors[TIME], rel=0.02) and colors[FLOOR] > 1000


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


def test_invalid_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in ((["--cases", "half"], "'half'"), (["--device", "cuda"], "CUDA")):
        with pytest.raises(SystemExit):
            time_spent.main(arguments)
        assert message in capsys.readouterr().err
