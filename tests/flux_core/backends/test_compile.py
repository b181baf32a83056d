"""Compiled blocks compute what the blocks do, and are compiled once for all that should share them.

Most of it is asked of the tracing alone (torch's backend "aot_eager"), where it is decided what is compiled
anew; one test runs the code that inductor makes.
"""

from __future__ import annotations

import functools
import math
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rectiflux.benchmarks.reference import quantized as reference
from rectiflux.benchmarks.reference.models import flux_transformer, text
from rectiflux.flux_core.backends import compile as compiling
from rectiflux.flux_core.backends import cpu_pack, quantize
from rectiflux.flux_core.backends.compile import compile_blocks
from rectiflux.flux_core.lora import LoraUse, read_lora, with_lora
from rectiflux.flux_core.model.layers import Shared
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.flux_core.pipeline import SampleRequest, sample
from rectiflux.flux_core.quant.formats import GGUFWeight, QuantizedWeight
from rectiflux.flux_core.quant.linear import QuantizedLinear
from rectiflux.flux_core.sampling.solver import solver_named
from rectiflux.flux_core.sampling.step_cache import Caching, StepCache
from safetensors.torch import save_file
from torch import Tensor, nn

from ..memory.test_streaming import offload_some

SIZES = {"hidden_size": 256, "num_heads": 4, "mlp_ratio": 1.0}
SINGLES = {**SIZES, "depth": 0}
"""Q4_K needs rows of 256 numbers."""


