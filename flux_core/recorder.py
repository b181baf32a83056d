"""Operations recorded once, then done again one after the other, without what Python does between them.

A small model's step on a CPU is hundreds of operations of some microseconds, and to get from one to the next
takes as long: attributes, modules, views, memory for each result. A recording keeps only what computes. Views
are made once, results are written where they were written before, and memory is shared by those that are not
needed at the same time.

What is recorded must be made of torch's operations alone, without gradients, and with no decision taken on a
value. graphs.py decides what is recorded, and proves it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Operation = torch._ops.OpOverload
UNKNOWN = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}
"""What gives something else each time."""
DROPOUT = {"aten::_scaled_dot_product_flash_attention_for_cpu"}
"""What does so only when it is told to drop something out."""


@dataclass
class _Call:
    """An operation, what it was called with, and what came of it."""

    operation: Operation
    args: Sequence[Any]
    kwargs: dict[str, Any]
    results: list[Tensor]

    @property
    def in_place(self) -> bool:
        return bool(self.operation._schema.is_mutable)

    def arguments(self) -> list[Tensor]:
        return _tensors([self.args, *self.kwargs.values()])

    def read(self) -> set[int]:
        """The memory of its arguments."""
        return {_memory(t) for t in self.arguments()}

    def written(self) -> set[int]:
        """The memory of its results."""
        return {_memory(t) for t in self.results}

    def with_tensors(self, by: Callable[[Tensor], Tensor]) -> _Call:
        """The call with others in the places of its arguments."""
        kwargs = {name: _replaced(value, by) for name, value in self.kwargs.items()}
        return replace(self, args=_replaced(self.args, by), kwargs=kwargs)


class _Watching(TorchDispatchMode):
    """Writes down every operation of torch's that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; to say so in torch's way imports its compiler, which takes seconds."""
        return False

    def __torch_dispatch__(
        self, func: Operation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if UNKNOWN & set(func.tags) and func._schema.name not in DROPOUT:
            raise ValueError(f"{func} gives something else each time")
        result = func(*args, **kwargs)
        self.calls.append(_Call(func, args, kwargs, _tensors(result)))
        return result


class OperationRecorder:
    """Records what a CPU computes."""

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What does `work` again, from the same memory into memory that is the same each time.

        Raises ValueError for work that would not be the same again: with random numbers, with decisions taken
        on values, or that changes what it starts from.
        """
        # in inference mode operations are told as a whole that consist of others, and buffers could not be
        # written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            with _Watching() as watching:
                result = work()
            return _replay(*_once_each(watching.calls, result))


def _tensors(values: Any) -> list[Tensor]:
    """Those in an argument or a result, in order. torch's own pytree takes ten times as long."""
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in _tensors(value)] if isinstance(values, (list, tuple)) else []


