"""`bench speed`: turns and ratios by hand, the form of what it prints and records; never a time."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks import interleaved, speed, speed_blocks, speed_models
from rectiflux.benchmarks.interleaved import Clock, Ratio, compare
from rectiflux.benchmarks.speed_settings import Settings, Skipped
from rectiflux.flux_core.model.autoencoder import AutoEncoder, AutoEncoderSpec

RATIO = re.compile(r"^ratio (\S+) (\d+\.\d{3})$", re.MULTILINE)


def test_a_ratio_is_a_median_over_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours takes 1, theirs 2, then 3, then 4 a run in three turns: ratios 2, 3, 4."""
    now, order = [0.0], list[str]()
    theirs_takes = iter([9.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0])

    def ours() -> None:
        order.append("ours")
        now[0] += 1.0

    def theirs() -> None:
        order.append("theirs")
        now[0] += next(theirs_takes)

    monkeypatch.setitem(interleaved.CLOCKS, "wall", lambda: now[0])
    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: now[0])
    ratio = compare("case", ours, theirs, Clock(), 6.0 + 8.0 + 1.0, "a note")
    assert order == ["ours", "theirs"] + 3 * ["ours", "theirs", "theirs", "ours"]
    assert ratio == Ratio("case", 3.0, 2.0, 4.0, 3, 1.0, 3.0, "a note")
    assert ratio.lines().splitlines() == [
        "case: ours    1000.00 ms, theirs    3000.00 ms (2.00 to 4.00, 3 turns; a note)",
        "ratio case 3.000",
    ]


def test_two_turns_at_the_least() -> None:
    assert compare("case", lambda: None, lambda: None, Clock("cpu"), 0.0).turns == 2


def test_quick(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that needs no miniature, and what is skipped without it; every figure in the file."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    file, threads = tmp_path / "figures.json", str(torch.get_num_threads())
    arguments = ["--quick", "--models", str(tmp_path), "--json", str(file), "--threads", threads]
    assert speed.main(arguments) == 0
    printed = capsys.readouterr().out
    expected = ["full-bf16-64", "full-int8-64", "full-fp32-64", "vae-decode-64", "vae-encode-64"]
    expected += ["vae-decode-bf16-64-fp32", "vae-decode-bf16-64"]
    named = [name for name, _ in RATIO.findall(printed)]
    assert named[: len(expected)] == expected and all("memory" in name for name in named[len(expected) :])
    figures = json.loads(file.read_text())["figures"]
    assert [row["case"] for row in figures["ratios"]] == named
    for row in figures["ratios"]:
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["turns"] == 2 if row["unit"] == "ms" else "above the weights" in row["note"]
    skipped = {one["case"]: one["why"] for one in figures["skipped"]}
    assert skipped["full-bf16-64-comfyui"] == "COMFYUI_PATH names no ComfyUI checkout"
    for case in ("miniature", "whole-picture", "first-picture", "load", "text-encode", "png"):
        assert "there is no" in skipped[case] and f"skipped {case}: there is no" in printed
    same = re.search(r"full-fp32-64: largest difference (\S+) of", printed)
    assert same is not None and float(same[1]) < 1e-5, "both sides compute the same"
    assert skipped["memory-decode-2048"] == "minutes on a CPU; --large measures it"
    lost = re.search(r"error random weights: int8 (\S+), bf16", printed)
    assert lost is not None and 0.005 < float(lost[1]) < 0.02


def test_the_miniature_and_its_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    assert speed.main(["--quick", "--cases", "miniature,pictures", "--threads", threads]) == 0
    printed = capsys.readouterr().out
    names = [name for name, _ in RATIO.findall(printed) if not name.endswith("-comfyui")]
    assert names == ["miniature", "text-encode", "whole-picture", "load", "first-picture"]
    same = re.search(r"whole-picture: largest difference (\S+) of 1", printed)
    assert same is not None and float(same[1]) < 1e-4


def test_what_fp8_loses(capsys: pytest.CaptureFixture[str]) -> None:
    """More in fp8 errs more; the first layer alone, which is kept in bf16, as much as all that is not."""
    assert speed.main(["--quick", "--cases", "fp8"]) == 0
    lines = re.findall(r"^fp8: (\D.*?) (0\.\d+)( of .*)?$", capsys.readouterr().out, re.MULTILINE)
    errors = {kind: float(error) for kind, error, _ in lines}
    assert len(errors) == 1 + 9 + 5 + 2 + 1
    least, chosen = errors["bf16 throughout errs by"], errors["what quantize_to_fp8 chooses"]
    assert 0.002 < least == min(errors.values())
    assert least < chosen < errors["all blocks in fp8"] < errors["every layer in fp8"] < 0.1
    assert errors["img_in in fp8"] > 0.8 * chosen


def test_a_record_is_appended(tmp_path: Path) -> None:
    settings = Settings(False, 1.0, Clock("cpu"), tmp_path)
    ratio, gap = Ratio("vae", 1.5, 1.25, 2.0, 4, 0.5, 0.75, "eager"), Skipped("load", "no files")
    section = speed.entry([ratio], [gap], ["packing took 0"], settings, datetime.date(2026, 1, 2))
    assert section.startswith("## 2026-01-02, ") and "diffusers" in section and "cpu clock" in section
    assert "| vae | 1.50 | 1.25 to 2.00 | 4 | 500.0 ms | 750.0 ms | eager |" in section
    assert section.endswith("\n- packing took 0\n\n- skipped load: no files\n")
    file = tmp_path / "RESULTS.md"
    speed.record(section, file)
    speed.record(section, file)
    text = file.read_text()
    assert text.startswith("# Results of `bench speed`") and text.count(section.rstrip()) == 2


def test_no_case_begins_after_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def never(settings: Settings) -> Iterator[Ratio]:
        raise RuntimeError("a case ran")

    settings = Settings(True, 0.0, Clock(), tmp_path, end=0.0)
    inside = [one for one in speed.CASES["full"](settings) if isinstance(one, Skipped)]
    names = ["full-bf16-64", "full-int8", "full-fp32-64"]
    assert inside == [Skipped(name, "the time is over") for name in names]
    monkeypatch.setitem(speed.CASES, "full", never)
    _, skipped, _ = speed.measured(["full"], settings)
    assert skipped == [Skipped("full", "the time is over")]
    assert "skipped full" in capsys.readouterr().out


def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        (["--cases", "full,half"], "'half' is none of miniature, full, int8, vae, pictures, png, memory,"),
        (["--device", "cuda"], "--device cuda needs a CUDA device, got none"),
    ):
        with pytest.raises(SystemExit):
            speed.main(arguments)
        assert message in capsys.readouterr().err


