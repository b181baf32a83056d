"""Blocks that come in ahead of use give the very velocity of a model that is all there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from rectiflux.flux_core.memory import Streaming, disk_offload, limit_of, plan, stream
from rectiflux.flux_core.memory import limits as memory
from rectiflux.flux_core.memory.host_offload import Stager
from rectiflux.flux_core.memory.streaming import Place, places, weights_of
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.flux_core.pipeline import VelocityRequest, guided_velocity
from rectiflux.flux_core.weights import load_transformer
from safetensors.torch import save_file
from torch import Tensor, nn

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system alone pages")
SIGMAS = [1.0, 0.5]


def velocities(model: FluxTransformer, sizes: int = 0) -> Tensor:
    """Two evaluations of a run of its own, as a sampler makes them."""
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


def file_of(model: FluxTransformer, folder: Path, form: str) -> Path:
    path = folder / f"model.{'gguf' if form.startswith('GGUF') else 'safetensors'}"
    if form == "plain":
        save_file(model.state_dict(), path)
    elif form.startswith("GGUF"):
        write_gguf(model.state_dict(), path, form.removeprefix("GGUF "))
    else:
        write_quantized_safetensors(model.state_dict(), path, form)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are not on the disk yet cannot be given back
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


# On a CPU


@linux
@pytest.mark.parametrize("form", ["plain", "fp8 e4m3fn", "scale_weight", "GGUF Q4_K"])
def test_a_mapped_file_gives_its_pages_back(tmp_path: Path, form: str) -> None:
    path = file_of(flux_transformer(**{**WIDE, "depth": 4, "depth_single": 4}), tmp_path, form)
    expected = velocities(load_transformer(path, torch.float32))
    model = stream(load_transformer(path, torch.float32), "cpu", 0)
    assert isinstance(model.streaming, Streaming)
    assert torch.equal(velocities(model), expected)
    mover = model.streaming.mover
    assert isinstance(mover, disk_offload.Pager)
    mover._thread.shutdown(wait=True)  # what was asked of the system is done
    parts = [*model.modulations(), *model.double_blocks, *model.single_blocks]
    blocks = sum(t.nbytes for part in parts for t in weights_of(part))
    assert blocks > 0.8 * path.stat().st_size
    assert resident(path) < 0.4 * path.stat().st_size


@linux
def test_what_fits_is_left_alone(tmp_path: Path) -> None:
    path = file_of(flux_transformer(), tmp_path, "plain")
    assert stream(load_transformer(path), "cpu", path.stat().st_size).streaming is None
    assert stream(load_transformer(path), "cpu", None).streaming is None


@linux
def test_memory_of_no_file_is_never_given_back() -> None:
    model = stream(flux_transformer(), "cpu", 0)
    assert isinstance(model.streaming, Streaming)
    assert not any(model.streaming.mover.is_far(block) for block in model.double_blocks)


@linux
def test_pages_are_asked_for_one_part_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    names = {disk_offload.POPULATE_READ: "read", disk_offload.PAGE_OUT: "give back"}

    def advise(start: int, stop: int, advice: int) -> bool:
        asked.append((names[advice], start))
        return True

    monkeypatch.setattr(disk_offload, "_advise", advise)
    model = stream(load_transformer(file_of(flux_transformer(), tmp_path, "plain")), "cpu", 0)
    assert isinstance(model.streaming, Streaming)
    blocks = list(model.single_blocks)
    for block in model.streaming.each(blocks, then=list(model.double_blocks)):
        asked.append(("compute", blocks.index(block)))
    model.streaming.mover._thread.shutdown(wait=True)  # type: ignore[attr-defined]
    order = [what for what, _ in asked if what != "give back"]
    assert [what for what, _ in asked].count("give back") > 0
    assert order.count("compute") == 3
    assert order[0] == "read"  # the second's, before the first computes
    starts = {start for what, start in asked if what == "read"}
    assert all(start % disk_offload.mmap.PAGESIZE == 0 for start in starts)
    first = min(t.data_ptr() for t in weights_of(model.double_blocks[0]))
    assert any(start <= first for start in starts)  # what comes after the last is on its way


@linux
def test_only_files_count_as_mapped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    mapped = torch.from_file(str(path), size=1 << 16, dtype=torch.uint8)
    files = disk_offload.mapped_files()
    assert disk_offload._lies_in(files, mapped)
    assert not disk_offload._lies_in(files, torch.zeros(1 << 16, dtype=torch.uint8))


# On a device, for which a CPU stands in: all that belongs to the far set counts as elsewhere


@dataclass
class Here(Stager):
    """A stager whose device is the CPU."""

    far: set[int]
    keep: int = 0
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(torch.device("cpu"), self.keep)

    def _is_far(self, place: Place) -> bool:
        return id(place[2]) in self.far

    def start(self, part: nn.Module) -> None:
        self.log.append("start")
        super().start(part)


def staged(model: FluxTransformer, every: int = 1, keep: int = 0) -> Here:
    parts = [*model.modulations(), *model.double_blocks, *model.single_blocks][::every]
    stager = Here({id(tensor) for part in parts for tensor in weights_of(part)}, keep)
    model.streaming = Streaming(stager)
    return stager


@pytest.mark.parametrize("every", [1, 2])
def test_two_buffers_give_the_same_velocity(every: int) -> None:
    model = flux_transformer()
    expected = velocities(model)
    before = [(id(kept), name, tensor.data_ptr()) for kept, name, tensor in places(model)]
    stager = staged(model, every)
    assert torch.equal(velocities(model), expected)
    assert before == [(id(kept), name, tensor.data_ptr()) for kept, name, tensor in places(model)]
    assert "start" in stager.log


def test_what_was_gathered_for_a_block_is_kept_within_the_room() -> None:
    """Room for the first block to come alone: it is read once, the others at every step; modulations go."""
    model = flux_transformer()
    expected = velocities(model)
    block = model.double_blocks[0]
    stager = staged(model, keep=sum(-(-t.nbytes // 256) * 256 for t in weights_of(block)))
    assert torch.equal(velocities(model), expected)
    assert list(stager._kept) == [tuple(t.data_ptr() for t in weights_of(block))]
    with torch.no_grad():
        for tensor in (*weights_of(block), *weights_of(model.single_blocks[0])):
            tensor.zero_()  # behind its back: only what is read again can know
    changed = velocities(model)
    plain = flux_transformer()
    with torch.no_grad():
        for tensor in weights_of(plain.single_blocks[0]):
            tensor.zero_()
    assert torch.equal(changed, velocities(plain))


def test_a_stored_layer_is_staged_as_it_is(tmp_path: Path) -> None:
    path = file_of(wide_transformer(), tmp_path, "GGUF Q4_K")
    expected = velocities(load_transformer(path, torch.float32))
    model = load_transformer(path, torch.float32)
    stager = staged(model)
    assert torch.equal(velocities(model), expected)
    assert max(slot.near.numel() for slot in stager._slots) < path.stat().st_size


def test_a_run_that_was_interrupted_leaves_the_next_one_right() -> None:
    model = flux_transformer()
    expected = velocities(model)
    staged(model)
    originals = [tensor for *_, tensor in places(model)]
    assert isinstance(model.streaming, Streaming)
    walk: Iterator[nn.Module] = model.streaming.each(list(model.double_blocks))
    next(walk)
    next(walk)
    walk.close()
    assert all(a is b for a, b in zip(originals, (t for *_, t in places(model)), strict=True))
    assert torch.equal(velocities(model), expected)


# What stays


def test_blocks_that_stay_are_spread_evenly() -> None:
    assert plan.near_parts([10] * 8, [5] * 4, 40) == {1, 3, 5, 7}
    assert plan.near_parts([10] * 8, [5] * 4, 80) == set(range(8))
    assert plan.near_parts([10] * 8, [5] * 4, 90) == {*range(8), 8, 9}
    assert plan.near_parts([10] * 8, [5] * 4, -1) == set()
    sizes = [30, 30, 10, 10, 10, 10]
    near = plan.near_parts(sizes, [], 60)
    assert sum(sizes[number] for number in near) <= 60


# How much


def test_limits_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limit_of("6 GB", "cpu") == 6 << 30
    assert limit_of("none", "cpu") is None
    with pytest.raises(ValueError, match="a memory limit must be one of auto, none, .*, got '7'"):
        limit_of("7", "cpu")
    monkeypatch.setattr(memory, "free_memory", lambda device: 10 << 30)
    assert limit_of("auto", "cpu") == 15 << 29
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 30)
    assert limit_of("auto", "cpu") == 0
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert limit_of("auto", "cpu") is None


@linux
def test_free_memory_of_this_machine_and_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert free is not None and 1 << 20 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text("4096000\n", encoding="ascii")
    (tmp_path / "memory.stat").write_text("anon 4000\nfile 9999999\n", encoding="ascii")
    assert memory._container(tmp_path) == 4_092_000
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert memory._container(tmp_path) is None
    assert memory._container(tmp_path / "none") is None
    assert memory.free_memory(torch.device("meta")) is None
