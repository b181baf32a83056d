"""What can be attached to the transformer's block loop: callables around each block, and on its attention.

A block hook wraps a block. It receives where it is, the streams and the block itself, and returns the streams
that the next block gets, so that one kind of hook serves every purpose:

    def tap(at, streams, block):                      # record hidden states
        out = block(streams)
        states[at.kind, at.index] = out.img
        return out

    def skip_first_single(at, streams, block):        # replace or skip a block
        return streams if (at.kind, at.index) == ("single", 0) else block(streams)

    velocity = model(tokens, prepared, sigma, Hooks(blocks=(tap, skip_first_single)))

Returning `Finished` skips all blocks that follow. `Residuals` (ControlNet), `Tap` and the step cache
(sampling/step_cache.py) are such hooks. An attention hook changes queries, keys and values between their norm
and RoPE, computes attention another way, or changes its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor

from .ops import Rope, Stream, apply_rope, normed_qkv

if TYPE_CHECKING:
    from .layers import Shared


class Streams(NamedTuple):
    """Hidden states between two blocks.

    Double blocks: `img` [B, N, hidden] and `txt` [B, L, hidden]. Single blocks: both in `img`
    [B, L + N, hidden], text first, and `txt` is None.
    """

    img: Tensor
    txt: Tensor | None = None


class Finished(NamedTuple):
    """Returned by a hook in place of streams: `img` [B, N, hidden] goes straight to the last layer."""

    img: Tensor


@dataclass(frozen=True)
class Place:
    """A block of the loop: its kind, its index among `count` of that kind, and how the sequence is divided.

    `txt_length` text tokens come first, then `generated` image tokens, then those of references. `shared` has
    the rotary table and attention bias of all blocks.
    """

    kind: Literal["double", "single"]
    index: int
    count: int
    txt_length: int
    generated: int
    shared: Shared

    @property
    def is_last(self) -> bool:
        """Whether this is the last single block."""
        return self.kind == "single" and self.index == self.count - 1

    def image(self, streams: Streams) -> Tensor:
        """A view of the image tokens [B, N, hidden], in a double block or a single one."""
        return streams.img if self.kind == "double" else streams.img[:, self.txt_length :]


RunBlock = Callable[..., Streams]
"""(streams) -> streams: the block. `rope=` and `bias=` replace those of `Place.shared` for this call."""

BlockHook = Callable[[Place, Streams, RunBlock], "Streams | Finished"]


class QKV(NamedTuple):
    """Normed queries and keys, and values, [B, K, L, D], with the rotary table and attention bias to come."""

    q: Tensor
    k: Tensor
    v: Tensor
    rope: Rope | None
    bias: Tensor | None


QKVHook = Callable[[Place, QKV], QKV]
Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(q, k, v [B, K, L, D], bias) -> [B, L, K D]."""

OutputHook = Callable[[Place, Tensor], Tensor]
"""(place, attention's output [B, L, K D] before the output projection) -> the same shape."""


@dataclass(frozen=True)
class Hooks:
    """The hooks of one evaluation. The first block hook is the outermost; the others run in order.

    `attention` receives the function that would compute attention and returns the one that does.
    """

    blocks: tuple[BlockHook, ...] = ()
    qkv: tuple[QKVHook, ...] = ()
    attention: Callable[[Place, Attention], Attention] | None = None
    output: tuple[OutputHook, ...] = ()

    def run(self, at: Place, streams: Streams, block: RunBlock) -> Streams | Finished:
        """A block with all block hooks around it."""
        return self._run(self.blocks, at, streams, block)

    def _run(
        self, hooks: tuple[BlockHook, ...], at: Place, streams: Streams, block: RunBlock
    ) -> Streams | Finished:
        if not hooks:
            return block(streams)
        first, *inner = hooks

        def inside(streams: Streams, **changes: Any) -> Streams:
            result = self._run(tuple(inner), at, streams, partial(block, **changes) if changes else block)
            if isinstance(result, Finished):
                raise TypeError("only the outermost block hook may return Finished; put it first")
            return result

        return first(at, streams, inside)

    def at(self, place: Place) -> AttentionAt | None:
        """The attention hooks of a block, None where there are none."""
        if not (self.qkv or self.output or self.attention):
            return None
        return AttentionAt(self, place)


