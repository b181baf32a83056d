"""`bench fidelity` on a few formats, and that a wrong model has a large error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rectiflux.benchmarks import fidelity
from rectiflux.benchmarks.fidelity import Row, extremes
from rectiflux.benchmarks.reference.file_formats import FORMATS
from rectiflux.flux_core.quant.gguf import BLOCK_TYPES

LAST = r"worst_relative_error (\d\.\de[-+]\d\d) lowest_psnr (\d+\.\d)"
IMAGE = "whole image"
EVERY = ["transformer", "VAE encode", "VAE decode", "T5", "CLIP", IMAGE]


def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: Sequence[str]) -> list[dict]:
    monkeypatch.setattr(fidelity, "QUICK", formats)
    report = tmp_path / "fidelity.json"
    assert fidelity.main(["--quick", "--threads", "1", "--json", str(report)]) == 0
    return json.loads(report.read_text())["figures"]["rows"]


def test_a_row_for_each_model_in_each_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measure(tmp_path, monkeypatch, ("diffusers folder, shards", "NF4", "GGUF Q4_K"))
    nf4, gguf = ["transformer", "T5", "CLIP", IMAGE], ["transformer", "T5", IMAGE]
    assert [row["component"] for row in rows] == [*EVERY, *nf4, *nf4, *gguf, *gguf]
    assert [row["dtype"] for row in rows] == ["fp32"] * 10 + ["bf16"] * 4 + ["fp32"] * 3 + ["bf16"] * 3
    for row in rows:
        assert row["exact"] == (row["format"] == "diffusers folder, shards")
        assert (row["psnr"] is None) == (row["component"] != IMAGE)
        assert row["dequantized"] == (None if row["exact"] or row["psnr"] else 0)
        assert row["relative_error"] < (1e-5 if row["dtype"] == "fp32" else 0.1)
        assert row["psnr"] is None or row["psnr"] > (100 if row["dtype"] == "fp32" else 40)
    last = re.fullmatch(LAST, capsys.readouterr().out.splitlines()[-1])
    exact = [row for row in rows if row["exact"]]
    assert last and float(last[1]) == pytest.approx(max(row["relative_error"] for row in exact), rel=0.05)
    assert float(last[2]) == pytest.approx(exact[-1]["psnr"], abs=0.051)


def test_a_wrong_model_has_a_large_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight of each written transformer is changed in the file, not in the reference."""
    write = FORMATS["BFL safetensors"]

    def write_wrong(small: fidelity.Small, folder: Path) -> fidelity.Written:
        state = {name: tensor.clone() for name, tensor in small.transformer.state_dict().items()}
        state["final_layer.linear.weight"] *= -1
        return write(small.with_weights({"transformer": state}), folder)

    monkeypatch.setitem(FORMATS, "all-in-one", write_wrong)
    rows = measure(tmp_path, monkeypatch, ("BFL safetensors", "all-in-one"))
    for row in rows:
        is_wrong = row["format"] == "all-in-one" and row["component"] in ("transformer", IMAGE)
        assert row["relative_error"] > 0.1 if is_wrong else row["relative_error"] < 1e-5
    last = re.fullmatch(LAST, capsys.readouterr().out.splitlines()[-1])
    assert last and float(last[1]) > 0.1 and float(last[2]) < 40


def test_every_format_is_measured() -> None:
    assert {f"GGUF {kind}" for kind in BLOCK_TYPES} <= FORMATS.keys()
    assert {"fp16", "bf16", "fp8 e4m3fn", "fp8 e5m2", "fp8 e4m3fn scale_weight", "NF4"} <= FORMATS.keys()
    assert set(fidelity.QUICK) | fidelity.OWN_DTYPES.keys() <= FORMATS.keys()


def test_only_exact_formats_count_and_nan_is_not_hidden() -> None:
    row = Row(IMAGE, "dev", "BFL safetensors", "fp32", 1e-6, None, None, 130.0, True)
    rough = replace(row, relative_error=0.5, psnr=10.0, exact=False)
    assert extremes([row, rough]) == {"worst_relative_error": 1e-6, "lowest_psnr": 130.0}
    broken = extremes([replace(row, relative_error=math.nan, psnr=math.nan), row])
    assert all(math.isnan(value) for value in broken.values())
