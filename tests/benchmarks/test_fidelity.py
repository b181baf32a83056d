"""bench fidelity in little: the form of its table, and that a wrong model does not look like a right one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks import fidelity
from rectiflux.benchmarks.fidelity import Row, extremes, psnr
from rectiflux.benchmarks.reference.file_formats import FORMATS
from rectiflux.flux_core.quant.gguf import BLOCK_TYPES
from rectiflux.flux_core.weights import diffusers as names

LAST = r"worst_relative_error (\d\.\de-\d\d) lowest_psnr (\d+\.\d)"


def rows_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: Sequence[str]) -> list[dict]:
    monkeypatch.setattr(fidelity, "QUICK", formats)
    report = tmp_path / "fidelity.json"
    assert fidelity.main(["--quick", "--threads", "1", "--json", str(report)]) == 0
    return json.loads(report.read_text())["figures"]["rows"]


def test_the_table_has_a_row_for_each_model_in_each_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(tmp_path, monkeypatch, ("diffusers folder, shards", "NF4", "GGUF Q4_K"))
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in (head, *lines)}) == 1, "columns stand below each other"
    assert [re.split(r"  +", line)[0] for line in lines] == [row["component"] for row in rows]
    every = ["transformer", "VAE encode", "VAE decode", "T5", "CLIP", "whole picture"]
    coded, gguf = [every[0], *every[3:]], [every[0], every[3], every[5]]
    assert [row["component"] for row in rows] == [*every, *coded, *coded, *gguf, *gguf]
    assert [row["dtype"] for row in rows] == ["fp32"] * 10 + ["bf16"] * 4 + ["fp32"] * 3 + ["bf16"] * 3
    for row in rows:
        assert row["exact"] == (row["format"] == "diffusers folder, shards")
        assert (row["psnr"] is None) == (row["component"] != "whole picture")
        assert (row["reference_error"] is None) == (row["dtype"] == "fp32")
        assert row["dequantised"] == (None if row["exact"] or row["psnr"] else 0)
        assert row["relative_error"] < (1e-5 if row["dtype"] == "fp32" else 0.1)
        assert row["psnr"] is None or row["psnr"] > (100 if row["dtype"] == "fp32" else 40)
    told = re.fullmatch(LAST, last)
    exact = [row for row in rows if row["exact"]]
    assert told and float(told[1]) == pytest.approx(max(row["relative_error"] for row in exact), rel=0.05)
    assert float(told[2]) == pytest.approx(exact[-1]["psnr"], abs=0.051)


def test_a_wrong_model_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers' last modulation holds (scale, shift); leaving it so makes two rows wrong."""
    monkeypatch.setattr(names, "_swapped", lambda tensor, name, file: tensor)
    rows = rows_of(tmp_path, monkeypatch, ("BFL safetensors", "diffusers files"))
    wrong = {row["component"] for row in rows if row["relative_error"] > 1e-5}
    assert wrong == {"transformer", "whole picture"}
    for row in rows:
        if row["component"] in wrong and row["format"] == "diffusers files":
            assert row["relative_error"] > 0.1
            assert row["psnr"] is None or row["psnr"] < 40
        else:
            assert row["relative_error"] < 1e-5
    told = re.fullmatch(LAST, capsys.readouterr().out.splitlines()[-1])
    assert told and float(told[1]) > 0.1 and float(told[2]) < 40


def test_every_stored_form_has_its_rows() -> None:
    assert {f"GGUF {kind}" for kind in BLOCK_TYPES} <= FORMATS.keys()
    assert {"fp16", "bf16", "fp8 e4m3fn", "fp8 e5m2", "fp8 e4m3fn scale_weight", "NF4"} <= FORMATS.keys()
    assert set(fidelity.QUICK) | fidelity.OWN_DTYPES.keys() <= FORMATS.keys()


def test_psnr_of_a_known_difference() -> None:
    """A tenth everywhere is 20 dB."""
    picture = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert psnr(picture + 0.1, picture) == pytest.approx(20, abs=1e-4)
    assert psnr(picture, picture) == math.inf


def test_only_exact_formats_count_and_no_number_hides() -> None:
    row = Row("whole picture", "dev", "BFL safetensors", "fp32", 1e-6, None, None, 130.0, True)
    rough = replace(row, relative_error=0.5, psnr=10.0, exact=False)
    assert extremes([row, rough]) == {"worst_relative_error": 1e-6, "lowest_psnr": 130.0}
    broken = extremes([replace(row, relative_error=math.nan, psnr=math.nan), row])
    assert all(math.isnan(value) for value in broken.values())
