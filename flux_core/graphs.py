"""A step of the transformer as a CUDA graph: recorded once for a shape, then launched in one piece.

At 512 x 512 and below a GPU is done with an operation before Python has launched the next. A recording of all
of them has no such gaps. It reads and writes the same memory each time, so what differs from step to step
(tokens, text, rotary table, modulations) is copied into buffers of its own before, and what it gives is
copied out after. A shape's first step is computed as ever, then recorded; its second is computed both ways,
and a recording that does not agree is not used. Anything that fails is logged once, and the model goes on
without.

Recorded are steps of few tokens of a model whose weights stay where they are. Not recorded: a model that is
streamed, steps that a cache may skip (caching.py), modules with hooks, and models in ComfyUI, which moves
weights between calls; it does not come through here. A LoRA makes another model, with recordings of its own.

Tested on a CPU, with operations recorded and replayed by other means, but **not yet run on a GPU.** So only
RECTIFLUX_GRAPHS=1 in the environment switches it on.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .streaming.memory import KEPT_FREE, free_memory
from .streaming.parts import weights_of
from .transformer import FluxTransformer, Memory, Modulations, Prepared

log = logging.getLogger(__name__)

TOKENS = 1024
"""Image tokens of a step, over its batch, up to which launches leave gaps: 512 x 512."""
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

    def record(self, work: Callable[[], Tensor]) -> Replay: ...


class CudaRecorder:
    """Records by stream capture, all in one pool of memory: no two recordings of a model run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

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


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on a device, None where nothing does or nobody wants it."""
    if device.type != "cuda" or os.environ.get("RECTIFLUX_GRAPHS") != "1":
        return None
    return CudaRecorder(device)


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
            self._weights = weights

    def step(
        self, model: FluxTransformer, tokens: Tensor, prepared: Prepared, sigma: float, memory: Memory | None
    ) -> Tensor:
        """Velocity of the tokens, as `FluxTransformer.forward` gives it and with its errors."""
        made = prepared.at(sigma)
        if memory is not None or made.table is None or not self._pays(tokens):
            return model(tokens, prepared, sigma, memory)
        txt, rope = prepared.txt.expand(tokens.shape[0], -1, -1), prepared.rope
        key = tuple((t.shape, t.dtype, t.device) for t in (tokens, txt, *rope, made.table))
        buffers = self._kept.get(key)
        if buffers is None and not _has_room(tokens.device):
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

    def _pays(self, tokens: Tensor) -> bool:
        few = tokens.shape[0] * tokens.shape[1] <= TOKENS
        return few and not self._failed and not torch.is_grad_enabled()

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
    if model.streaming is not None or _has_hooks(model):
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