NO_HOOKS = Hooks()


@dataclass(frozen=True)
class AttentionAt:
    """Attention of one block with its hooks: the reference path, step by step."""

    hooks: Hooks
    place: Place

    def attend(self, streams: Sequence[Stream], heads: int, shared: Shared) -> Tensor:
        """As `layers.attend`."""
        state = QKV(*normed_qkv(streams, heads), shared.rope, shared.bias)
        for hook in self.hooks.qkv:
            state = hook(self.place, state)
        q, k = state.q, state.k
        if state.rope is not None:
            q, k = (apply_rope(x, _first(state.rope, x.shape[2])) for x in (q, k))
        compute = shared.ops.attention
        if self.hooks.attention is not None:
            compute = self.hooks.attention(self.place, compute)
        out = compute(q, k, state.v, state.bias)
        for hook in self.hooks.output:
            out = hook(self.place, out)
        return out


def _first(rope: Rope, length: int) -> Rope:
    """The table of the first `length` tokens: a hook may have left queries out, or added keys."""
    cos, sin = rope
    return cos[:, :, :length], sin[:, :, :length]


# Hooks that several parts of the library use


@dataclass
class Tap:
    """A block hook that records image tokens [B, N, hidden] after the blocks named in `places`.

    With `stop`, the blocks after the last of these are not computed. `states` are those of the latest
    evaluation.
    """

    places: tuple[tuple[str, int], ...]
    stop: bool = False
    states: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __call__(self, at: Place, streams: Streams, block: RunBlock) -> Streams | Finished:
        here = (at.kind, at.index)
        if here == ("double", 0):
            self.states.clear()
        out = block(streams)
        if here in self.places:
            self.states[here] = at.image(out)
            if self.stop and here == max(self.places):  # "double" comes before "single"
                return Finished(at.image(out))
        return out


@dataclass(frozen=True)
class Residuals:
    """A block hook that adds a ControlNet's outputs to the generated tokens after each block.

    `double` and `single` are residuals [B, n, hidden], n at most the number of generated tokens, for block i:
    with fewer residuals than blocks each serves ceil(blocks / residuals) blocks in a row (InstantX), or they
    repeat in a cycle (`cyclic`: XLabs). A None among them adds nothing. Raises ValueError for more residuals
    than blocks. Source: diffusers, transformer_flux.py, controlnet_block_samples.
    """

    double: Sequence[Tensor | None] = ()
    single: Sequence[Tensor | None] = ()
    cyclic: bool = False

    def __call__(self, at: Place, streams: Streams, block: RunBlock) -> Streams:
        out = block(streams)
        residual = self._of(self.double if at.kind == "double" else self.single, at)
        if residual is None:
            return out
        start = 0 if at.kind == "double" else at.txt_length
        count = min(residual.shape[1], at.generated)
        img = out.img.clone()
        img[:, start : start + count] += residual[:, :count]
        return Streams(img, out.txt)

    def _of(self, residuals: Sequence[Tensor | None], at: Place) -> Tensor | None:
        if not residuals:
            return None
        if len(residuals) > at.count:
            raise ValueError(
                f"the model has {at.count} {at.kind} blocks, got {len(residuals)} residuals for them; "
                "choose a ControlNet made for this model"
            )
        if self.cyclic:
            return residuals[at.index % len(residuals)]
        return residuals[at.index // math.ceil(at.count / len(residuals))]


def with_attention_at(shared: Shared, hooks: Hooks, place: Place) -> Shared:
    """`shared` with the attention hooks bound to a block; unchanged where there are none."""
    at = hooks.at(place)
    return shared if at is None else replace(shared, hooks=at)