@dataclass
class Counting:
    """A backend of torch.compile that counts what it is asked to compile."""

    backend: Callable[..., Any]
    graphs: int = field(default=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.graphs += 1
        return self.backend(*args, **kwargs)

    def during(self, run: Callable[..., Any], *args: Any) -> tuple[Any, int]:
        """What run(*args) gives, and how many compilations it took."""
        before = self.graphs
        return run(*args), self.graphs - before


def counting(name: str) -> Iterator[Counting]:
    """The blocks compiled by torch's backend of that name, until the end of the test."""
    import torch._dynamo

    found = Counting(torch._dynamo.lookup_backend(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=found))
        yield found
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def traced() -> Iterator[Counting]:
    yield from counting("aot_eager")


@torch.no_grad()
def velocity(model: FluxTransformer, side: int = 4, length: int = 5) -> Tensor:
    """The velocity of random tokens of a square latent, for a random prompt, sigma and all."""
    prepared = model.prepare(text(side, length=length), [0.3 + 0.01 * length], side, side)
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randn(1, (side // 2) ** 2, model.spec.in_channels, generator=generator)
    return model(tokens, prepared, 0.3 + 0.01 * length)


@torch.no_grad()
def singles(model: FluxTransformer, side: int = 4, rows: int = 1, batch: int = 1) -> Tensor:
    """The velocity of a model with single blocks alone, which have every kind of layer."""
    prepared = model.prepare(text(side, rows=rows), [0.5], side, side)
    generator = torch.Generator().manual_seed(side)
    tokens = torch.randn(batch, (side // 2) ** 2, model.spec.in_channels, generator=generator)
    return model(tokens, prepared, 0.5)


def assert_same(found: Tensor, expected: Tensor, of_largest: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= of_largest * expected.abs().max()


def keep_stored(model: FluxTransformer, make: Callable[[nn.Linear, int], QuantizedWeight]) -> FluxTransformer:
    """The model with the layers of its single blocks in another form, each of other numbers."""
    for i, block in enumerate(model.single_blocks):
        for name in ("linear1", "linear2"):
            layer = getattr(block, name)
            setattr(block, name, QuantizedLinear(make(layer, i), layer.bias, torch.float32))
    return model


def q4_k(layer: nn.Linear, seed: int) -> QuantizedWeight:
    rows, width = layer.weight.shape
    data = reference.random_blocks("Q4_K", rows, width // 256, seed, largest=5e-4)
    return GGUFWeight(torch.from_numpy(data), "Q4_K")


def lora_file(model: FluxTransformer, folder: Path, rank: int = 3) -> Path:
    """A LoRA in kohya's format of every layer of the single blocks."""
    tensors, generator = {}, torch.Generator().manual_seed(rank)
    for i, block in enumerate(model.single_blocks):
        for name in ("linear1", "linear2"):
            layer, stem = getattr(block, name), f"lora_unet_single_blocks_{i}_{name}"
            draw = functools.partial(torch.randn, generator=generator)
            tensors[f"{stem}.lora_down.weight"] = draw(rank, layer.in_features) / 16
            tensors[f"{stem}.lora_up.weight"] = 0.3 * draw(layer.out_features, rank)
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


@pytest.mark.slow
def test_all_blocks_of_a_class_are_one_compilation(traced: Counting) -> None:
    """For every size, prompt, seed and sigma, and for another model of the same sizes."""
    model = flux_transformer(depth_single=4, **SINGLES)
    compiled = compile_blocks(model)
    found, graphs = traced.during(singles, compiled)
    assert graphs == 1
    assert_same(found, singles(model))
    for other in (model, flux_transformer(seed=7, **SINGLES)):
        for side in (4, 6, 8, 16):
            found, graphs = traced.during(singles, compile_blocks(other), side)
            assert graphs == 0
            assert_same(found, singles(other, side))


@pytest.mark.slow
def test_a_batch_of_any_size_is_one_compilation(traced: Counting) -> None:
    model = flux_transformer(**SINGLES)
    compiled = compile_blocks(model)
    for rows, batch, expected in ((1, 2, 1), (1, 3, 0), (2, 2, 1), (4, 4, 0)):
        found, graphs = traced.during(singles, compiled, 4, rows, batch)
        assert graphs == expected, (rows, batch)
        assert_same(found, singles(model, rows=rows, batch=batch))


@pytest.mark.slow
def test_weights_stay_as_they_are_stored(traced: Counting) -> None:
    """Another block's scales and offsets are inputs, too."""

    def make(layer: nn.Linear, number: int) -> QuantizedWeight:
        wide = layer.out_features > layer.in_features
        return (reference.nested_nf4 if wide else lambda w: reference.gguf(w, "Q8_0"))(layer.weight)[0]

    model = keep_stored(flux_transformer(**SINGLES), make)
    labels = [model.single_blocks[0].get_submodule(name).quantized.label for name in ("linear1", "linear2")]
    assert labels == ["bitsandbytes NF4", "GGUF Q8_0"]
    compiled = compile_blocks(model)
    found, graphs = traced.during(singles, compiled)
    assert graphs == 1 and isinstance(compiled.single_blocks[0].linear1, QuantizedLinear)
    assert_same(found, singles(model))
    found, graphs = traced.during(singles, compiled, 6)
    assert graphs == 0
    assert_same(found, singles(model, 6))


@pytest.mark.slow
def test_another_strength_of_a_lora_compiles_nothing(traced: Counting, tmp_path: Path) -> None:
    """Over quantised weights, and attached before or after compiling."""
    model = keep_stored(flux_transformer(**SINGLES), q4_k)
    file = read_lora(lora_file(model, tmp_path), model.spec)
    compiled = compile_blocks(with_lora(model, [LoraUse(file, 0.5)])[0])
    found, graphs = traced.during(singles, compiled)
    assert graphs == 1
    for strength in (0.5, 1.0, -2.0):
        expected = singles(with_lora(model, [LoraUse(file, strength)])[0])
        after, _ = with_lora(compile_blocks(model), [LoraUse(file, strength)])
        found, graphs = traced.during(singles, after)
        assert graphs == 0
        assert_same(found, expected)
    assert not torch.equal(found, singles(model))


@pytest.mark.slow
@pytest.mark.parametrize("codes", [False, True])
def test_streamed_blocks_are_one_compilation(traced: Counting, codes: bool) -> None:
    """Whether a block's weights stay or come, in whichever buffer, in a run after another."""
    model = flux_transformer(depth=3, depth_single=5, **SIZES)
    if codes:
        keep_stored(model, q4_k)
    compiled = compile_blocks(model)
    expected, graphs = traced.during(velocity, compiled)
    assert graphs <= 2
    offload_some(compiled, every=2)
    for _ in range(2):
        found, graphs = traced.during(velocity, compiled)
        assert graphs == 0
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "of_largest"), [("packed", 1e-5), ("int8", 2e-3), ("fp8", 5e-3)])
def test_layers_that_are_one_operation(
    traced: Counting, monkeypatch: pytest.MonkeyPatch, kind: str, of_largest: float
) -> None:
    """In 8 bits an input that is rounded otherwise may be another code. One block stays as it is in fp8."""
    model = flux_transformer(**SINGLES)
    singles(compile_blocks(model))
    monkeypatch.setattr(cpu_pack, "packed_sizes", lambda dtype: (1, math.inf))
    change = {
        "packed": cpu_pack.pack_weights,
        "int8": quantize.quantize_to_int8,
        "fp8": quantize.quantize_to_fp8,
    }
    assert change[kind](model)
    compiled = compile_blocks(model)
    found, graphs = traced.during(singles, compiled)
    assert graphs == 1
    assert_same(found, singles(model), of_largest)
    found, graphs = traced.during(singles, compiled, 6)
    assert graphs == 0
    assert_same(found, singles(model, 6), of_largest)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch, by torch
def test_inductor_with_a_lora_over_gguf_and_a_cache(tmp_path: Path) -> None:
    """Whole runs are the eager ones: one compilation a class, none for another strength, size or prompt."""
    model = keep_stored(flux_transformer(**SIZES), q4_k)
    file = read_lora(lora_file(model, tmp_path), model.spec)
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))

    def run(model: FluxTransformer) -> tuple[Tensor, StepCache]:
        memory = Caching("forecast", 0.6).new_cache()
        sigmas, euler = torch.linspace(1, 0, 7), solver_named("euler")
        zero = torch.zeros_like(noise)
        return sample(
            model, SampleRequest(text(0), noise, zero, sigmas, euler, new_cache=lambda: memory)
        ), memory

    for inductor in counting("inductor"):
        for strength, expected in ((0.1, 2), (0.2, 0)):
            attached, _ = with_lora(model, [LoraUse(file, strength)])
            compiled = compile_blocks(attached)
            (found, memory), graphs = inductor.during(run, compiled)
            plain, told = run(attached)
            assert graphs == expected
            assert_same(found, plain)
            assert memory.skipped == told.skipped > 0
        for side, length in ((6, 5), (4, 9), (8, 16), (4, 4), (12, 2)):  # with as many words as patches, too
            found, graphs = inductor.during(velocity, compiled, side, length)
            assert graphs == 0, (side, length)
            assert_same(found, velocity(attached, side, length))


def test_modes() -> None:
    model = flux_transformer()
    with pytest.raises(ValueError, match="'fast'"):
        compile_blocks(model, "fast")
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device"):
        compile_blocks(model, "cuda graphs")


def test_the_model_that_came_in_stays_as_it_was() -> None:
    model = flux_transformer()
    compiled = compile_blocks(model)
    assert model.runner is None and isinstance(compiled.runner, compiling.CompiledBlocks)
    ours, theirs = dict(model.named_parameters()), dict(compiled.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    assert compiled.double_blocks[0] is not model.double_blocks[0]


def test_every_block_goes_through_the_runner() -> None:
    model, called = flux_transformer(), []

    def runner(block: nn.Module, inputs: tuple[Any, ...], shared: Shared) -> Any:
        called.append(block)
        return block(*inputs, shared)

    expected = velocity(model)
    model.runner = runner
    torch.testing.assert_close(velocity(model), expected, rtol=1e-5, atol=1e-5)
    assert called == [*model.double_blocks, *model.single_blocks]


def why(device: str = "cpu") -> str:
    with pytest.raises(ValueError) as raised:
        compiling.check(torch.device(device))
    return str(raised.value)


def test_what_is_missing_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling.check(torch.device("cpu"))
    assert why("mps").startswith("blocks are compiled for a CPU or a CUDA device, this model computes on mps")
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert why("cuda").startswith("compiling for a CUDA device needs the package triton; install it")
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
    assert why().startswith("compiling needs Python's headers, found no /nowhere/Python.h; install them")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert why("cuda").startswith("compiling needs gcc or clang on the PATH, found none; install a C++ comp")
    monkeypatch.setenv("CXX", "c++-17")
    said = "compiling needs c++-17 on the PATH, found none; install a C++ compiler, or go without compiling"
    assert why() == said
    with pytest.raises(ValueError, match="c..-17 on the PATH"):
        compile_blocks(flux_transformer())


@pytest.mark.parametrize(
    ("platform", "cpu", "cuda"),
    [
        ("linux", ("g++",), ("gcc", "clang")),
        ("darwin", ("clang++",), ("gcc", "clang")),
        ("win32", ("cl",), ()),
    ],
)
def test_the_compilers_of_a_system(
    monkeypatch: pytest.MonkeyPatch, platform: str, cpu: tuple[str, ...], cuda: tuple[str, ...]
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiling.sys, "platform", platform)
    assert compiling._compilers(torch.device("cpu")) == cpu
    assert compiling._compilers(torch.device("cuda")) == cuda
