"""`bench speed`: ratios on a fake clock, every case in quick mode, the record, skipped cases; no time."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks import interleaved, speed, speed_blocks, speed_models, speed_threads
from rectiflux.benchmarks.interleaved import Clock, Effort, Ratio, compare
from rectiflux.benchmarks.speed_settings import NO_BFLOAT16, TIME_IS_UP, Note, Settings, Skipped
from rectiflux.flux_core.model.autoencoder import AutoEncoder, AutoEncoderSpec

RATIO = re.compile(r"^ratio (\S+) (\d+\.\d{3})$", re.MULTILINE)


def test_a_ratio_is_a_median_over_interleaved_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours takes 1 s, theirs 2, then 3, then 4 s a run in three turns: ratios 2, 3, 4."""
    now, order = [0.0], list[str]()
    seconds = iter([9.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0])

    def ours() -> None:
        order.append("ours")
        now[0] += 1.0

    def theirs() -> None:
        order.append("theirs")
        now[0] += next(seconds)

    monkeypatch.setitem(interleaved.CLOCKS, "wall", lambda: now[0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    ratio = compare("case", ours, theirs, Clock(), Effort(6.0 + 8.0 + 1.0), "a note")
    assert order == ["ours", "theirs"] + 3 * ["ours", "theirs", "theirs", "ours"]
    assert ratio == Ratio("case", 3.0, 2.0, 4.0, 3, 1.0, 3.0, "a note")
    assert ratio.lines().splitlines()[-1] == "ratio case 3.000"


def run_quick(cases: str, folder: Path, *options: str) -> dict:
    """The values that --json writes, with as many threads as the tests use."""
    file, threads = folder / "figures.json", str(torch.get_num_threads())
    arguments = ["--quick", "--cases", cases, "--json", str(file), "--threads", threads, *options]
    assert speed.main(arguments) == 0
    return json.loads(file.read_text())["figures"]


def test_the_cases_that_need_no_models(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    cases = "miniature,full,int8,vae,pictures,png,memory,gpu"
    figures = run_quick(cases, tmp_path, "--models", str(tmp_path))
    printed = capsys.readouterr().out
    names = [row["case"] for row in figures["ratios"]]
    assert [name for name, _ in RATIO.findall(printed)] == names
    expected = ["full-bf16-64", "full-int8-64", "full-fp32-64", "vae-decode-64", "vae-encode-64"]
    expected += ["vae-decode-bf16-64-fp32", "vae-decode-bf16-64"]
    assert {name for name in names if not name.startswith("memory-")} == {*expected}
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in figures["ratios"])
    skipped = {one["case"]: one["reason"] for one in figures["skipped"]}
    assert "COMFYUI_PATH" in skipped["full-bf16-64-comfyui"] and "--large" in skipped["memory-decode-2048"]
    for case in ("miniature", "whole-picture", "first-picture", "load", "text-encode", "png"):
        assert "rectiflux-mini" in skipped[case]
    notes = "\n".join(figures["notes"])
    same = re.search(r"full-fp32-64: largest difference (\S+) of", notes)
    assert same is not None and float(same[1]) < 1e-5, "both sides compute the same"
    error = re.search(r"error random weights: int8 (\S+), bf16", notes)
    assert error is not None and 0.005 < float(error[1]) < 0.02


def test_the_miniature_and_its_images(tmp_path: Path) -> None:
    figures = run_quick("miniature,pictures", tmp_path)
    names = [row["case"] for row in figures["ratios"] if not row["case"].endswith("-comfyui")]
    assert names == ["miniature", "text-encode", "whole-picture", "load", "first-picture"]
    differences = re.findall(r"largest difference (\S+) of", "\n".join(figures["notes"]))
    assert len(differences) == 2 and max(map(float, differences)) < 1e-4


def test_the_error_of_fp8(tmp_path: Path) -> None:
    """More layers in fp8 have a larger error, and the chosen ones less than all blocks."""
    notes = "\n".join(run_quick("fp8", tmp_path)["notes"])
    errors = {kind: float(error) for kind, error in re.findall(r"^fp8: (.*?) (0\.\d+)", notes, re.MULTILINE)}
    least, chosen = errors["error of bf16 without fp8"], errors["layers chosen by quantize_to_fp8"]
    assert 0.002 < least == min(errors.values())
    assert least < chosen < errors["all blocks in fp8"] < errors["every layer in fp8"] < 0.1


def test_a_record_is_appended(tmp_path: Path) -> None:
    settings = Settings(False, 1.0, Clock("cpu"), tmp_path)
    ratio = Ratio("vae", 1.5, 1.25, 2.0, 4, 0.5, 0.75, "eager")
    results = speed.Results([ratio], [Skipped("load", "no files")], ["packing took 0"])
    section = speed.section(results, settings, datetime.date(2026, 1, 2))
    assert section.startswith("## 2026-01-02, ") and "cpu clock" in section
    for text in ("| vae | 1.50 |", "500.0 ms", "packing took 0", "skipped load: no files"):
        assert text in section
    file = tmp_path / "RESULTS.md"
    for _ in range(2):
        speed.record(section, file)
    text = file.read_text()
    assert text.startswith("# Results of `bench speed`") and text.count(section.rstrip()) == 2


def test_no_comparison_begins_after_the_limit(tmp_path: Path) -> None:
    settings = Settings(True, 0.0, Clock(), tmp_path, end=0.0)
    results = speed.measure(["full", "threads"], settings)
    assert results.ratios == [] and results.skipped == [Skipped(n, TIME_IS_UP) for n in ("full", "threads")]
    inside = [one for one in speed_blocks.full_width(settings) if not isinstance(one, Note)]
    assert {one.case for one in inside} == {"full-bf16-64", "full-int8", "full-fp32-64"}
    assert {one.reason for one in inside if isinstance(one, Skipped)} == {TIME_IS_UP}


def test_bfloat16_is_skipped_where_it_is_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The full width is then measured in fp32 alone, int8 against diffusers in fp32."""
    for module in (speed_models, speed_blocks):
        monkeypatch.setattr(module, "supports_bfloat16", lambda device: False)
    monkeypatch.setattr(speed_blocks, "FULL", speed_blocks.QUICK)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    settings = Settings(False, 0.0, Clock(), tmp_path)
    model = AutoEncoder(AutoEncoderSpec(ch=8, ch_mult=(1, 1), num_res_blocks=1))
    skipped = list(speed_models.in_bfloat16(model, None, torch.zeros(1, 16, 32, 32), settings))
    assert skipped == [Skipped("vae-decode-bf16-256", NO_BFLOAT16)]
    outcomes = list(speed_blocks.full_width(settings))
    assert outcomes[0] == Skipped("full-bf16", NO_BFLOAT16)
    ratios = [one for one in outcomes if isinstance(one, Ratio)]
    assert [ratio.case for ratio in ratios] == [f"full-{f}-{s}" for f in ("fp32", "int8") for s in (256, 512)]
    assert {ratio.note for ratio in ratios if "int8" in ratio.case} == {"theirs in fp32"}


def test_every_default_case_exists() -> None:
    """A card begins with the full size; a CPU has no such case."""
    assert speed.BY_DEFAULT["cuda"][0] == "gpu" and "gpu" not in speed.BY_DEFAULT["cpu"]
    assert "threads" in speed.BY_DEFAULT["cpu"]
    assert all(name in speed.CASES for names in speed.BY_DEFAULT.values() for name in names)


@pytest.mark.slow
def test_both_ways_of_waiting_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle and beside a busy process; the children get their policy from the case, not from here."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    settings = Settings(True, 0.0, Clock(), speed.ROOT / "models")
    outcomes = list(speed_threads.threads(settings, count=2))
    names = [f"threads-{workload}-{load}" for workload in ("demo", "blocks") for load in ("idle", "busy")]
    assert [one.case for one in outcomes if isinstance(one, Ratio)] == names
    notes = [one.text for one in outcomes if isinstance(one, Note)]
    assert len(notes) == 2 and all("between the policies 0.0e+00" in note for note in notes)


def test_threads_without_models_or_with_one_thread(tmp_path: Path) -> None:
    settings = Settings(True, 0.0, Clock(), tmp_path, end=float("inf"))
    first = next(speed_threads.threads(settings, count=2))
    assert isinstance(first, Skipped) and first.case == "threads-demo" and str(tmp_path) in first.reason
    (skipped,) = speed_threads.threads(settings, count=1)
    assert isinstance(skipped, Skipped) and "--threads" in skipped.reason


def test_busy_processes_end_with_the_block() -> None:
    with speed_threads.busy_cores(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.returncode is not None for process in processes)
