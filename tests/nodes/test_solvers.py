"""The solver nodes, and the report that FLUX Sampler gives of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import rectiflux
import torch
from rectiflux.flux_core.pipeline import Models, text_to_image
from rectiflux.flux_core.sampling.solver import SOLVERS, DormandPrince, EulerAncestral, Report
from rectiflux.host.files import Folders
from rectiflux.nodes.run_report import Stopwatch, report_text
from rectiflux.nodes.solver import ODESolver

from . import graphs
from .test_nodes import FILES, call


def run(solver: graphs.Prompt, **settings: Any) -> tuple[torch.Tensor, str]:
    """(samples, report) of FLUX Sampler with a solver node."""
    prompt = graphs.text_to_image(FILES, **settings) | {"solver": solver}
    latent, report = graphs.run(prompt, "sample")
    return latent["samples"], report


def test_the_menu_only_grows_at_its_end() -> None:
    """Saved workflows hold the names; a list that begins with euler also has it as the default."""
    names, options = ODESolver.INPUT_TYPES()["required"]["solver"]
    assert names[:4] == ["euler", "heun", "midpoint", "rk4"] and options["default"] == "euler"
    assert names[4:] == ["heun_corrected", "ab2", "ab3", "dormand_prince", "euler_ancestral"]


def test_the_help_page_lists_each_order() -> None:
    """Order and model calls per step, as the solvers have them."""
    page = Path(rectiflux.__file__).parent / "web" / "docs" / ODESolver.NODE_ID / "en.md"
    rows = re.findall(r"^\| (\w+) \| (\d) \| (\d)", page.read_text(encoding="utf-8"), re.M)
    listed = {name: (int(order), int(calls)) for name, order, calls in rows}
    sigmas = [1 - i / 10 for i in range(10)] + [0.0]
    for name, solver in SOLVERS.items():
        evaluated = solver.evaluation_sigmas(sigmas)
        calls = 6 if evaluated is None else round(len(evaluated) / 10)
        assert listed[name] == (solver.order, calls), name


def test_nodes_make_solvers_with_their_settings() -> None:
    assert call("RectifluxAdaptiveSolver", rtol=0.1, atol=0.2, max_evaluations=50) == DormandPrince(
        rtol=0.1, atol=0.2, max_evaluations=50
    )
    assert call("RectifluxStochasticSolver", eta=0.25) == EulerAncestral(eta=0.25)


@pytest.mark.parametrize("solver", SOLVERS)
def test_nodes_and_library_give_the_same_image(embedded: Folders, solver: str) -> None:
    """Also the noise that a stochastic solver adds comes from the same seed."""
    done: dict[str, Any] = {}
    image = graphs.run(graphs.text_to_image(FILES, solver=solver, seed=3), "decode", done)[0]
    models = Models(done["clip"][0], done["model"][0].network, done["vae"][0])
    settings = {"seed": 3, "steps": 4, "cfg_scale": 3.0, "width": 64, "height": 48, "solver": solver}
    expected = text_to_image(models, "a red circle on white", **settings)
    torch.testing.assert_close(image, (expected.permute(0, 2, 3, 1) + 1) / 2, atol=2e-5, rtol=0)


def test_the_amount_of_noise(embedded: Folders) -> None:
    """0 is euler, bit for bit; 0.5 and 1 differ from it and from each other; a seed repeats itself."""
    euler, _ = run(graphs.node("RectifluxSolver", solver="euler"))
    ends = [run(graphs.node("RectifluxStochasticSolver", eta=eta))[0] for eta in (0.0, 0.5, 1.0, 1.0)]
    assert torch.equal(ends[0], euler) and torch.equal(ends[2], ends[3])
    assert not torch.allclose(ends[1], euler, atol=1e-2)
    assert not torch.allclose(ends[2], ends[1], atol=1e-2)
    other, _ = run(graphs.node("RectifluxStochasticSolver", eta=1.0), seed=8)
    assert not torch.allclose(other, ends[2], atol=1e-2)


def lines_of(report: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in report.splitlines())


def test_the_report_of_a_run(embedded: Folders) -> None:
    """4 steps of Heun's are 8 evaluations; the adaptive solver also estimates its error."""
    lines = lines_of(run(graphs.node("RectifluxSolver", solver="heun"))[1])
    assert (lines["solver"], lines["steps"], lines["evaluations of the model"]) == ("heun", "4", "8")
    assert lines["estimated error"] == "unknown" and lines["attention"]
    assert float(lines["straightness of the path"].split()[0]) > 0
    assert float(lines["seconds in total"]) >= 0
    settings = {"rtol": 0.2, "atol": 0.2, "max_evaluations": 2000}
    lines = lines_of(run(graphs.node("RectifluxAdaptiveSolver", **settings))[1])
    assert lines["solver"] == "dormand_prince" and float(lines["estimated error"].split()[0]) > 0


def test_the_report_in_words() -> None:
    report = Report("dormand_prince", 63, 10, 3, 0.0123, 0.25)
    lines = lines_of(report_text(report, [0.1, 0.3, 0.2], cached=(4, 63), attention="cuDNN"))
    assert lines["steps"] == "10 accepted, 3 rejected" and lines["attention"] == "cuDNN"
    assert lines["skipped by the step cache"] == "4 of 63 passes"
    assert lines["seconds per step"] == "0.200 (0.100 to 0.300)" and lines["seconds in total"] == "0.60"
    plain = lines_of(report_text(Report("euler_ancestral", 4, 4, 0, None, None), []))
    assert plain["steps"] == "4" and plain["straightness of the path"] == "unknown"
    assert not {"attention", "skipped by the step cache", "seconds per step"} & plain.keys()


def test_the_stopwatch_leaves_out_the_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 and 3 seconds, with previews of 10 seconds after each."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    heard = []

    def preview(step: int) -> None:
        nonlocal now
        heard.append(step)
        now += 10

    watch = Stopwatch(preview)
    for step, seconds in enumerate((2, 3)):
        now += seconds
        watch(step)
    assert watch.seconds == [2.0, 3.0] and heard == [0, 1]
