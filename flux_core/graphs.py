"""A step of the transformer recorded once for a shape, and from then on done in one piece.

A small step is over before Python has launched its next operation: on a GPU at 512 x 512 and below, on a CPU
the miniature's. A recording has no such gaps. On a GPU it is a CUDA graph, on a CPU a list of operations
(recorder.py). It reads and writes the same memory each time, so what differs from step to step (tokens, text,
rotary table, modulations) is copied into buffers of its own before, and what it gives is copied out after. A
shape's first steps are computed as ever, then one is recorded; the next is computed both ways, and a
recording that does not agree is not used. Anything that fails is logged once, and the model goes on without.

Recorded are steps of few tokens of a model whose weights stay where they are. Not recorded: a model that is
streamed, steps that a cache may skip (caching.py), modules with hooks, blocks that are compiled for a CPU,
and models in ComfyUI, which moves weights between calls; it does not come through here. A LoRA makes another
model, with recordings of its own.

CUDA graphs are tested on a CPU, with operations recorded and replayed by other means, but have **not yet run
on a GPU.** So only RECTIFLUX_GRAPHS=1 in the environment switches them on; 0 switches off recording on a CPU.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .recorder import OperationRecorder
from .streaming.memory import KEPT_FREE, free_memory
from .streaming.parts import weights_of
from .transformer import FluxTransformer, Memory, Modulations, Prepared

log = logging.getLogger(__name__)

TOKENS = 1024
"""Image tokens of a step, over its batch, up to which a GPU's launches leave gaps: 512 x 512."""
NUMBERS = 1 << 17
"""Numbers of the image's state, over its batch, up to which a CPU waits for Python more than it is worth."""
UNRECORDED = 8
"""Steps of a shape that a CPU computes as ever, so that a first picture in few steps does not wait for what
only the next ones repay: recording and proving take as long as fifteen recorded steps save.
"""
KEPT = 4
"""Shapes whose recordings a model keeps: two sizes of picture with two lengths of text."""
AGREED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Relative difference up to which a recording agrees: the same sums, perhaps in another order."""

Step = Callable[[Tensor, Prepared, float, Memory | None], Tensor]
"""(tokens, prepared, sigma, memory) -> velocity, as FluxTransformer.forward."""
Replay = Callable[[], Tensor]
"""Computes again from what is in the buffers now. The result is in the same memory each time."""


class Recorder(Protocol):
    """What records operations, so that they can be launched again without Python."""

    unrecorded: int
    """Steps of a shape before one is recorded."""

    def pays(self, tokens: int, width: int) -> bool:
        """Whether a step of so many tokens, over its batch, of a model of that width is worth recording."""
        ...

    def record(self, work: Callable[[], Tensor]) -> Replay: ...


class CudaRecorder:
    """Records by stream capture, all in one pool of memory: no two recordings of a model run at once."""

    unrecorded = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

    def pays(self, tokens: int, width: int) -> bool:
        return tokens <= TOKENS

    def record(self, work: Callable[[], Tensor]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            # thread_local: what the host does on the device in its other threads is no concern of this one
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class CpuRecorder(OperationRecorder):
    """Records operations of models so small that what is between them counts."""

    unrecorded = UNRECORDED

    def pays(self, tokens: int, width: int) -> bool:
        return tokens * width <= NUMBERS


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on a device, None where nothing does or nobody wants it."""
    wanted = os.environ.get("RECTIFLUX_GRAPHS")
    if device.type == "cpu":
        return None if wanted == "0" else CpuRecorder()
    return CudaRecorder(device) if device.type == "cuda" and wanted == "1" else None


@dataclass
class _Buffers:
    """What a recording of one shape reads, and the recording."""

    tokens: Tensor
    txt: Tensor
    rope: tuple[Tensor, Tensor]
    modulations: Modulations
    table: Tensor
    replay: Replay | None = None
    proven: bool = False

    @classmethod
    def like(cls, tokens: Tensor, txt: Tensor, rope: tuple[Tensor, Tensor], made: Modulations) -> _Buffers:
        assert made.table is not None
        with torch.inference_mode(False):  # else nothing could be copied into them outside of that mode
            cos, sin = (_room(table) for table in rope)
            table = _room(made.table)
            return cls(_room(tokens), _room(txt), (cos, sin), made.laid_out(table), table)

    def fill(self, tokens: Tensor, txt: Tensor, rope: tuple[Tensor, Tensor], made: Modulations) -> None:
        """Everything is copied every time: next to a step it is nothing, and nothing can be stale."""
        assert made.table is not None
        self.tokens.copy_(tokens)
        self.txt.copy_(txt)
        self.rope[0].copy_(rope[0])
        self.rope[1].copy_(rope[1])
        self.table.copy_(made.table)

    def work_of(self, model: FluxTransformer) -> Callable[[], Tensor]:
        return lambda: model.blocks(self.tokens, self.txt, self.modulations, self.rope)


