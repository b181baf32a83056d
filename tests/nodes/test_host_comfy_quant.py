"""Layers that stay quantized in ComfyUI, as far as that needs no ComfyUI; the rest is in tests/comfyui."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.quantized import every_format, fp8, weights
from rectiflux.flux_core.backends.cpu_int8 import Int8Linear, quantize_int8
from rectiflux.flux_core.backends.fp8 import Fp8Linear, to_fp8
from rectiflux.flux_core.lora import LoRAStack
from rectiflux.flux_core.model.layers import Shared
from rectiflux.flux_core.quant.linear import QuantizedLinear
from rectiflux.flux_core.weights.weight_file import WeightFile
from rectiflux.nodes.host_comfy_quant import BlockRunner, PatchedLinear, WeightView, make_patchable
from rectiflux.nodes.host_comfy_text import comfy_reads
from torch import Tensor, nn

FORMATS = every_format()
BIAS = torch.linspace(-1, 1, 48)
LAYERS = {
    **{name: QuantizedLinear(weight, BIAS, torch.float32) for name, (weight, _) in FORMATS.items()},
    "fp8": Fp8Linear(to_fp8(weights()), BIAS, torch.float32),
    "int8": Int8Linear(quantize_int8(weights()), BIAS, torch.float32),
}
each_format = pytest.mark.parametrize("name", LAYERS)


def patched(name: str) -> tuple[PatchedLinear, QuantizedLinear]:
    """A layer of 48 outputs and 64 inputs inside a model, and the same layer of flux_core."""
    model = nn.Sequential(nn.Linear(3, 64), LAYERS[name])
    assert make_patchable(model) and isinstance(model[1], PatchedLinear) and type(model[0]) is nn.Linear
    return model[1], LAYERS[name]


@pytest.fixture
def merges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ComfyUI that merges patches without any effect."""
    lora = SimpleNamespace(calculate_weight=lambda patches, weight, key: weight)
    monkeypatch.setitem(sys.modules, "comfy", SimpleNamespace(lora=lora))
    monkeypatch.setitem(sys.modules, "comfy.lora", lora)


@each_format
def test_a_weight_is_dequantized_by_every_operation(name: str) -> None:
    layer, original = patched(name)
    weight, values = layer.weight, original.dense_weight(torch.float32)
    assert isinstance(weight, WeightView)
    assert (weight.shape, weight.dtype, weight.device.type) == (values.shape, torch.float32, "cpu")
    assert weight.nbytes == original.quantized.nbytes
    converted = weight.to(torch.float64).float()
    for found in (weight + 0, weight.clone(), converted, weight.contiguous(), weight[:]):
        assert type(found) is Tensor and torch.equal(found, values)
    assert torch.equal(torch.zeros(48, 64).copy_(weight), values)
    x = weights(5, seed=1)
    assert torch.equal(layer(x), original(x))


@each_format
def test_the_state_dict_has_a_linear_layers_names(name: str) -> None:
    layer, original = patched(name)
    state = nn.Sequential(layer).state_dict()
    assert list(state) == ["0.weight", "0.bias"]
    assert torch.equal(state["0.weight"] * 1, original.dense_weight(torch.float32))
    assert torch.equal(state["0.bias"], BIAS)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_a_weight_cannot_be_overwritten() -> None:
    layer, original = patched("GGUF Q4_0")
    for write in (layer.weight.copy_, layer.weight.data.copy_, layer.weight.add_):
        with pytest.raises(TypeError, match="GGUF Q4_0"):
            write(torch.zeros(48, 64))
    assert torch.equal(layer.dense_weight(torch.float32), original.dense_weight(torch.float32))


def test_an_offloaded_weight_is_copied_to_the_inputs_device() -> None:
    """A layer that ComfyUI left on the CPU computes on the tokens' device."""
    layer = PatchedLinear(fp8(weights())[0], BIAS, torch.float32)
    y = layer(torch.empty(2, 64, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 48))
    assert layer.device.type == "cpu"


def test_a_block_that_merges_patches_is_not_compiled() -> None:
    """What ComfyUI merges is code of its own, which no compiler should trace."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.traced = patched("GGUF Q4_0")[0], []

        def forward(self, x: Tensor, shared: Shared) -> Tensor:
            self.traced.append(torch.compiler.is_compiling())
            return x

    block, x, shared = Block(), weights(5, seed=1), Shared((torch.ones(1), torch.ones(1)))
    block.layer.patches = ["any patch"]
    assert torch.equal(BlockRunner()(block, (x,), shared), x) and block.traced == [False]


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_layer_multiplies_in_8_bits_unless_patches_are_merged(name: str, merges_nothing: None) -> None:
    """`gelu`, which int8 layers have, uses the merged weight too."""
    (layer, original), x = patched(name), weights(5, seed=1)
    dense = F.linear(x, original.dense_weight(torch.float32), BIAS)
    assert torch.equal(layer(x), original(x))
    assert not torch.allclose(original(x), dense, atol=1e-3)
    layer.patches = ["any patch"]
    assert torch.equal(layer(x), dense)
    if name == "int8":
        torch.testing.assert_close(layer.gelu(x), F.gelu(dense, approximate="tanh"))


def test_merging_does_not_write_into_the_file(merges_nothing: None) -> None:
    sys.modules["comfy.lora"].calculate_weight = lambda patches, weight, key: weight.add_(1)
    for name in LAYERS:
        layer, original = patched(name)
        before, x = original.dense_weight(torch.float32), weights(5, seed=1)
        layer.patches = ["any patch"]
        torch.testing.assert_close(layer(x), F.linear(x, before + 1, BIAS))
        assert torch.equal(original.dense_weight(torch.float32), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GGUF Q4_0", "fp8", "int8"])
def test_a_lora_beside_a_quantized_weight_is_compiled(name: str) -> None:
    """In one graph; another LoRA of the same rank runs the same code."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, dynamic=False, backend="aot_eager")
    x = weights(5, seed=1)
    for seed in (2, 3):
        layer = patched(name)[0]
        down, up = weights(4, seed=seed), weights(48, 4, seed=seed + 2)
        layer.beside = LoRAStack([((0, 48), down, up)], 64, torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
            torch.testing.assert_close(compiled(layer, x), layer(x))


def test_a_model_without_quantized_layers_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert not make_patchable(model) and type(model[0]) is nn.Linear


CLIP_L = {"text_model.embeddings.token_embedding.weight": (49408, 768)}
T5_XXL = {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096)}
BLOCK_24 = "encoder.block.24.layer.0.SelfAttention.q.weight"
POSITIONS = "text_model.embeddings.position_embedding.weight"
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
        (T5_XXL | {"shared.weight": (32128, 4096)}, "safetensors", (), {}, "", True),
        (T5_XXL | {"shared.weight": (69328, 4096)}, "safetensors", (), {}, "", False),
        (T5_XXL | {"encoder.embed_tokens.weight": (69328, 4096)}, "safetensors", (), {}, "", False),
        (T5_XXL | {BLOCK_24: (4096, 4096)}, "safetensors", (), {}, "", False),
        (CLIP_L | {POSITIONS: (77, 768)}, "safetensors", (), {}, "", True),
        (CLIP_L | {POSITIONS: (248, 768)}, "safetensors", (), {}, "", False),  # LongCLIP
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
