"""Lower bounds of a step: FLOP and bytes by hand and by torch's own count."""

from __future__ import annotations

import pytest
import torch
from rectiflux.benchmarks import floors
from rectiflux.benchmarks.floors import Flop, bandwidth, matmul_rate, step_bytes, step_flop
from rectiflux.benchmarks.interleaved import Clock
from rectiflux.benchmarks.speed_inputs import Inputs, random_model
from rectiflux.flux_core.model.spec import FLUX_DEV, FluxSpec
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TINY = FluxSpec(64, 1, 1, 1, context_in=16, vec_in=8, guidance_embed=True)


@pytest.mark.parametrize(
    ("side", "linear", "attention"), [(1024, 59.49e12, 14.87e12), (512, 19.83e12, 1.65e12)]
)
def test_flop_of_flux(side: int, linear: float, attention: float) -> None:
    """With 512 text tokens: 74.4 and 21.5 TFLOP in total."""
    flop = step_flop(FLUX_DEV, 512, (side // 16) ** 2)
    assert flop.linear == pytest.approx(linear, rel=1e-3)
    assert flop.attention == pytest.approx(attention, rel=1e-2)
    assert step_flop(FLUX_DEV, 512, (side // 16) ** 2, batch=4).total == 4 * flop.total


def test_flop_by_torchs_own_count() -> None:
    """torch counts the matmuls of our step: all but text projection and modulations."""
    inputs = Inputs(model := random_model(TINY, torch.float32, torch.device("cpu")), 64, 5, batch=2)
    run = inputs.our_step(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == step_flop(TINY, 5, 16, batch=2).total


def test_bytes_and_seconds_by_hand() -> None:
    """Width 64, MLP 256, a block of each kind, 4 text and 6 image tokens, 2 bytes per element."""
    assert step_bytes(TINY, 4, 6, 2) == {
        "norms and modulation": 2 * 64 * 2 * (2 * 10 + 10 + 6),
        "q/k norm and rotary": 4 * 64 * 2 * 2 * 10,
        "GELU": 2 * 256 * 2 * 2 * 10,
        "gated residuals": 3 * 64 * 2 * (2 * 10 + 10),
    }
    assert Flop(6.0, 4.0).seconds(2.0, 1.0) == 7.0


def test_the_best_rate_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 2.0, 8.0, 64.0])
    monkeypatch.setattr(floors, "can_pack", lambda device, dtype: True)
    monkeypatch.setattr(floors, "best_of", lambda run, clock: next(seconds))
    assert matmul_rate(torch.float32, Clock(), (8, 16)) == max(1024 / 4, 1024 / 2, 8192 / 8, 8192 / 64)
    monkeypatch.setattr(floors, "best_of", lambda run, clock: 0.5)
    assert bandwidth(4096, Clock()) == 2 * 4096 / 0.5
