"""A model with offloaded blocks gives the very velocity of one that is all resident."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.models import flux_transformer, text
from rectiflux.benchmarks.reference.quantized_files import (
    WIDE,
    wide_transformer,
    write_gguf,
    write_quantized_safetensors,
)
from rectiflux.flux_core.memory import WeightStreamer, stream
from rectiflux.flux_core.memory.disk_offload import DiskOffloader, lies_in, mapped_files
from rectiflux.flux_core.memory.host_offload import HostOffloader
from rectiflux.flux_core.memory.plan import resident_parts
from rectiflux.flux_core.memory.streaming import weight_slots, weights_of
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.flux_core.pipeline import VelocityRequest, guided_velocity
from rectiflux.flux_core.weights import load_transformer
from safetensors.torch import save_file
from torch import Tensor, nn

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the system decides")
SIGMAS = [1.0, 0.5]


def velocities(model: FluxTransformer) -> Tensor:
    """Two evaluations of a run, as a sampler makes them."""
    spec = model.spec
    prompt = text(0)
    if spec.context_in != prompt.txt.shape[-1]:
        generator = torch.Generator().manual_seed(0)
        wide = torch.randn(1, 5, spec.context_in, generator=generator)
        prompt = type(prompt)(wide, torch.randn(1, spec.vec_in, generator=generator), 3.5)
    noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        velocity = guided_velocity(model, VelocityRequest(prompt, SIGMAS, 4, 6, 1))
        return torch.cat([velocity(noise, sigma) for sigma in SIGMAS])


def file_of(model: FluxTransformer, folder: Path, format: str) -> Path:
    path = folder / f"model.{'gguf' if format.startswith('GGUF') else 'safetensors'}"
    if format == "plain":
        save_file(model.state_dict(), path)
    elif format.startswith("GGUF"):
        write_gguf(model.state_dict(), path, format.removeprefix("GGUF "))
    else:
        write_quantized_safetensors(model.state_dict(), path, format)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that have not been written to disk cannot be evicted
    return path


def resident(path: Path) -> int:
    """Bytes of the file that are mapped into this process and in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split(maxsplit=1)[0] and not line.split(maxsplit=1)[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


# Offloaded to disk, for a CPU


@linux
@pytest.mark.parametrize("format", ["plain", "fp8 e4m3fn", "scale_weight", "GGUF Q4_K"])
def test_pages_of_a_mapped_file_are_evicted(tmp_path: Path, format: str) -> None:
    path = file_of(flux_transformer(**{**WIDE, "depth": 4, "depth_single": 4}), tmp_path, format)
    expected = velocities(load_transformer(path, torch.float32))
    model = stream(load_transformer(path, torch.float32), "cpu", 0)
    assert torch.equal(velocities(model), expected)
    disk_offloader(model).close()
    parts = [*model.modulations(), *model.double_blocks, *model.single_blocks]
    blocks = sum(t.nbytes for part in parts for t in weights_of(part))
    assert blocks > 0.8 * path.stat().st_size
    assert resident(path) < 0.4 * path.stat().st_size


def disk_offloader(model: FluxTransformer) -> DiskOffloader:
    assert isinstance(model.streaming, WeightStreamer)
    assert isinstance(model.streaming.offloader, DiskOffloader)
    return model.streaming.offloader


@linux
def test_a_model_within_the_limit_is_not_offloaded(tmp_path: Path) -> None:
    path = file_of(flux_transformer(), tmp_path, "plain")
    assert stream(load_transformer(path), "cpu", path.stat().st_size).streaming is None
    assert stream(load_transformer(path), "cpu", None).streaming is None


@linux
def test_only_memory_of_mapped_files_is_offloaded(tmp_path: Path) -> None:
    model = stream(flux_transformer(), "cpu", 0)
    assert not any(disk_offloader(model).is_offloaded(block) for block in model.double_blocks)
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    mapped = torch.from_file(str(path), size=1 << 16, dtype=torch.uint8)
    files = mapped_files()
    assert lies_in(files, mapped)
    assert not lies_in(files, torch.zeros(1 << 16, dtype=torch.uint8))


def test_the_next_offloaded_part_is_prefetched() -> None:
    """Before each part computes; the last one prefetches the first of those that come after."""
    events: list[tuple[str, nn.Module]] = []

    class Recorder:
        def is_offloaded(self, part: nn.Module) -> bool:
            return part is not b

        def prefetch(self, part: nn.Module) -> None:
            events.append(("prefetch", part))

        def wait(self, part: nn.Module) -> None:
            events.append(("wait", part))

        def evict(self, part: nn.Module) -> None:
            events.append(("evict", part))

    a, b, c, d = (nn.Identity() for _ in range(4))
    for part in WeightStreamer(Recorder()).each([a, b, c], then=[b, d]):
        events.append(("compute", part))
    first = [("wait", a), ("prefetch", c), ("compute", a), ("evict", a), ("compute", b)]
    assert events == [*first, ("wait", c), ("prefetch", d), ("compute", c), ("evict", c)]


# Offloaded to host memory, for a device; here both are the CPU, and a set of tensors counts as offloaded


class HostOffloaderOfSome(HostOffloader):
    """Its device is the CPU, and some tensors are offloaded."""

    def __init__(self, offloaded: list[Tensor], cache_limit: int = 0) -> None:
        super().__init__(torch.device("cpu"), cache_limit)
        self.offloaded = {id(tensor) for tensor in offloaded}

    def is_elsewhere(self, tensor: Tensor) -> bool:
        return id(tensor) in self.offloaded


def offload_some(model: FluxTransformer, every: int = 1, cache_limit: int = 0) -> HostOffloader:
    """Stream a model, with every n-th of its parts offloaded."""
    parts = [*model.modulations(), *model.double_blocks, *model.single_blocks][::every]
    offloader = HostOffloaderOfSome([t for part in parts for t in weights_of(part)], cache_limit)
    model.streaming = WeightStreamer(offloader)
    return offloader


def pointers(model: FluxTransformer) -> list[int]:
    return [slot.tensor.data_ptr() for slot in weight_slots(model)]


@pytest.mark.parametrize("every", [1, 2])
def test_two_buffers_give_the_same_velocity(every: int) -> None:
    model = flux_transformer()
    expected, before = velocities(model), pointers(model)
    offloader = offload_some(model, every)
    assert torch.equal(velocities(model), expected)
    assert pointers(model) == before and offloader.device_bytes > 0


def test_gathered_weights_are_cached_within_a_limit() -> None:
    """Room for the first block only: it is gathered once, the others at every step."""
    model, zeroed = flux_transformer(), flux_transformer()
    block = model.double_blocks[0]
    offload_some(model, cache_limit=sum(-(-t.nbytes // 256) * 256 for t in weights_of(block)))
    assert torch.equal(velocities(model), velocities(zeroed))
    with torch.no_grad():
        for tensor in (*weights_of(block), *weights_of(model.single_blocks[0])):
            tensor.zero_()  # unseen in the cache, seen where the weights are gathered again
        for tensor in weights_of(zeroed.single_blocks[0]):
            tensor.zero_()
    assert torch.equal(velocities(model), velocities(zeroed))


def test_cached_weights_go_with_their_tensors() -> None:
    """A LoRA's tensors die, and the next one's may have their addresses and sizes."""
    model, twin = flux_transformer(), flux_transformer()
    block, other = model.double_blocks[0], twin.double_blocks[0]
    offloader = offload_some(model, cache_limit=sum(-(-t.nbytes // 256) * 256 for t in weights_of(block)))
    assert isinstance(offloader, HostOffloaderOfSome)
    assert torch.equal(velocities(model), velocities(twin))
    for factor in (2.0, 3.0):
        for part in (block, other):
            layer = part.img_attn.proj
            layer.weight = nn.Parameter(factor * layer.weight.detach().clone(), requires_grad=False)
        offloader.offloaded.add(id(block.img_attn.proj.weight))
        assert torch.equal(velocities(model), velocities(twin))
    with torch.no_grad():
        block.img_attn.proj.weight.zero_()  # unseen: the new weights are in the room of the old ones
    assert torch.equal(velocities(model), velocities(twin))


def test_a_quantized_layer_stays_quantized_in_the_buffers(tmp_path: Path) -> None:
    path = file_of(wide_transformer(), tmp_path, "GGUF Q4_K")
    expected = velocities(load_transformer(path, torch.float32))
    model = load_transformer(path, torch.float32)
    offloader = offload_some(model)
    assert torch.equal(velocities(model), expected)
    assert offloader.device_bytes < 2 * path.stat().st_size


def test_a_run_after_an_interrupted_one_is_right() -> None:
    model = flux_transformer()
    expected, before = velocities(model), pointers(model)
    offload_some(model)
    assert isinstance(model.streaming, WeightStreamer)
    blocks: Iterator[nn.Module] = model.streaming.each(list(model.double_blocks))
    next(blocks)
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]  # a generator
    assert pointers(model) == before
    assert torch.equal(velocities(model), expected)


def test_resident_blocks_are_spread_evenly() -> None:
    assert resident_parts([10] * 8, [5] * 4, 40) == {1, 3, 5, 7}
    assert resident_parts([10] * 8, [5] * 4, 80) == set(range(8))
    assert resident_parts([10] * 8, [5] * 4, 90) == {*range(8), 8, 9}
    assert resident_parts([10] * 8, [5] * 4, -1) == set()
    sizes = [30, 30, 10, 10, 10, 10]
    assert sum(sizes[index] for index in resident_parts(sizes, [], 60)) <= 60
