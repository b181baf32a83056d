"""Compiled blocks on a GPU compute what eager ones do."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.models import flux_transformer, relative_error, text
from rectiflux.flux_core.backends import compile as compiling
from rectiflux.flux_core.backends.compile import compile_blocks
from rectiflux.flux_core.backends.quantize import quantize_to_fp8
from rectiflux.flux_core.lora import LoraUse, read_lora, with_lora
from rectiflux.flux_core.model.transformer import FluxTransformer, Prepared, pack
from torch import Tensor

from ..flux_core.backends.test_compile import keep_stored, lora_file, q4_k

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
AGREES = {FP32: 1e-5, BF16: 2e-2, FP16: 3e-3}
"""Allowed relative difference of a velocity: compiled code rounds less often and in another order."""
SIZES = {"hidden_size": 256, "num_heads": 2, "depth_single": 2}


@pytest.fixture(autouse=True)
def complete(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail where a warning says that something was not compiled."""
    yield
    records = caplog.get_records("call")
    assert [r.getMessage() for r in records if r.name.startswith("rectiflux")] == []


@pytest.fixture
def compiled(device: torch.device) -> Iterator[None]:
    try:
        compiling.check(device)
    except ValueError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Run:
    """A prompt at a size, and tokens for each of four steps."""

    SIGMAS = (1.0, 0.7, 0.4, 0.1)

    def __init__(self, model: FluxTransformer, side: int = 16, length: int = 9, batch: int = 1) -> None:
        generator = torch.Generator().manual_seed(side + length)
        noise = torch.randn(4, batch, 16, side, side, generator=generator)
        self._tokens = [pack(x).to(model.device, model.dtype) for x in noise]
        self._prepared: Prepared = model.prepare(text(length, length=length), self.SIGMAS, side, side)

    def velocities(self, step: Callable[..., Tensor]) -> list[Tensor]:
        """The velocity at each sigma, twice."""
        found = []
        for sigma, tokens in itertools.chain(*2 * [list(zip(self.SIGMAS, self._tokens, strict=True))]):
            found.append(step(tokens, self._prepared, sigma).clone())
        return found


def assert_agree(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, plain in zip(found, expected, strict=True):
        assert relative_error(ours.float(), plain.float()) < AGREES[plain.dtype]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_compiled_blocks(
    dtype: torch.dtype, compiled: None, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    """Once for each class of block, for any size, prompt and sigma; the seconds are recorded."""
    model = flux_transformer(**SIZES).to(device, dtype)
    twin = compile_blocks(model)
    first = Run(model)
    start = time.perf_counter()
    found = first.velocities(twin)
    record_property("seconds", time.perf_counter() - start)
    assert_agree(found, first.velocities(model))
    assert compilations() == 2
    for side, length in ((24, 9), (16, 21), (32, 40)):
        run = Run(model, side, length)
        assert_agree(run.velocities(twin), run.velocities(model))
    assert compilations() == 2


@pytest.mark.parametrize("weights", ["dense", "Q4_K"])
def test_compiled_with_a_lora_at_any_strength(
    weights: str, compiled: None, device: torch.device, tmp_path: Path
) -> None:
    model = flux_transformer(**SIZES)
    lora = read_lora(lora_file(model, tmp_path), model.spec)
    model = (keep_stored(model, q4_k) if weights == "Q4_K" else model).to(device)
    counts = set()
    for strength in (1.0, 0.5, -0.3):
        styled, _ = with_lora(model, [LoraUse(lora, strength)])
        run = Run(styled)
        assert_agree(run.velocities(compile_blocks(styled)), run.velocities(styled))
        counts.add(compilations())
    assert len(counts) == 1


def test_fp8_compiled(compiled: None, device: torch.device) -> None:
    """Rounding may change a code, so the two agree within the error of fp8."""
    model = flux_transformer(**SIZES).to(device, BF16)
    exact = Run(model).velocities(model)
    quantize_to_fp8(model)
    run = Run(model)
    plain, found = run.velocities(model), run.velocities(compile_blocks(model))
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        loss = relative_error(theirs.float(), true.float())
        assert relative_error(ours.float(), true.float()) < 1.15 * loss
        assert relative_error(ours.float(), theirs.float()) < loss