def _replaced(values: Any, by: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return by(values)
    return [_replaced(value, by) for value in values] if isinstance(values, (list, tuple)) else values


def _name(values: Any) -> Hashable:
    """What is the same for the same tensors and the same numbers of one type, and for no others."""
    if isinstance(values, (list, tuple)):
        return tuple(_name(value) for value in values)
    return (Tensor, id(values)) if isinstance(values, Tensor) else (type(values), values)


def _memory(tensor: Tensor) -> int:
    """Which memory a tensor is in; sure while all are kept. Weights packed by oneDNN have none to tell."""
    return 0 if tensor.is_mkldnn else tensor.untyped_storage()._cdata


def _once_each(calls: Sequence[_Call], result: Tensor) -> tuple[list[_Call], Tensor]:
    """The calls without those that give again what an earlier one gave, and what is the result then."""
    changed = {memory for call in calls if call.in_place for memory in call.read()}
    known: dict[Hashable, list[Tensor]] = {}
    earlier: dict[int, Tensor] = {}
    kept = []
    for call in calls:
        call = call.with_tensors(lambda t: earlier.get(id(t), t))
        if not call.in_place and not changed & (call.read() | call.written()):
            key = (call.operation, _name(call.args), _name(list(call.kwargs.items())))
            results = known.setdefault(key, call.results)
            if results is not call.results:
                earlier.update((id(t), first) for t, first in zip(call.results, results, strict=True))
                continue
        kept.append(call)
    return kept, earlier.get(id(result), result)


def _replay(calls: Sequence[_Call], result: Tensor) -> Callable[[], Tensor]:
    computing = [call for call in calls if call.in_place or not _are_views(call)]
    room = _room(computing, _memory(result))
    moved: dict[int, Tensor] = {}

    def place(t: Tensor) -> Tensor:
        """Where a tensor is when it is computed again."""
        if _memory(t) not in room:
            return t
        if id(t) not in moved:
            empty = torch.empty(0, dtype=t.dtype)
            moved[id(t)] = empty.set_(room[_memory(t)], t.storage_offset(), t.shape, t.stride())
        return moved[id(t)]

    used = {id(t) for call in calls for t in call.arguments()} | {id(result)}
    steps = [step for call in computing for step in _steps(call, place, used)]
    final = place(result)

    def replay() -> Tensor:
        for step in steps:
            step()
        return final

    return replay


def _are_views(call: _Call) -> bool:
    return bool(call.results) and call.written() <= call.read()


def _room(calls: Sequence[_Call], result: int) -> dict[int, torch.UntypedStorage]:
    """Memory for all that the calls make, of one size used anew when what was in it is no longer needed.

    Raises ValueError for calls that change what was there before them.
    """
    begin: dict[int, int] = {}
    last: dict[int, int] = {}
    size: dict[int, int] = {}
    for i, call in enumerate(calls):
        read, written = call.read(), call.written()
        if call.in_place and not (written and written <= begin.keys()):
            raise ValueError(f"{call.operation} changes what the work starts from")
        for t in call.results:
            if _memory(t) not in read:
                begin.setdefault(_memory(t), i)
                size[_memory(t)] = t.untyped_storage().nbytes()
        last.update(dict.fromkeys(read | written, i))
    last[result] = len(calls)
    room: dict[int, torch.UntypedStorage] = {}
    free: dict[int, list[torch.UntypedStorage]] = defaultdict(list)
    ending = defaultdict(list)
    for memory in begin:
        ending[last[memory]].append(memory)
    ended = 0
    for memory, i in begin.items():  # in the order of their calls
        for before in range(ended, i):
            for gone in ending[before]:
                free[size[gone]].append(room[gone])
        ended = max(ended, i)
        same = free[size[memory]]
        room[memory] = same.pop() if same else torch.UntypedStorage(size[memory])
    return room


def _steps(call: _Call, place: Callable[[Tensor], Tensor], used: set[int]) -> Iterator[Callable[[], Any]]:
    """What computes a call's results again, where they belong."""
    results, call = call.results, call.with_tensors(place)
    if call.in_place:
        yield _called(call.operation, *call.args, **call.kwargs)
    elif (writing := _writing(call.operation)) is not None:
        names = [a.name for a in writing._schema.arguments if a.is_out]
        into = dict(zip(names, map(place, results), strict=True))
        yield _called(writing, *call.args, **call.kwargs, **into)
    elif not call.operation._schema.name.startswith("aten::empty"):
        wanted = [(i, place(t)) for i, t in enumerate(results) if id(t) in used]

        def copied() -> None:
            made = _tensors(call.operation(*call.args, **call.kwargs))
            for i, t in wanted:
                t.copy_(made[i])

        yield copied


def _called(operation: Operation, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """A call, past the Python that torch has around an operation where there is a way."""
    return partial(getattr(operation, "_op", operation), *args, **kwargs)


@cache
def _writing(operation: Operation) -> Operation | None:
    """An operation's twin that writes its results where it is told, unless that would copy them there."""
    taken = [(a.name, str(a.type)) for a in operation._schema.arguments]
    for name in operation.overloadpacket.overloads():
        twin = getattr(operation.overloadpacket, name)
        outs = [a for a in twin._schema.arguments if a.is_out]
        others = [(a.name, str(a.type)) for a in twin._schema.arguments if not a.is_out]
        if outs and others == taken and torch.Tag.generated not in twin.tags:
            return twin
    return None
