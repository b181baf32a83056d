"""Layers that stay quantised in ComfyUI, as far as that needs no ComfyUI; the rest is in tests/comfyui."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.quantized import every_format, fp8, weights
from rectiflux.flux_core.backends.cpu_int8 import Int8Linear
from rectiflux.flux_core.backends.fp8 import Fp8Linear, to_fp8
from rectiflux.flux_core.lora.arithmetic import LowRankStack
from rectiflux.flux_core.lora.terms import Terms
from rectiflux.flux_core.model.layers import Shared
from rectiflux.flux_core.quant.linear import QuantizedLinear
from rectiflux.flux_core.weights.weight_file import WeightFile
from rectiflux.nodes.host_comfy_quant import (
    BlockRunner,
    Patched,
    PatchedQuantizedLinear,
    StoredWeight,
    keep_stored,
)
from rectiflux.nodes.host_comfy_text import comfy_reads
from torch import Tensor, nn

FORMS = every_format()
BIAS = torch.linspace(-1, 1, 48)


def layer(form: str) -> tuple[PatchedQuantizedLinear, Tensor]:
    """A layer of 48 outputs and 64 inputs inside a model, and its numbers."""
    stored, numbers = FORMS[form]
    model = nn.Sequential(nn.Linear(3, 64), QuantizedLinear(stored, BIAS, torch.float32))
    assert keep_stored(model) and isinstance(model[1], PatchedQuantizedLinear) and type(model[0]) is nn.Linear
    return model[1], numbers


def quantised(form: str) -> tuple[Patched, nn.Module]:
    """A layer that multiplies in fp8 or int8, and flux_core's."""
    made = {
        "fp8": lambda: Fp8Linear(to_fp8(weights()), BIAS, torch.float32),
        "int8": lambda: Int8Linear(weights(), BIAS),
    }
    model = nn.Sequential(made[form]())
    assert keep_stored(model) and isinstance(model[0], Patched)
    return model[0], made[form]()


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_is_its_numbers_in_every_operation(form: str) -> None:
    found, numbers = layer(form)
    weight = found.weight
    assert isinstance(weight, StoredWeight)
    assert (weight.shape, weight.dtype, weight.device.type) == (numbers.shape, torch.float32, "cpu")
    assert weight.nbytes == found.stored.nbytes
    for seen in (
        weight + 0,
        weight.clone(),
        weight.to(torch.float64).float(),
        weight.contiguous(),
        weight[:],
    ):
        assert type(seen) is Tensor and torch.equal(seen, numbers)
    assert torch.equal(torch.zeros(48, 64).copy_(weight), numbers)
    x = weights(5, seed=1)
    assert torch.equal(found(x), F.linear(x, numbers, BIAS))


@pytest.mark.parametrize("form", FORMS)
def test_the_state_dict_has_a_linear_layers_names(form: str) -> None:
    found, numbers = layer(form)
    state = found.state_dict()
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"] * 1, numbers) and torch.equal(state["bias"], BIAS)
    assert [name for name, _ in found.named_parameters()] == ["bias"]
    assert sum(buffer.nbytes for buffer in found.buffers()) == found.stored.nbytes


def test_a_weight_cannot_be_overwritten() -> None:
    found, numbers = layer(next(iter(FORMS)))
    label = found.stored.label
    for write in (found.weight.copy_, found.weight.data.copy_, found.weight.add_):
        with pytest.raises(TypeError) as refused:
            write(torch.zeros(48, 64))
        assert str(refused.value) == (
            f"weights that stay {label} cannot be overwritten, as scheduled LoRAs (hooks) do; "
            "load the LoRA with Load FLUX LoRA, or choose weight_dtype bf16 and a bf16 file"
        )
    assert torch.equal(found.dense_weight(torch.float32), numbers)


def test_what_is_kept_elsewhere_is_brought_to_the_input() -> None:
    """A layer that ComfyUI left on the CPU computes on the device that the tokens are on."""
    found = PatchedQuantizedLinear(QuantizedLinear(fp8(weights())[0], BIAS, torch.float32))
    y = found(torch.empty(2, 64, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 48))
    assert found.device.type == "cpu"


