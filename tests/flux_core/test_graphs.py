"""Recorded steps are the steps: nothing stale, nothing shared, and no recording where none may be.

What records here traces the operations (make_fx) and replays them without a line of the model's Python, into
the same memory each time: what a CUDA graph does. What only a GPU can show is not tested. What a CPU does is
at the end, and in test_recorder.py.
"""

from __future__ import annotations

import ast
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rectiflux.benchmarks.reference.models import flux_transformer as of_sizes
from rectiflux.benchmarks.reference.models import relative_error, text
from rectiflux.flux_core import graphs
from rectiflux.flux_core.caching import Caching
from rectiflux.flux_core.graphs import KEPT, UNRECORDED, Replay, recorder_for, steps_of
from rectiflux.flux_core.pipeline import guided_velocity
from rectiflux.flux_core.spec import Conditioning
from rectiflux.flux_core.streaming import stream
from rectiflux.flux_core.transformer import FluxTransformer
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2]
CPU = torch.device("cpu")


def flux_transformer(seed: int = 0) -> FluxTransformer:
    return of_sizes(seed, depth=1, depth_single=1)


class Traced:
    """Records as said above, as soon as a GPU does, and counts."""

    unrecorded = 0

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def pays(self, tokens: int, width: int) -> bool:
        return tokens <= graphs.TOKENS

    def record(self, work: Callable[[], Tensor]) -> Replay:
        self.recorded += 1
        operations = make_fx(work)()
        result = operations().clone()

        def replay() -> Tensor:
            self.replayed += 1
            return result.copy_(operations())

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Traced:
    """One that records on the CPU."""
    made = Traced()
    monkeypatch.setattr(graphs, "recorder_for", lambda device: made)
    monkeypatch.setattr(graphs, "_of_model", weakref.WeakKeyDictionary())
    return made


