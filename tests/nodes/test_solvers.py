"""The solver nodes, and the report that FLUX Sampler gives of a run."""

from __future__ import annotations

import re
from typing import Any

import pytest
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


def test_the_menus_tooltip_tells_each_order() -> None:
    """Order and model calls a step, as the solvers have them."""
    tooltip = ODESolver.INPUT_TYPES()["required"]["solver"][1]["tooltip"]
    sigmas = [1 - i / 10 for i in range(10)] + [0.0]
    found = re.findall(r"([a-z]\w*(?:, [a-z]\w*)*): (\d), (\d)", tooltip)
    told = {name: pair for names, *pair in found for name in names.split(", ")}
    for name, solver in SOLVERS.items():
        asked = solver.evaluation_sigmas(sigmas)
        calls = 6 if asked is None else round(len(asked) / 10)
        assert told[name] == [str(solver.order), str(calls)], name


def test_nodes_make_solvers_with_their_settings() -> None:
    assert call("RectifluxAdaptiveSolver", rtol=0.1, atol=0.2, max_evaluations=50) == DormandPrince(
        rtol=0.1, atol=0.2, max_evaluations=50
    )
    assert call("RectifluxStochasticSolver", eta=0.25) == EulerAncestral(eta=0.25)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_nodes_paint_what_the_library_paints(embedded: Folders, solver: str) -> None:
    """Also the noise on the way comes from the same seed."""
    done: dict[str, Any] = {}
    image = graphs.run(graphs.text_to_image(FILES, solver=solver, seed=3), "decode", done)[0]
    models = Models(done["clip"][0], done["model"][0].network, done["vae"][0])
    asked = {"seed": 3, "steps": 4, "cfg_scale": 3.0, "width": 64, "height": 48, "solver": solver}
    expected = text_to_image(models, "a red circle on white", **asked)
    torch.testing.assert_close(image, (expected.permute(0, 2, 3, 1) + 1) / 2, atol=2e-5, rtol=0)


def test_the_amount_of_noise(embedded: Folders) -> None:
    """None is euler, bit for bit; some and much are neither euler nor each other; a seed repeats itself."""
    euler, _ = run(graphs.node("RectifluxSolver", solver="euler"))
    ends = [run(graphs.node("RectifluxStochasticSolver", eta=eta))[0] for eta in (0.0, 0.5, 1.0, 1.0)]
    assert torch.equal(ends[0], euler) and torch.equal(ends[2], ends[3])
    assert not torch.allclose(ends[1], euler, atol=1e-2)
    assert not torch.allclose(ends[2], ends[1], atol=1e-2)
    other, _ = run(graphs.node("RectifluxStochasticSolver", eta=1.0), seed=8)
    assert not torch.allclose(other, ends[2], atol=1e-2)


def test_the_report_of_a_run(embedded: Folders) -> None:
    """4 steps of Heun's are 8 evaluations; the adaptive solver also estimates its error."""
    _, report = run(graphs.node("RectifluxSolver", solver="heun"))
    lines = dict(line.split(": ", 1) for line in report.splitlines())
    assert list(lines) == [
        "solver",
        "steps",
        "evaluations of the model",
        "estimated error",
        "straightness of the path",
        "attention",
        "seconds a step",
        "seconds in all",
    ]
    assert (lines["solver"], lines["steps"], lines["evaluations of the model"]) == ("heun", "4", "8")
    assert lines["estimated error"] == "unknown" and lines["attention"] == "torch"
    assert re.fullmatch(r"\d+\.\d{4} in these steps \(0: straight\)", lines["straightness of the path"])
    settings = {"rtol": 0.2, "atol": 0.2, "max_evaluations": 2000}
    _, report = run(graphs.node("RectifluxAdaptiveSolver", **settings))
    assert report.startswith("solver: dormand_prince\n")
    assert re.search(
        r"^estimated error: \d.* \(root mean square; the latent's values are about 1\)$", report, re.M
    )


def test_the_report_in_words() -> None:
    report = Report("dormand_prince", 63, 10, 3, 0.0123, 0.25)
    assert report_text(report, [0.1, 0.3, 0.2]) == (
        "solver: dormand_prince\n"
        "steps: 10 taken, 3 tried in vain\n"
        "evaluations of the model: 63\n"
        "estimated error: 0.012 (root mean square; the latent's values are about 1)\n"
        "straightness of the path: 0.2500 in these steps (0: straight)\n"
        "seconds a step: 0.200 (0.100 to 0.300)\n"
        "seconds in all: 0.60"
    )
    plain = Report("euler_ancestral", 4, 4, 0, None, None)
    assert report_text(plain, [], None, "cuDNN through torch").endswith(
        "unknown\nattention: cuDNN through torch"
    )
    assert report_text(plain, []) == (
        "solver: euler_ancestral\n"
        "steps: 4\n"
        "evaluations of the model: 4\n"
        "estimated error: unknown\n"
        "straightness of the path: unknown"
    )


def test_the_watch_leaves_out_what_the_callback_takes(monkeypatch: pytest.MonkeyPatch) -> None:
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
