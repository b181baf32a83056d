"""Each fused kernel is its plain twin; where none can run, the twin does, once told why.

What runs the kernels here is Triton's interpreter, in a process of its own (interpreted.py), and its compiler
for a GPU that is not there (compiled.py).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rectiflux.flux_core import fused, layers
from torch import Tensor

HERE = Path(__file__).parent
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is for Linux only)"
)


def told_by(script: str, folder: Path) -> dict[str, Any]:
    """What a script of this folder prints."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "RECTIFLUX_FUSED": "1"}
    run = subprocess.run(
        [sys.executable, str(HERE / script)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@with_triton
def test_the_kernels_are_their_twins(tmp_path: Path) -> None:
    """In units of the tolerances in interpreted.py; a whole model's velocity in units of 1e-5."""
    told = told_by("interpreted.py", tmp_path)
    launched = told.pop("launched")
    assert len(told) == 6 * 13 + 1
    assert {case: error for case, error in told.items() if error > 1} == {}
    # two double blocks with two norms of each stream, the second of them joined to the residual before it;
    # one single block; the last layer
    assert launched == {
        "modulated_norm": 2 * 2 + 1 + 1,
        "residual_and_norm": 2 * 2,
        "gated_residual": 2 * 2 + 1,
        "queries_keys_values": 2 + 1,
        "beside_gelu": 1,
    }


@with_triton
@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """With bfloat16 in pairs, 4 x 32 bits at once is what a GPU reads fastest."""
    told = told_by("compiled.py", tmp_path)
    assert told == dict.fromkeys(
        ("modulated_norm", "gated_residual", "queries_keys_values", "beside_gelu", "rows_in_fp8"), 4
    )


# Where they do not run


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Nothing has failed yet, whatever is asked for is large enough, and a GPU has no say in it."""
    monkeypatch.setattr(fused, "_off", set())
    monkeypatch.setattr(fused, "LARGE", 0)
    monkeypatch.setattr(fused, "serves", lambda x: True)
    caplog.set_level(logging.INFO)
    return caplog


def launching(monkeypatch: pytest.MonkeyPatch, **launches: Any) -> None:
    """Put these in the place of the launches, and of the import of Triton."""
    stand_in: Any = SimpleNamespace(**launches)
    monkeypatch.setitem(sys.modules, f"{fused.__name__}.launch", stand_in)
    monkeypatch.setattr(fused, "launch", stand_in, raising=False)


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    x, gate, y = torch.randn(3, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    return x, gate[:, :1], y


def test_a_failed_kernel_is_told_once_and_its_twin_goes_on(
    fresh: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fails(*_: Tensor) -> Tensor:
        tried.append(1)
        raise RuntimeError("no C compiler")

    launching(monkeypatch, gated_residual=fails, modulated_norm=lambda x, shift, scale: x)
    x, gate, y = arguments()
    for _ in range(3):
        assert torch.equal(layers.gated(x, gate, y), torch.addcmul(x, gate, y))
    assert len(tried) == 1
    told = "the fused kernel gated_residual failed, torch does its work from now on: no C compiler"
    assert [record.message for record in fresh.records] == [told]
    assert fused.modulated_norm(x, gate, gate) is x, "the others still run"


def test_full_memory_is_no_failure_of_a_kernel(
    fresh: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    launching(monkeypatch, gated_residual=full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        layers.gated(*arguments())
    assert not fused._off and not fresh.records


def test_without_triton_all_twins_go_on(
    fresh: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(fused, "launch", raising=False)
    missing: Any = None  # an import of it raises ImportError
    monkeypatch.setitem(sys.modules, f"{fused.__name__}.launch", missing)
    x, gate, y = arguments()
    for _ in range(2):
        assert torch.equal(layers.gated(x, gate, y), torch.addcmul(x, gate, y))
        assert fused.beside_gelu(x, y, 4) is None
    assert len(fresh.records) == 1
    assert fresh.records[0].message.startswith("no fused kernels, because Triton cannot be imported: ")


def test_what_does_not_fit_a_kernel_goes_to_the_twin(
    fresh: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in pieces, two dtypes, few numbers, a rotary table of another length or dtype."""
    launching(
        monkeypatch,
        gated_residual=lambda *_: pytest.fail("launched"),
        queries_keys_values=lambda *_: pytest.fail("launched"),
    )
    x, gate, y = arguments()
    assert fused.gated_residual(x.mT.contiguous().mT, gate, y) is None
    assert fused.gated_residual(x, gate.bfloat16(), y) is None
    norms = (torch.ones(2), torch.ones(2))
    qkv, table = torch.randn(1, 3, 12), torch.ones(1, 1, 3, 1, 1)
    for rope in ((table[:, :, :2], table[:, :, :2]), (table.double(), table.double())):
        assert fused.queries_keys_values([(qkv, *norms)], 2, rope) is None
    assert fused.queries_keys_values([(qkv.mT.contiguous().mT, *norms)], 2, (table, table)) is None
    monkeypatch.setattr(fused, "LARGE", x.numel() + 1)
    assert fused.gated_residual(x, gate, y) is None
    assert not fresh.records


def test_kernels_serve_a_gpu_without_gradients_or_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def tensor(**changes: Any) -> Any:
        return SimpleNamespace(**{"is_cuda": True, "dtype": torch.bfloat16, **changes})

    monkeypatch.setattr(fused, "_off", set())
    assert not fused.serves(tensor()), "gradients are recorded"
    with torch.no_grad():
        assert fused.serves(tensor())
        assert not fused.serves(tensor(is_cuda=False))
        assert not fused.serves(tensor(dtype=torch.float64))
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert not fused.serves(tensor())
        fused._off.add("all")
        assert not fused.serves(tensor())


@pytest.mark.parametrize(("value", "off"), [("0", True), ("1", False), (None, True)])
def test_the_environment_switches_them_on(
    value: str | None, off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("RECTIFLUX_FUSED", raising=False)
    else:
        monkeypatch.setenv("RECTIFLUX_FUSED", value)
    spec = importlib.util.find_spec(fused.__name__)
    assert spec is not None and spec.loader is not None
    again: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert ("all" in again._off) == off
