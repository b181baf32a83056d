"""A model larger than its memory limit computes exactly what one that is all on the card does."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.models import flux_transformer, text
from rectiflux.flux_core.backends.fp8 import Fp8Linear
from rectiflux.flux_core.backends.quantize import quantize_to_fp8
from rectiflux.flux_core.lora import LoraUse, read_lora, with_lora
from rectiflux.flux_core.memory import WeightStreamer, stream
from rectiflux.flux_core.memory.host_offload import HostOffloader
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.flux_core.pipeline import VelocityRequest, guided_velocity
from torch import Tensor

from ..flux_core.backends.test_compile import keep_stored, lora_file, q4_k

SIZES = {"hidden_size": 512, "num_heads": 4, "depth": 4, "depth_single": 8}
SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2]
SIDE = 48


def model_in(dtype: torch.dtype, seed: int = 0) -> FluxTransformer:
    return flux_transformer(seed, **SIZES).to(dtype)


def velocities(model: FluxTransformer, steps: int = len(SIGMAS)) -> list[Tensor]:
    noise = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(model.device)
    velocity = guided_velocity(model, VelocityRequest(text(0, length=64), SIGMAS, SIDE, SIDE, 1))
    return [velocity(noise, sigma).cpu() for sigma in SIGMAS[:steps]]


def bytes_of(model: FluxTransformer) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_velocities(dtype: torch.dtype, share: float, card: torch.device) -> None:
    """In five steps, after an interrupted run, and while other memory is allocated and freed."""
    model = model_in(dtype)
    expected = velocities(copy.deepcopy(model).to(card))
    streamed = stream(copy.deepcopy(model), card, int(share * bytes_of(model)))
    assert isinstance(streamed.streaming, WeightStreamer)
    assert isinstance(streamed.streaming.offloader, HostOffloader)
    velocities(streamed, steps=2)
    for _ in range(3):
        kept = [torch.full((1 << 20,), float(i), device=card) for i in range(20)]
        for ours, plain in zip(velocities(streamed), expected, strict=True):
            assert torch.equal(ours, plain)
        assert all(bool((tensor == i).all()) for i, tensor in enumerate(kept))


def test_no_more_than_its_share_is_on_the_card(card: torch.device) -> None:
    model = model_in(torch.float32)
    whole = bytes_of(model)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(card)
    streamed = stream(model, card, whole // 2)
    velocities(streamed, steps=1)
    gc.collect()
    assert torch.cuda.memory_allocated(card) - before < 0.55 * whole
    assert velocities(streamed)[0].isfinite().all()


def test_fp8_layers_are_streamed(card: torch.device) -> None:
    model = model_in(torch.bfloat16)
    quantize_to_fp8(model)
    expected = velocities(copy.deepcopy(model).to(card))
    streamed = stream(model, card, bytes_of(model) // 2)
    assert any(isinstance(module, Fp8Linear) for module in streamed.modules())
    for ours, plain in zip(velocities(streamed), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("form", ["dense", "Q4_K", "fp8"])
@pytest.mark.parametrize("before", [True, False])
def test_a_lora_attached_before_or_after(form: str, before: bool, card: torch.device, tmp_path: Path) -> None:
    model = model_in(torch.bfloat16)
    uses = [LoraUse(read_lora(lora_file(model, tmp_path), model.spec), 0.7)]
    if form == "Q4_K":
        keep_stored(model, q4_k)
    elif form == "fp8":
        quantize_to_fp8(model)
    plain = velocities(copy.deepcopy(model).to(card))
    expected = velocities(with_lora(copy.deepcopy(model).to(card), uses)[0])
    limit = bytes_of(model) // 3
    streamed = stream(with_lora(model, uses)[0], card, limit) if before else stream(model, card, limit)
    if not before:
        streamed, _ = with_lora(streamed, uses)
    for ours, theirs, bare in zip(velocities(streamed), expected, plain, strict=True):
        assert torch.equal(ours, theirs) and not torch.equal(ours, bare)


def test_models_one_after_the_other(card: torch.device) -> None:
    """Each with its own buffers, which are freed while kernels may still run."""
    models = [model_in(torch.float32, seed) for seed in range(3)]
    expected = [velocities(copy.deepcopy(model).to(card)) for model in models]
    for _ in range(2):
        for model, plain in zip(models, expected, strict=True):
            streamed = stream(copy.deepcopy(model), card, bytes_of(model) // 3)
            found = velocities(streamed)
            del streamed
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))