def test_bfloat16_is_skipped_where_it_is_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed_models, "knows_bfloat16", lambda device: False)
    model = AutoEncoder(AutoEncoderSpec(ch=8, ch_mult=(1, 1), num_res_blocks=1))
    settings = Settings(False, 0.0, Clock(), tmp_path)
    (gap,) = speed_models.in_bfloat16(model, None, torch.zeros(1, 16, 32, 32), settings)
    assert isinstance(gap, Skipped) and gap.case == "vae-decode-bf16-256"
    assert gap.why.startswith("this processor has no instructions for bfloat16")


def test_without_bfloat16_the_full_width_is_measured_in_fp32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """int8 against diffusers in fp32 then; a step of 512 px in emulated bf16 takes minutes."""
    monkeypatch.setattr(speed_blocks, "knows_bfloat16", lambda device: False)
    monkeypatch.setattr(speed_blocks, "FULL", speed_blocks.QUICK)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    outcomes = list(speed_blocks.full_width(Settings(False, 0.0, Clock(), tmp_path)))
    assert outcomes[0] == Skipped("full-bf16", speed_blocks.NO_BFLOAT16)
    ratios = [one for one in outcomes if isinstance(one, Ratio)]
    assert [ratio.case for ratio in ratios] == [f"full-{f}-{s}" for f in ("fp32", "int8") for s in (256, 512)]
    assert {ratio.note for ratio in ratios if "int8" in ratio.case} == {"theirs in fp32"}


def test_a_card_begins_with_the_full_size() -> None:
    assert speed.BY_DEFAULT["cuda"][0] == "gpu" and "gpu" not in speed.BY_DEFAULT["cpu"]
    assert all(name in speed.CASES for names in speed.BY_DEFAULT.values() for name in names)