def _room(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


class Recordings:
    """The recordings of one model, at most KEPT of them; the one that was used longest ago goes first."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._kept: OrderedDict[Hashable, _Buffers] = OrderedDict()
        self._computed: Counter[Hashable] = Counter()
        self._weights: tuple[Hashable, ...] = ()
        self._failed = False

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, model: FluxTransformer) -> None:
        """A run begins: forget everything if the model's weights lie elsewhere than before."""
        weights = tuple((t.data_ptr(), t.dtype, t.device) for t in weights_of(model))
        if weights != self._weights:
            if self._kept and model.device.type == "cuda":
                torch.cuda.synchronize(model.device)  # until what was launched is done
            self._kept.clear()
            self._computed.clear()
            self._weights = weights

    def step(
        self, model: FluxTransformer, tokens: Tensor, prepared: Prepared, sigma: float, memory: Memory | None
    ) -> Tensor:
        """Velocity of the tokens, as `FluxTransformer.forward` gives it and with its errors."""
        made = prepared.at(sigma)
        if memory is not None or made.table is None or not self._pays(model, tokens):
            return model(tokens, prepared, sigma, memory)
        txt, rope = prepared.txt.expand(tokens.shape[0], -1, -1), prepared.rope
        key = tuple((t.shape, t.dtype, t.device) for t in (tokens, txt, *rope, made.table))
        buffers = self._kept.get(key)
        if buffers is None and (not self._is_due(key) or not _has_room(tokens.device)):
            return model(tokens, prepared, sigma, memory)
        if buffers is None:
            buffers = _Buffers.like(tokens, txt, rope, made)
        buffers.fill(tokens, txt, rope, made)
        if buffers.replay is not None and buffers.proven:
            self._kept.move_to_end(key)
            return buffers.replay().clone()
        result = buffers.work_of(model)()
        if buffers.replay is None:
            self._record(key, buffers, model)
        else:
            self._prove(buffers, result)
        return result

    def _pays(self, model: FluxTransformer, tokens: Tensor) -> bool:
        if self._failed or torch.is_grad_enabled():
            return False
        return self._recorder.pays(tokens.shape[0] * tokens.shape[1], model.spec.hidden_size)

    def _is_due(self, key: Hashable) -> bool:
        """Whether so many steps of a shape have been computed that one may be recorded."""
        self._computed[key] += 1
        return self._computed[key] > self._recorder.unrecorded

    def _record(self, key: Hashable, buffers: _Buffers, model: FluxTransformer) -> None:
        """Record what has just been computed, so that everything is loaded and chosen by now."""
        try:
            buffers.replay = self._recorder.record(buffers.work_of(model))
        except Exception as error:  # whatever an operation does that no recording may
            self._give_up(f"cannot be recorded: {error}")
            return
        self._kept[key] = buffers
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _prove(self, buffers: _Buffers, expected: Tensor) -> None:
        """See whether the recording gives what was computed from inputs that it was not recorded with."""
        assert buffers.replay is not None
        found, exact = (t.nan_to_num().float() for t in (buffers.replay(), expected))
        difference = float((found - exact).norm() / exact.norm().clamp_min(1e-12))
        if difference > AGREED.get(expected.dtype, AGREED[torch.float16]):
            self._give_up(f"gives something else when it is replayed (by {difference:.1e} of it)")
        else:
            buffers.proven = True

    def _give_up(self, why: str) -> None:
        self._kept.clear()
        self._failed = True
        log.warning("the model's steps are launched one operation at a time, because a step %s", why)


_of_model: WeakKeyDictionary[FluxTransformer, Recordings] = WeakKeyDictionary()


def steps_of(model: FluxTransformer) -> Step:
    """What computes the model's steps in one run: recordings where they can be had, or the model itself."""
    compiled_for_cpu = model.runner is not None and model.device.type == "cpu"
    if model.streaming is not None or compiled_for_cpu or _has_hooks(model):
        return model
    recordings = _of_model.get(model)
    if recordings is None:
        recorder = recorder_for(model.device)
        if recorder is None:
            return model
        recordings = _of_model[model] = Recordings(recorder)
    recordings.begin(model)

    def step(tokens: Tensor, prepared: Prepared, sigma: float, memory: Memory | None = None) -> Tensor:
        return recordings.step(model, tokens, prepared, sigma, memory)

    return step


def _has_hooks(model: FluxTransformer) -> bool:
    """Whether something is called at every step that no recording would call."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _has_room(device: torch.device) -> bool:
    """Whether a recording's memory, which nothing else can use, leaves enough for the pictures."""
    free = free_memory(device) if device.type == "cuda" else None
    return free is None or free >= KEPT_FREE
