"""Where a step's time goes: operations by part, floors, table and last line by hand; never a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rectiflux.benchmarks import floors, time_spent
from rectiflux.benchmarks.interleaved import Clock
from rectiflux.benchmarks.speed_inputs import Inputs, random_model
from rectiflux.benchmarks.speed_settings import Settings
from rectiflux.benchmarks.step_parts import OVERHEAD, PARTS, Part, Spent, draw_bars, part_of, with_gelu
from rectiflux.benchmarks.time_spent import divided
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
        ("queries_keys_values", "q/k norm and rotary"),
        ("aten::gelu", "GELU"),
        ("aten::addcmul", "gated residuals"),
        ("aten::cat", "copies"),
        ("aten::view", OVERHEAD),
        ("aten::empty", OVERHEAD),
        ("aten::cos", "other"),
    ],
)
def test_which_part_an_operation_belongs_to(operation: str, part: str) -> None:
    assert part_of(operation) == part


@pytest.mark.parametrize("kind", ["wall", "cpu"])
def test_no_operation_of_a_step_is_left_over(kind: str) -> None:
    """Of all that our step does on a CPU, in both dtypes, by the profiler and by our own timing."""
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(TINY, dtype, torch.device("cpu"))
        with torch.no_grad():
            step = Inputs(model, 32, 4).our_step(model)
            for _ in range(2):  # as it is computed, and as it is recorded
                took = with_gelu(list(time_spent.operations_of(step, Clock(kind))))
                assert {part_of(name) for name, _ in took} | {OVERHEAD} == set(PARTS) - {"other"}
                assert all(seconds >= 0 for _, seconds in took)
                assert sum("scaled_dot_product_flash" in name for name, _ in took) == 2, "one a block"
                for _ in range(2):
                    step()


def test_a_gelu_in_four_operations_is_one() -> None:
    """With what allocates between them; a product more, and a sigmoid elsewhere, are what they are."""
    names = [
        "addcmul.out",
        "empty",
        "mul_",
        "sigmoid_",
        "mul.out",
        "mul",
        "sigmoid",
        "mul",
        "addcmul",
        "mul_",
    ]
    told = with_gelu([(f"aten::{name}", float(i)) for i, name in enumerate(names)])
    assert [name for name, _ in told[:5]] == ["aten::gelu", "aten::empty", *["aten::gelu"] * 3]
    assert [name for name, _ in told[5:]] == [f"aten::{name}" for name in names[5:]]
    assert [seconds for _, seconds in told] == list(map(float, range(len(names))))


def test_a_step_is_divided_by_hand() -> None:
    """Of 10 s products take 6, GELU 2, an unknown 1; the last second is overhead, and views with it."""
    took = {"aten::mm": 6.0, "aten::gelu": 2.0, "aten::cos": 1.0, "aten::view": 0.25}
    spent = divided("case", 10.0, took, {"linear layers": 3.0, "GELU": 1.0, "gated residuals": 9.0})
    parts = {part.name: part for part in spent.parts}
    assert tuple(parts) == PARTS and spent.other == ("aten::cos",)
    assert parts["linear layers"] == Part("linear layers", 6.0, 3.0)
    assert parts[OVERHEAD] == Part(OVERHEAD, 1.0, 0.0)
    assert parts["gated residuals"].floor == 0.0, "what takes no time of its own has no floor"
    assert spent.floor_share == 0.4
    doubled = divided("case", 5.0, {"aten::mm": 6.0, "aten::gelu": 4.0}, {})
    assert [part.seconds for part in doubled.parts if part.seconds] == [3.0, 2.0], "scaled to the step"


def test_the_quickest_of_several_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sums by name, of the run that took 8 s, not 9 or 10."""
    runs = iter([[("a", 1.0), ("b", 5.0), ("a", 3.0)], [("a", 2.0), ("b", 4.0), ("a", 2.0)], [("b", 10.0)]])
    monkeypatch.setattr(time_spent, "operations_of", lambda run, clock: next(runs))
    settings = Settings(True, 0.0, Clock(), tmp_path)
    assert time_spent.timed(lambda: None, settings)[1] == {"a": 4.0, "b": 4.0}


def test_floors_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 2 FLOP/s and a copy of 4 bytes/s; two pictures of 4 image and 3 text tokens, fp32."""
    monkeypatch.setattr(time_spent, "matmul_rate", lambda dtype, clock: 2.0)
    asked: list[int] = []
    monkeypatch.setattr(time_spent, "bandwidth", lambda count, clock: asked.append(count) or 4.0)
    model = random_model(TINY, torch.float32, torch.device("cpu"))
    least = time_spent.floors(model, Inputs(model, 32, 3, batch=2), Clock())
    flop, moved = floors.step_flop(TINY, 3, 4, 2), floors.step_bytes(TINY, 3, 4, 4)
    assert asked == [2 * 7 * 256 * 4]
    assert least["linear layers"] == flop.linear / 2 and least["attention"] == flop.attention / 2
    assert least["GELU"] == 2 * moved["GELU"] / 4 and least.keys() == {"linear layers", "attention", *moved}


def test_the_table() -> None:
    spent = Spent(
        "case", 0.010, (Part("linear layers", 0.008, 0.004), Part("copies", 0.002, 0.0)), ("aten::cos",)
    )
    assert spent.lines().splitlines() == [
        "case: a step takes 10.00 ms",
        "part                          ms   share     floor  x floor",
        "linear layers              8.000  80.0 %     4.000     2.00",
        "copies                     2.000  20.0 %         -        -",
        "all                       10.000 100.0 %     4.000     2.50",
        "other: aten::cos",
        "floor_share case 0.400",
    ]


def test_bars_are_as_long_as_the_shares() -> None:
    parts = tuple(Part(name, 0.5 if name == "attention" else 0.0, 0.25) for name in PARTS)
    picture = draw_bars([Spent("case", 1.0, parts)])
    y = 28 + (1 + PARTS.index("attention") + 1) * 26 - 26 + 2
    colours = [picture.getpixel((x, y)) for x in range(218, picture.width)]
    assert colours[:130] == [(38, 70, 140)] * 130, "the floor, a quarter of 520 pixels"
    assert colours[131:260] == [(150, 170, 214)] * 129 and colours[262] == (255, 255, 255)


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(floors.SIDES, "cpu", (64,))
    file, figure, threads = tmp_path / "f.json", tmp_path / "f.png", str(torch.get_num_threads())
    arguments = ["--quick", "--models", str(tmp_path), "--threads", threads, "--clock", "cpu"]
    assert time_spent.main([*arguments, "--json", str(file), "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert "skipped miniature: there is no" in printed and "floor_share full-64 0." in printed
    figures = json.loads(file.read_text())["figures"]
    (case,) = figures["cases"]
    assert sum(part["seconds"] for part in case["parts"]) == pytest.approx(case["seconds"])
    assert printed.splitlines()[-1] == f"floor_share {figures['floor_share']:.3f}"
    with Image.open(figure) as picture:
        assert picture.width > 600
    assert time_spent.main([*arguments, "--cases", "miniature"]) == 1


def test_the_miniature_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(floors.SIDES, "cpu", (64,))
    threads = str(torch.get_num_threads())
    assert time_spent.main(["--quick", "--cases", "miniature", "--threads", threads]) == 0
    assert "miniature-128: a step takes" in capsys.readouterr().out


def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        (["--cases", "half"], "'half' is none of miniature, full"),
        (["--device", "cuda"], "--device cuda needs a CUDA device, got none"),
    ):
        with pytest.raises(SystemExit):
            time_spent.main(arguments)
        assert message in capsys.readouterr().err
