"""A card computes what a CPU computes, in every dtype, weight format and attention backend."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.generate import model_files
from rectiflux.benchmarks.reference.models import autoencoder, flux_transformer, relative_error, text
from rectiflux.benchmarks.reference.quantized import every_format, random_blocks
from rectiflux.benchmarks.speed_settings import MODELS
from rectiflux.flux_core.backends.attention import (
    ATTENTIONS,
    PACKAGES,
    attention_backend_name,
    importable,
    use_attention,
)
from rectiflux.flux_core.backends.fp8 import can_multiply
from rectiflux.flux_core.backends.quantize import quantize_to_fp8
from rectiflux.flux_core.lora import LoraUse, read_lora, with_lora
from rectiflux.flux_core.memory.tiling import activation_bytes, decode, encode
from rectiflux.flux_core.model.transformer import FluxTransformer, pack
from rectiflux.flux_core.pipeline import Models, text_to_image
from rectiflux.flux_core.quant.formats import GGUFWeight
from rectiflux.flux_core.quant.gguf import BLOCK_TYPES
from rectiflux.flux_core.quant.linear import QuantizedLinear
from rectiflux.flux_core.weights import load_autoencoder, load_text_encoders, load_transformer
from torch import Tensor

from ..flux_core.backends.test_compile import keep_stored, lora_file, q4_k

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIDE, LENGTH = 32, 40
SIZES = {"hidden_size": 256, "num_heads": 2, "depth_single": 2}
"""Heads of 128 dims as in FLUX.1, which every attention backend supports."""


@pytest.fixture(scope="module")
def model() -> FluxTransformer:
    return flux_transformer(**SIZES)


def velocity(model: FluxTransformer, device: torch.device, dtype: torch.dtype, rows: int = 1) -> Tensor:
    """The velocity of a random latent by a copy of the model on a device; float32, on the CPU."""
    twin = copy.deepcopy(model).to(device, dtype)
    prepared = twin.prepare(text(0, rows=rows, length=LENGTH), [0.6], SIDE, SIDE)
    noise = torch.randn(2, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return twin(pack(noise).to(device, dtype), prepared, 0.6).float().cpu()


@pytest.fixture(scope="module")
def exact(model: FluxTransformer) -> Tensor:
    with torch.no_grad():
        return velocity(model, torch.device("cpu"), FP32)


def test_float32(model: FluxTransformer, exact: Tensor, device: torch.device) -> None:
    assert relative_error(velocity(model, device, FP32), exact) < 1e-5


def test_a_prompt_for_each_image(model: FluxTransformer, device: torch.device) -> None:
    exact = velocity(model, torch.device("cpu"), FP32, rows=2)
    assert relative_error(velocity(model, device, FP32, rows=2), exact) < 1e-5


@pytest.mark.parametrize("backend", ATTENTIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_attention(
    backend: str, dtype: torch.dtype, model: FluxTransformer, exact: Tensor, device: torch.device
) -> None:
    """Errors as on a CPU; four times as large with SageAttention, whose queries and keys are in int8."""
    if backend in PACKAGES and not importable(backend):
        pytest.skip(f"{PACKAGES[backend][0]} is not installed")
    twin = copy.deepcopy(model).to(device, dtype)
    try:
        use_attention(twin, backend)
    except ValueError as error:
        pytest.skip(str(error))
    usual = relative_error(velocity(model, torch.device("cpu"), dtype), exact)
    allowed = (4 if backend == "sage" else 1.25) * usual
    assert relative_error(velocity(twin, device, dtype), exact) < allowed, attention_backend_name(twin)


def test_fp8_matmul(model: FluxTransformer, exact: Tensor, device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    assert can_multiply(device) == (capability >= (8, 9) and torch.version.hip is None)
    quantized = copy.deepcopy(model)
    assert quantize_to_fp8(quantized) > 0
    usual = relative_error(velocity(quantized, torch.device("cpu"), BF16), exact)
    found = relative_error(velocity(quantized, device, BF16), exact)
    assert 0.01 < found < 1.1 * usual


def test_quantizing_to_fp8(model: FluxTransformer, device: torch.device) -> None:
    here, there = copy.deepcopy(model), copy.deepcopy(model)
    quantize_to_fp8(here)
    quantize_to_fp8(there, device, then=torch.device("cpu"))
    for ours, theirs in zip(here.buffers(), there.buffers(), strict=True):
        assert ours.dtype == theirs.dtype and theirs.device.type == "cpu"
        # a scale may differ by an ulp, and a code then by one
        assert (ours.float() != theirs.float()).float().mean() < 0.01 or ours.dtype == FP32
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.126, atol=1e-6)


@pytest.mark.parametrize("name", every_format())
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_quantized_layers(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """With the weight on the device, and copied to it for each call."""
    stored, dense = every_format()[name]
    x = torch.randn(3, dense.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = QuantizedLinear(stored, None, dtype)(x).float()
    for layer in (QuantizedLinear(stored, None, dtype), QuantizedLinear(stored, None, dtype).to(device)):
        found = layer(x.to(device))
        assert found.device.type == device.type
        assert relative_error(found.float().cpu(), expected) < (1e-6 if dtype == FP32 else 2**-8)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_gguf_type(kind: str, device: torch.device) -> None:
    data = torch.from_numpy(random_blocks(kind, 8, 2))
    here, there = GGUFWeight(data, kind).dequantize(FP32), GGUFWeight(data.to(device), kind).dequantize(FP32)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", ["dense", "Q4_K"])
def test_a_lora(weights: str, device: torch.device, tmp_path: Path) -> None:
    model = flux_transformer(**SIZES)
    lora = read_lora(lora_file(model, tmp_path), model.spec)
    model = keep_stored(model, q4_k) if weights == "Q4_K" else model
    cpu = torch.device("cpu")
    exact = velocity(with_lora(model, [LoraUse(lora, 0.7)])[0], cpu, FP32)
    assert relative_error(velocity(model, cpu, FP32), exact) > 0.01
    found = velocity(with_lora(copy.deepcopy(model).to(device), [LoraUse(lora, 0.7)])[0], device, FP32)
    assert relative_error(found, exact) < 1e-5


def test_the_autoencoder(device: torch.device) -> None:
    """In one piece and in strips, in float32 and in bfloat16."""
    model = autoencoder()
    latent = torch.randn(1, 16, 24, 20, generator=torch.Generator().manual_seed(2))
    image = model.decode(latent)
    twin = copy.deepcopy(model).to(device)
    assert relative_error(twin.decode(latent.to(device)).cpu(), image) < 1e-5
    need = activation_bytes(model, 192, 160)
    for limit, allowed in ((need - 1, 1e-5), (0, 0.05 / 127.5)):  # the second stores 16 bits of each value
        assert relative_error(decode(twin, latent.to(device), limit=limit).cpu(), image) < allowed
    again = model.encode(image)
    assert relative_error(twin.encode(image.to(device)).cpu(), again) < 1e-5
    assert relative_error(encode(twin, image.to(device), limit=need - 1).cpu(), again) < 1e-5
    usual = relative_error(copy.deepcopy(model).bfloat16().decode(latent.bfloat16()).float(), image)
    half = twin.bfloat16().decode(latent.to(device, BF16)).float().cpu()
    assert relative_error(half, image) < 1.25 * usual


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral", "ab2"])
def test_a_seed_gives_the_same_image(solver: str, device: torch.device) -> None:
    """From prompt to image by the shipped miniature."""
    files = model_files(MODELS, "dev")

    def generate(place: torch.device) -> Tensor:
        models = Models(
            load_text_encoders(files.clip, files.t5, dtype=FP32, device=place),
            load_transformer(files.transformer, FP32, place),
            load_autoencoder(files.vae, FP32, place),
        )
        return text_to_image(
            models, "two blue stars", width=128, height=96, steps=12, seed=5, solver=solver
        ).cpu()

    assert float((generate(device) - generate(torch.device("cpu"))).abs().max()) < 2e-3  # a level is 8e-3
