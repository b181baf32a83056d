"""`bench full-size` with a tiny model: files of each format, child processes, a full disk, memory peaks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rectiflux.benchmarks import footprint, full_size, random_file
from rectiflux.flux_core.model.spec import FLUX_DEV
from rectiflux.flux_core.quant.linear import QuantizedLinear
from rectiflux.flux_core.weights import describe, load_transformer


@pytest.mark.parametrize("name", random_file.FORMATS)
def test_a_random_file_is_a_model_in_its_format(tmp_path: Path, name: str) -> None:
    progress: list[tuple[int, int]] = []
    path = tmp_path / f"random{random_file.ENDINGS[name]}"
    random_file.FORMATS[name](path, full_size.SMALL, lambda done, total: progress.append((done, total)))
    assert progress[-1][0] == progress[-1][1] and progress == sorted(progress)
    assert path.stat().st_size == pytest.approx(random_file.estimated_bytes(name, full_size.SMALL), rel=0.05)
    assert {"bf16": "bf16", "fp8": "fp8 e4m3fn", "Q4_K": "Q4_K"}[name] in describe(path)
    weights = []
    for block in load_transformer(path).double_blocks:
        layer = block.img_mlp[0]  # type: ignore[index]
        assert isinstance(layer, QuantizedLinear) == (name != "bf16")
        is_quantized = isinstance(layer, QuantizedLinear)
        weights.append(layer.dense_weight(torch.float32) if is_quantized else layer.weight.float())
    assert float(weights[0].std()) == pytest.approx(random_file.STD, rel=0.3)
    assert not torch.equal(*weights)


def test_full_size_is_flux_dev() -> None:
    count = sum(shape.numel() for shape in random_file.shapes_of(FLUX_DEV).values())
    assert random_file.SPEC == FLUX_DEV and count == 11_901_408_320


@pytest.mark.slow
def test_each_format_is_measured_in_its_own_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "figures.json"
    argv = ["--quick", "--sides", "64", "--threads", "1", "--limit", "1 GB", "--dir", str(tmp_path)]
    assert full_size.main([*argv, "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["figures"]["rows"]
    assert [row["format"] for row in rows] == ["bf16", "fp8", "Q4_K"]
    for row in rows:
        assert row["limit"] == "1 GB" and row["streamed"] == 0
        assert min(row["load"], row["prepare_64"], row["first_64"], row["second_64"]) > 0
        assert row["anonymous"] > row["loaded_anonymous"]
    most = max(row["anonymous"] for row in rows) / 1e9
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"most_own_gb {most:.2f} most_swapped_gb ")
    assert list(tmp_path.iterdir()) == [report], "the random files are deleted"


def test_a_full_disk_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    assert full_size.main(["--dir", str(tmp_path), "--formats", "bf16"]) == 1
    error = capsys.readouterr().err
    assert "24 GB" in error and "1 GB" in error and not list(tmp_path.iterdir())


def test_a_killed_process_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(returncode=-9))
    assert full_size.main(["--quick", "--dir", str(tmp_path), "--formats", "bf16"]) == 1
    assert "killed (exit code -9)" in capsys.readouterr().err


def test_velocities_that_are_not_finite_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "random.safetensors"
    monkeypatch.setattr(random_file, "STD", 1e30)  # finite in bfloat16, the matmuls overflow
    random_file.FORMATS["bf16"](path, full_size.SMALL, lambda done, total: None)
    with pytest.raises(ValueError, match="not finite at 64 x 64"):
        footprint.measure(path, [64], "none", torch.device("cpu"))
