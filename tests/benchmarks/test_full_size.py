"""bench full-size in little: files of each format that load, figures of a process of its own, and no room."""

from __future__ import annotations

import json
import mmap
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rectiflux.benchmarks import footprint, full_size, random_file
from rectiflux.flux_core.model.spec import FLUX_DEV
from rectiflux.flux_core.quant.linear import QuantizedLinear
from rectiflux.flux_core.weights import describe, load_transformer


@pytest.mark.parametrize("form", random_file.FORMATS)
def test_a_random_file_is_a_model_of_its_format(tmp_path: Path, form: str) -> None:
    told: list[tuple[int, int]] = []
    path = tmp_path / f"random{random_file.ENDINGS[form]}"
    random_file.FORMATS[form](path, full_size.SMALL, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] and [done for done, _ in told] == sorted(done for done, _ in told)
    assert path.stat().st_size == pytest.approx(random_file.bytes_of(form, full_size.SMALL), rel=0.05)
    assert {"bf16": "bf16", "fp8": "fp8 e4m3fn", "Q4_K": "Q4_K"}[form] in describe(path)
    model = load_transformer(path)
    layer = model.double_blocks[0].img_mlp[0]  # type: ignore[index]
    assert isinstance(layer, QuantizedLinear) == (form != "bf16")
    weight = layer.dense_weight(torch.float32) if isinstance(layer, QuantizedLinear) else layer.weight.float()
    assert float(weight.std()) == pytest.approx(random_file.STD, rel=0.3)
    other = model.double_blocks[1].img_mlp[0]  # type: ignore[index]
    second = other.dense_weight(torch.float32) if isinstance(other, QuantizedLinear) else other.weight.float()
    assert not torch.equal(weight, second)


def test_full_size_is_flux_dev() -> None:
    count = sum(shape.numel() for shape in random_file.shapes_of(FLUX_DEV).values())
    assert random_file.SPEC == FLUX_DEV and count == 11_901_408_320


@pytest.mark.slow
def test_each_format_is_measured_by_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "figures.json"
    argv = ["--quick", "--sides", "64", "--threads", "1", "--limit", "1 GB", "--dir", str(tmp_path)]
    assert full_size.main([*argv, "--json", str(report)]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in (head, *lines)}) == 1, "columns stand below each other"
    figures = json.loads(report.read_text())["figures"]
    rows = figures["rows"]
    assert [row["format"] for row in rows] == ["bf16", "fp8", "Q4_K"]
    for row in rows:
        assert row["limit"] == "1 GB" and row["streamed"] == 0
        assert min(row["load"], row["prepare_64"], row["first_64"], row["second_64"]) > 0
        assert row["anonymous"] > row["loaded_anonymous"]
    most = max(row["anonymous"] for row in rows) / 1e9
    assert last == f"most_own_gb {most:.2f} most_swapped_gb {figures['headline']['most_swapped_gb']:.2f}"
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"], "nothing else is left behind"


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    assert full_size.main(["--dir", str(tmp_path), "--formats", "bf16"]) == 1
    told = capsys.readouterr().err
    assert "bf16 needs 24 GB of disk" in told and "has 1 GB; choose another --dir or fewer --formats" in told


def test_a_process_that_was_killed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(full_size.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-9))
    assert full_size.main(["--quick", "--dir", str(tmp_path), "--formats", "bf16"]) == 1
    assert "measured random.safetensors was killed (exit code -9)" in capsys.readouterr().err


def test_a_model_that_gives_no_numbers_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "random.safetensors"
    monkeypatch.setattr(random_file, "STD", float("inf"))
    random_file.FORMATS["bf16"](path, full_size.SMALL, lambda done, total: None)
    with pytest.raises(ValueError, match="velocities that are not finite at 64 x 64"):
        footprint.measure(path, [64], "none", torch.device("cpu"))


def test_the_most_of_each_kind_is_kept() -> None:
    if not footprint.STATUS.exists():
        pytest.skip("this system does not tell what a process holds")
    before = footprint.held()
    with footprint.Watch() as watch:
        # new pages for certain: what torch allocates may be memory that an earlier test gave back to malloc
        ballast = mmap.mmap(-1, 1 << 26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(1 << 6):
            ballast.write(bytes(1 << 20))
        for _ in range(100):  # a busy machine lets the watcher wait
            footprint.time.sleep(0.1)
            if watch.most.anonymous >= before.anonymous + (1 << 25):
                break
        ballast.close()
    assert watch.most.anonymous >= before.anonymous + (1 << 25)
    assert before.mapped > 0