def test_a_block_that_merges_patches_is_not_compiled() -> None:
    """What ComfyUI merges is code of its own, which no compiler should trace."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.traced = layer("GGUF Q4_0")[0], []

        def forward(self, x: Tensor, shared: Shared) -> Tensor:
            self.traced.append(torch.compiler.is_compiling())
            return x

    block, x, shared = Block(), weights(5, seed=1), Shared((torch.ones(1), torch.ones(1)))
    block.layer.patches = ["any patch"]
    assert torch.equal(BlockRunner()(block, (x,), shared), x) and block.traced == [False]


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_a_layer_that_multiplies_in_8_bits_still_does(form: str) -> None:
    """Until patches are merged into its numbers. GELU, which it has of its own, is of what it gives then."""
    (found, inner), x = quantised(form), weights(5, seed=1)
    assert torch.equal(found(x), inner(x)) and found.label.startswith(form)
    dense = F.linear(x, inner.dense_weight(torch.float32), BIAS)
    assert not torch.allclose(inner(x), dense, atol=1e-3)
    found.patches = ["any patch"]
    found.merged = lambda x: inner.dense_weight(x.dtype)
    assert torch.equal(found(x), dense)
    if form == "int8":
        torch.testing.assert_close(found.gelu(x), F.gelu(dense, approximate="tanh"))


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_what_others_see_of_a_weight_in_8_bits(form: str) -> None:
    (found, inner), state = quantised(form), quantised(form)[0].state_dict()
    assert list(state) == ["weight", "bias"] and torch.equal(state["bias"], BIAS)
    assert torch.equal(found.weight * 1, inner.dense_weight(torch.float32))
    assert found.weight.nbytes == found.kept_bytes == 48 * 64 + 48 * 4


@pytest.mark.slow
@pytest.mark.parametrize("form", ["GGUF Q4_0", "fp8", "int8"])
def test_compilers_see_through_a_lora_beside_stored_numbers(form: str) -> None:
    """In one piece; another LoRA of the same rank is the same code."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, dynamic=False, backend="aot_eager")
    x = weights(5, seed=1)
    for seed in (2, 3):
        found = layer(form)[0] if form in FORMS else quantised(form)[0]
        terms = Terms(((weights(4, seed=seed), weights(48, 4, seed=seed + 2)),))
        found.beside = LowRankStack([((0, 48), terms)], 64, torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
            torch.testing.assert_close(compiled(found, x), found(x))


def test_a_model_without_stored_layers_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert not keep_stored(model) and type(model[0]) is nn.Linear


CLIP_L = {"text_model.embeddings.token_embedding.weight": (49408, 768)}
T5_XXL = {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096)}
SMALL = {"encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64)}


@pytest.mark.parametrize(
    ("shapes", "format", "extra", "metadata", "prefix", "reads"),
    [
        (CLIP_L, "safetensors", (), {}, "", True),
        (T5_XXL, "safetensors", (), {}, "", True),
        (T5_XXL, "safetensors", ("scaled_fp8", "shared.scale_weight"), {}, "", True),
        (T5_XXL, "safetensors", (), {"_quantization_metadata": "{}"}, "", True),
        (T5_XXL, "safetensors", (), {"_quantization_metadata": "{}"}, "text_encoders.", False),
        (T5_XXL, "safetensors", ("x.weight.quant_state.bitsandbytes__nf4",), {}, "", False),
        (T5_XXL, "safetensors", ("x.SCB",), {}, "", False),
        (T5_XXL, "GGUF", (), {}, "", False),
        (SMALL, "safetensors", (), {}, "", False),
    ],
)
def test_which_text_encoders_comfyui_reads_itself(
    shapes: dict[str, tuple[int, ...]],
    format: str,
    extra: tuple[str, ...],
    metadata: dict[str, str],
    prefix: str,
    reads: bool,
) -> None:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors |= {name: torch.empty(1, device="meta") for name in extra}
    file = WeightFile((Path("x"),), format, 1, tensors, metadata, prefix)
    assert comfy_reads(file) == reads