def run(
    model: FluxTransformer,
    positive: Conditioning,
    negative: Conditioning | None = None,
    batch: int = 1,
    seed: int = 0,
    h: int = 4,
    sigmas: list[float] = SIGMAS,
    **options: Any,
) -> list[Tensor]:
    """The velocities of a run, each of another latent."""
    drawn = torch.randn(len(sigmas), batch, 16, h, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        scale = 1.0 if negative is None else 3.0
        velocity = guided_velocity(model, positive, negative, scale, sigmas, h, 4, batch, **options)
        return [velocity(x, sigma) for x, sigma in zip(drawn, sigmas, strict=True)]


def plainly(*args: Any, **kwargs: Any) -> list[Tensor]:
    """The same run without recordings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "steps_of", lambda model: model)
        patch.setattr("rectiflux.flux_core.pipeline.steps_of", lambda model: model)
        return run(*args, **kwargs)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, plain in zip(found, expected, strict=True):
        assert relative_error(ours, plain) < 1e-6


@pytest.mark.parametrize(
    ("negative", "batch", "recordings", "replays"),
    [
        pytest.param(None, 1, 1, 4, id="one prompt"),
        pytest.param(None, 3, 1, 4, id="a batch"),
        pytest.param(text(1), 1, 1, 4, id="a negative prompt in the same batch"),
        pytest.param(text(1, length=4), 1, 2, 8, id="a negative prompt of another length"),
        pytest.param(text(1, guidance=2.0), 2, 1, 9, id="a negative prompt with its own guidance"),
    ],
)
def test_replayed_steps_are_the_steps(
    negative: Conditioning | None, batch: int, recordings: int, replays: int, recorder: Traced
) -> None:
    """Of each shape the first step is recorded; all later ones are replayed, the second to be compared."""
    model = flux_transformer()
    found = run(model, text(0), negative, batch)
    assert_same(found, plainly(model, text(0), negative, batch))
    assert (recorder.recorded, recorder.replayed) == (recordings, replays)


def test_another_run_of_the_shape_uses_the_recording(
    recorder: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other prompts, latents and sigmas, and none of the model's Python."""
    model = flux_transformer()
    run(model, text(0))
    called = []
    plain_blocks = model.blocks
    monkeypatch.setattr(model, "blocks", lambda *args: called.append(1) or plain_blocks(*args))
    other = run(model, text(7, guidance=1.5), seed=7, sigmas=[0.9, 0.5])
    assert recorder.recorded == 1 and not called
    assert_same(other, plainly(model, text(7, guidance=1.5), seed=7, sigmas=[0.9, 0.5]))


def test_a_solver_that_chooses_its_sigmas_is_served(recorder: Traced) -> None:
    model = flux_transformer()
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = guided_velocity(model, text(0), None, 1.0, None, 4, 4, 1)
        found = [velocity(noise, sigma) for sigma in (0.9, 0.7, 0.8, 0.7)]
        prepared = guided_velocity(flux_transformer(), text(0), None, 1.0, [0.9, 0.7, 0.8], 4, 4, 1)
        expected = [prepared(noise, sigma) for sigma in (0.9, 0.7, 0.8, 0.7)]
    assert recorder.recorded == 2 and recorder.replayed >= 3
    assert_same(found, expected)


def test_each_step_has_its_result_for_itself(recorder: Traced) -> None:
    found = run(flux_transformer(), text(0))
    assert len({result.data_ptr() for result in found}) == len(found)
    kept = [result.clone() for result in found]
    for result in found:
        result.zero_()
    assert_same(run(flux_transformer(), text(0)), kept)


def test_few_shapes_are_kept_and_the_oldest_goes(recorder: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    def quickly(work: Callable[[], Tensor]) -> Replay:
        recorder.recorded += 1
        return work

    monkeypatch.setattr(recorder, "record", quickly)
    model = flux_transformer()
    lengths = list(range(1, KEPT + 1))
    for length in lengths:
        run(model, text(0, length=length), sigmas=SIGMAS[:2])
    run(model, text(0, length=1), sigmas=SIGMAS[:3])  # used again: now 2 is the oldest
    run(model, text(0, length=9), sigmas=SIGMAS[:1])
    assert recorder.recorded == KEPT + 1
    assert len(graphs._of_model[model]) == KEPT
    run(model, text(0, length=1), sigmas=SIGMAS[:1])
    assert recorder.recorded == KEPT + 1
    run(model, text(0, length=2), sigmas=SIGMAS[:1])
    assert recorder.recorded == KEPT + 2


def test_each_model_has_recordings_of_its_own_and_takes_them_along(
    recorder: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a LoRA does, which makes a copy of the model that shares its numbers (flux_core/lora/attach.py)."""
    monkeypatch.setattr(recorder, "record", lambda work: work().clone)  # keeps no model, as a graph
    one, other = flux_transformer(0), flux_transformer(1)
    for model in (one, other):
        run(model, text(0), sigmas=SIGMAS[:1])
    assert set(graphs._of_model) == {one, other}
    gone = weakref.ref(one)
    del one, model
    gc.collect()
    assert gone() is None and set(graphs._of_model) == {other}


def test_weights_that_moved_are_recorded_anew(recorder: Traced) -> None:
    model = flux_transformer()
    run(model, text(0))
    model.img_in.weight = torch.nn.Parameter(2 * model.img_in.weight, requires_grad=False)
    found = run(model, text(0))
    assert recorder.recorded == 2
    assert_same(found, plainly(model, text(0)))


def test_weights_changed_in_place_need_no_recording(recorder: Traced) -> None:
    model = flux_transformer()
    run(model, text(0))
    model.img_in.weight *= 2
    assert_same(run(model, text(0)), plainly(model, text(0)))
    assert recorder.recorded == 1


# Where nothing is recorded


def test_steps_that_a_cache_may_skip_are_not_recorded(recorder: Traced) -> None:
    model = flux_transformer()
    memory = Caching("first block", 0.0).memory
    assert_same(run(model, text(0), memory=memory), plainly(model, text(0)))
    assert recorder.recorded == 0


def test_streamed_and_watched_models_are_not_recorded(recorder: Traced) -> None:
    streamed, watched = stream(flux_transformer(), "cpu", 0), flux_transformer()
    called = []
    watched.single_blocks[0].register_forward_hook(lambda *_: called.append(1))
    run(streamed, text(0))
    run(watched, text(0))
    assert recorder.recorded == 0 and len(called) == len(SIGMAS)


def test_neither_large_pictures_nor_gradients_nor_full_memory(
    recorder: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = flux_transformer()
    monkeypatch.setattr(graphs, "TOKENS", 8)
    run(model, text(0), batch=3)  # of 4 tokens each
    assert recorder.recorded == 0
    tokens, prepared = torch.zeros(1, 4, 64), model.prepare(text(0), [0.5], 4, 4)
    with torch.enable_grad():
        steps_of(model)(tokens, prepared, 0.5, None)
    assert recorder.recorded == 0
    monkeypatch.setattr(graphs, "_has_room", lambda device: False)
    assert_same(run(model, text(0)), plainly(model, text(0)))
    assert recorder.recorded == 0


def test_a_gpu_keeps_room_for_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": graphs.KEPT_FREE}
    monkeypatch.setattr(graphs, "free_memory", lambda device: free["bytes"])
    assert graphs._has_room(torch.device("cuda"))
    free["bytes"] -= 1
    assert not graphs._has_room(torch.device("cuda")) and graphs._has_room(CPU)


@pytest.mark.parametrize(
    ("asked", "cpu", "cuda"), [(None, True, False), ("1", True, True), ("0", False, False)]
)
def test_a_cpu_records_unless_it_is_not_wanted_and_a_gpu_where_it_is(
    asked: str | None, cpu: bool, cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: f"on {device}")
    monkeypatch.delenv("RECTIFLUX_GRAPHS", raising=False)
    if asked is not None:
        monkeypatch.setenv("RECTIFLUX_GRAPHS", asked)
    assert (recorder_for(CPU) is not None) == cpu
    assert recorder_for(torch.device("cuda", 1)) == ("on cuda:1" if cuda else None)
    assert recorder_for(torch.device("mps")) is None
    model = flux_transformer()
    assert (steps_of(model) is model) == (not cpu)


def test_comfyui_does_not_come_through_here() -> None:
    """It moves weights between calls, which a recording would not see."""
    runs = {"guided_velocity", "sample", "text_to_image", "steps_of"}
    for file in sorted((Path(graphs.__file__).parents[1] / "nodes").glob("_comfy*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flux_core"):
                assert not runs & {alias.name for alias in node.names}, file.name


# What fails


def test_an_error_is_told_once_and_the_model_goes_on(
    recorder: Traced, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fails(work: Callable[[], Tensor]) -> Replay:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "record", fails)
    model = flux_transformer()
    for length in (5, 6):
        assert_same(run(model, text(0, length=length)), plainly(model, text(0, length=length)))
    assert len(tried) == 1
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "the model's steps are launched one operation at a time, because a step cannot be recorded: "
        "operation not permitted when stream is capturing"
    ]


def test_a_recording_that_is_stale_is_found_out(
    recorder: Traced, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that gives again what it gave: the second step is computed both ways."""

    def stale(work: Callable[[], Tensor]) -> Replay:
        recorder.recorded += 1
        result = work()
        return lambda: result

    monkeypatch.setattr(recorder, "record", stale)
    model = flux_transformer()
    assert_same(run(model, text(0)), plainly(model, text(0)))
    assert recorder.recorded == 1
    assert len(caplog.records) == 1
    assert "because a step gives something else when it is replayed (by " in caplog.records[0].message


def test_an_unprepared_sigma_is_told_as_ever(recorder: Traced) -> None:
    model = flux_transformer()
    prepared = model.prepare(text(0), [0.5], 4, 4)
    with torch.no_grad(), pytest.raises(ValueError, match="sigma 0.25 was not prepared; pass every sigma"):
        steps_of(model)(torch.zeros(1, 4, 64), prepared, 0.25, None)


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pool for all recordings; other threads may use the device while this one records."""
    asked: list[Any] = []

    class Graph:
        def replay(self) -> None:
            asked.append("replay")

    @contextmanager
    def capture(graph: Graph, **options: Any) -> Iterator[None]:
        asked.append(options)
        yield

    @contextmanager
    def device(index: torch.device) -> Iterator[None]:
        yield

    fake = SimpleNamespace(device=device, graph_pool_handle=lambda: "pool", CUDAGraph=Graph, graph=capture)
    monkeypatch.setattr(graphs.torch, "cuda", fake)
    made = graphs.CudaRecorder(torch.device("cuda"))
    result = torch.ones(1)
    for _ in range(2):
        replay = made.record(lambda: result)
    assert replay() is result
    options = {"pool": "pool", "capture_error_mode": "thread_local"}
    assert asked == [options, options, "replay"]


# A CPU


def test_a_cpu_records_small_models_after_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same numbers, to the last bit."""
    monkeypatch.setattr(graphs, "_of_model", weakref.WeakKeyDictionary())
    model = flux_transformer()
    called = []
    plain_blocks = model.blocks
    monkeypatch.setattr(model, "blocks", lambda *args: called.append(1) or plain_blocks(*args))
    sigmas = [1 - i / (UNRECORDED + 5) for i in range(UNRECORDED + 5)]
    found = run(model, text(0), sigmas=sigmas)
    assert len(called) == UNRECORDED + 3  # one to be recorded, its recording, and one that proves it
    for ours, plain in zip(found, plainly(model, text(0), sigmas=sigmas), strict=True):
        assert torch.equal(ours, plain)
    wide = graphs.NUMBERS // (2 * model.spec.hidden_size) + 2  # 2 x wide tokens
    run(model, text(0), h=2 * wide, sigmas=sigmas)
    assert len(graphs._of_model[model]) == 1


def test_a_cpu_records_in_inference_mode_and_goes_on_in_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_of_model", weakref.WeakKeyDictionary())
    model = flux_transformer()
    sigmas = [1 - i / (UNRECORDED + 3) for i in range(UNRECORDED + 3)]
    with torch.inference_mode():
        run(model, text(0), text(1), sigmas=sigmas)
    (buffers,) = graphs._of_model[model]._kept.values()
    assert buffers.proven
    assert_same(run(model, text(2), text(3), seed=1), plainly(model, text(2), text(3), seed=1))


def test_blocks_that_are_compiled_for_a_cpu_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = flux_transformer()
    monkeypatch.setattr(model, "runner", lambda block, *inputs: block(*inputs))
    assert steps_of(model) is model
