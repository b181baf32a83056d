"""The FLUX.1 transformer: packed latent tokens, a prompt and a sigma in, the velocity of each token out.

Work is split by what it depends on. `prepare` does, once per run, all that does not depend on the image: the
text projection, the rotary table, the tokens of references and the modulations for every sigma (27 % of
FLUX.1 [dev]'s weights serve only these). `forward` does the rest, once per step. Where a solver chooses its
sigmas as it goes, the modulations alone follow it, one sigma at a time.

`FluxTransformer.run_blocks` is the only block loop: sampling, ComfyUI, the step cache, ControlNets,
streaming, compiled blocks and training attach to it by hooks (hooks.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from .hooks import NO_HOOKS, Finished, Hooks, Place, Streams, with_attention_at
from .layers import (
    Chunks,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    Modulation,
    Shared,
    SingleStreamBlock,
    sinusoidal_embedding,
)
from .modulation import Group, Modulations, ModulationsOnDemand, per_token, split_modulations
from .ops import Ops, Rope, rope_table
from .spec import Conditioning, FluxSpec, TokenGroup
from .strength import strength_bias
from .tokens import pack, position_ids, unpack

__all__ = ["Evaluation", "FluxTransformer", "Prepared", "TokenGroup", "pack", "position_ids", "unpack"]

Part = TypeVar("Part", bound=nn.Module)


class Streamer(Protocol):
    """Yields parts of the network in turn, each while its weights are where it computes (memory/)."""

    def each(self, parts: Sequence[Part], then: Sequence[nn.Module] = ()) -> Iterator[Part]: ...


class Runner(Protocol):
    """Calls a block with its inputs, for example compiled (backends/compile.py)."""

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], shared: Shared) -> Any: ...


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of the block loop needs besides the image tokens.

    `txt` [B, L, hidden] is the projected text. `references` are the groups behind the generated tokens whose
    modulations differ from `modulations`; tokens without a group get those.
    """

    txt: Tensor
    modulations: Modulations
    shared: Shared
    hooks: Hooks = NO_HOOKS
    references: tuple[Group, ...] = ()
    generated: int | None = None
    """Number of image tokens whose velocity is returned; None: all of them."""
    runner: Runner | None = None
    """Runs the blocks in place of the model's own runner."""


@dataclass(frozen=True)
class Prepared:
    """What does not depend on the image: `txt` [B, L, hidden], the rotary table, modulations by sigma.

    `references` are the hidden states [B or 1, n, hidden] of token groups, `fixed` the modulations of those
    groups that have a sigma of their own; `bias` is added to the attention scores.
    """

    txt: Tensor
    rope: Rope
    modulations: Mapping[float, Modulations] = field(repr=False)
    references: tuple[Tensor, ...] = ()
    fixed: tuple[Modulations | None, ...] = ()
    bias: Tensor | None = None

    def at(self, sigma: float) -> Modulations:
        """The modulations at a sigma. Raises ValueError when it is none of those prepared."""
        try:
            return self.modulations[float(sigma)]
        except KeyError:
            raise ValueError(
                f"sigma {sigma} was not prepared; pass every sigma that the solver evaluates to prepare"
            ) from None


class FluxTransformer(nn.Module):
    """FLUX.1's velocity network (black-forest-labs/flux, src/flux/model.py: Flux), sized by `spec`.

    With `streaming` (set by flux_core.memory.stream) it may be larger than the memory; with `runner` (set by
    flux_core.backends.compile.compile_blocks) its blocks are compiled. `attention` names the attention back
    end (flux_core.backends.attention.use_attention).
    """

    streaming: Streamer | None = None
    runner: Runner | None = None
    attention: str = "auto"

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.spec = spec
        hidden = spec.hidden_size
        self.img_in = nn.Linear(spec.in_channels, hidden)
        self.txt_in = nn.Linear(spec.context_in, hidden)
        self.time_in = MLPEmbedder(256, hidden)
        self.vector_in = MLPEmbedder(spec.vec_in, hidden)
        self.guidance_in = MLPEmbedder(256, hidden) if spec.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(spec) for _ in range(spec.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(spec) for _ in range(spec.depth_single))
        self.final_layer = LastLayer(hidden, spec.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the tokens are computed in."""
        return dtype_of(self.img_in)

    @property
    def device(self) -> torch.device:
        return device_of(self.img_in)

    # Once a run: what does not depend on the image

    def embed_time(
        self,
        sigma: Tensor,
        guidance: Tensor | None,
        pooled: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Conditioning vector [B, hidden] from sigma [B] in 0..1, guidance [B], pooled [B, P].

        Without guidance its embedding is left out; a missing pooled vector counts as zeros (both as ComfyUI).
        Computed in `dtype`, by default that of the layers, which must otherwise cast their weights.
        """
        dtype = dtype or dtype_of(self.time_in.in_layer)
        if pooled is None:
            pooled = sigma.new_zeros(len(sigma), self.spec.vec_in)
        vec = self.time_in(sinusoidal_embedding(sigma).to(dtype)) + self.vector_in(pooled.to(dtype))
        if self.guidance_in is None or guidance is None:
            return vec
        return vec + self.guidance_in(sinusoidal_embedding(guidance).to(dtype))

    def modulate(self, vec: Tensor) -> Modulations:
        """Modulations of every block for conditioning vectors [B, hidden]."""
        made = [modulation(vec) for modulation in self._resident(self.modulations())]
        double = 2 * len(self.double_blocks)
        return Modulations(
            tuple(zip(made[:double:2], made[1:double:2], strict=True)),
            tuple(made[double:]),
            self.final_layer.modulate(vec),
        )

    def project_text(self, txt: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The text stream's first state [B, L, hidden] from a T5 sequence [B, L, C], as `embed_time`."""
        if txt.shape[-1] != self.spec.context_in:
            raise ValueError(
                f"the model reads text of width {self.spec.context_in}, got {txt.shape[-1]}; "
                "choose the text encoders that belong to it"
            )
        return self.txt_in(txt.to(dtype or self.dtype))

    def rope(self, txt_length: int, h: int, w: int, groups: Sequence[TokenGroup] = ()) -> Rope:
        """Rotary table for `txt_length` text tokens, an h x w latent and the groups behind it."""
        ids = torch.cat([position_ids(txt_length, h, w), *(group.ids.float().cpu() for group in groups)])
        return rope_table(ids, self.spec.axes_dim, self.spec.theta, self.device)

    def prepare(self, conditioning: Conditioning, sigmas: Sequence[float] | None, h: int, w: int) -> Prepared:
        """All that a run at these sigmas on an h x w latent needs besides the image.

        The modulations of all sigmas go through each linear layer as one batch; with None for the sigmas,
        those of each sigma when `forward` first needs it. `extra` and `controls` of the conditioning are not
        used here: their channels are part of the tokens, their residuals hooks of the block loop.
        Raises ValueError for text, pooled vectors, references or a bias of another size, a negative strength,
        and for a missing distilled guidance.
        """
        self._check(conditioning)
        make = _Rows(self, conditioning)
        if sigmas is None:
            modulations: Mapping[float, Modulations] = ModulationsOnDemand(lambda sigma: make([sigma])[sigma])
        else:
            modulations = make(sorted({float(sigma) for sigma in sigmas}))
        groups = [group for group in conditioning.groups if group.strength != 0.0]
        own = sorted({group.sigma for group in groups if group.sigma is not None})
        fixed = make(own) if own else {}
        txt = self.project_text(conditioning.txt.to(self.device))
        return Prepared(
            txt,
            self.rope(txt.shape[1], h, w, groups),
            modulations,
            tuple(self.img_in(group.tokens.to(self.device, self.dtype)) for group in groups),
            tuple(None if group.sigma is None else fixed[group.sigma] for group in groups),
            self._bias(conditioning, txt.shape[1], h * w // 4, groups),
        )

    def _bias(
        self, conditioning: Conditioning, txt_length: int, generated: int, groups: Sequence[TokenGroup]
    ) -> Tensor | None:
        """The given bias and that of strengths, on the model's device; boolean, or in its dtype."""
        bias = conditioning.bias
        length = txt_length + generated + sum(group.tokens.shape[1] for group in groups)
        if bias is not None and (bias.ndim != 4 or bias.shape[-2:] != (length, length)):
            raise ValueError(
                f"an attention bias must be [B or 1, K or 1, {length}, {length}], got {[*bias.shape]}"
            )
        counted = [(group.tokens.shape[1], group.strength) for group in groups]
        strengths = strength_bias(txt_length, generated, counted, conditioning.spans)
        if strengths is not None and bias is not None:
            bias = torch.where(bias, 0.0, -torch.inf) if bias.dtype == torch.bool else bias
            strengths = strengths + bias.to(strengths)
        bias = bias if strengths is None else strengths
        if bias is None:
            return None
        return bias.to(self.device, None if bias.dtype == torch.bool else self.dtype)

    def _check(self, conditioning: Conditioning) -> None:
        for group in conditioning.groups:
            self.spec.check_reference(group.tokens.shape[-1])
        pooled = conditioning.pooled
        if pooled is not None and pooled.shape[-1] != self.spec.vec_in:
            raise ValueError(
                f"the model reads a pooled vector of width {self.spec.vec_in}, got {pooled.shape[-1]}; "
                "choose the text encoders that belong to it"
            )
        if self.guidance_in is not None and conditioning.guidance is None:
            raise ValueError(
                "this model takes a distilled guidance scale, got none; set guidance (3.5 is usual)"
            )

    def modulations(self) -> list[Modulation]:
        """The blocks' own: image's and text's of each double block, then the single blocks'."""
        double = cast("Iterable[DoubleStreamBlock]", self.double_blocks)
        single = cast("Iterable[SingleStreamBlock]", self.single_blocks)
        pairs = [modulation for block in double for modulation in (block.img_mod, block.txt_mod)]
        return pairs + [block.modulation for block in single]

    # At every evaluation

    def forward(self, tokens: Tensor, prepared: Prepared, sigma: float, hooks: Hooks = NO_HOOKS) -> Tensor:
        """Velocity [B, N, out_channels] of tokens [B, N, in_channels] at `sigma`.

        Under torch.no_grad() faster operations are used that have no gradient (backends/choose.py).
        Raises ValueError when `sigma` is none of those prepared.
        """
        modulations, batch = prepared.at(sigma), tokens.shape[0]
        references = [
            (hidden.shape[1], fixed or modulations)
            for hidden, fixed in zip(prepared.references, prepared.fixed, strict=True)
        ]
        img = self.img_in(tokens.to(self.dtype))
        if prepared.references:
            img = torch.cat([img, *(hidden.expand(batch, -1, -1) for hidden in prepared.references)], dim=1)
        evaluation = Evaluation(
            prepared.txt.expand(batch, -1, -1),
            modulations,
            Shared(prepared.rope, self.ops(img.device), prepared.bias),
            hooks,
            tuple(references) if any(prepared.fixed) else (),
            tokens.shape[1],
        )
        return self.run_blocks(img, evaluation)

    def run_blocks(self, img: Tensor, evaluation: Evaluation) -> Tensor:
        """The block loop: velocity [B, n, out_channels] from projected image tokens [B, N, hidden]."""
        txt, hooks, shared = evaluation.txt, evaluation.hooks, evaluation.shared
        generated = img.shape[1] if evaluation.generated is None else evaluation.generated
        streams, last = Streams(img, txt), evaluation.modulations.last
        runner = evaluation.runner or self.runner
        for place, block, modulation in self._walk(generated, evaluation):
            if place.kind == "single" and streams.txt is not None:
                streams = Streams(torch.cat([streams.txt, streams.img], dim=1))
            run = partial(_call, runner, block, modulation, with_attention_at(shared, hooks, place))
            result = hooks.run(place, streams, run) if hooks.blocks else run(streams)
            if isinstance(result, Finished):
                return self.final_layer(result.img[:, :generated], last, shared.ops)
            streams = result
        start = txt.shape[1] if streams.txt is None else 0
        return self.final_layer(streams.img[:, start : start + generated], last, shared.ops)

    def _walk(self, generated: int, evaluation: Evaluation) -> Iterator[tuple[Place, nn.Module, Any]]:
        """Every block in order, resident while it computes, with its place and its modulation."""
        modulations, groups = evaluation.modulations, evaluation.references
        txt_length, shared = evaluation.txt.shape[1], evaluation.shared
        count = len(self.double_blocks), len(self.single_blocks)
        blocks = self._resident([*self.double_blocks, *self.single_blocks], then=list(self.double_blocks))
        for number, block in enumerate(blocks):
            if number < count[0]:
                img_mod, txt_mod = modulations.double[number]
                others = [(length, group.double[number][0]) for length, group in groups]
                spread = per_token([(generated, img_mod), *others]) if others else img_mod
                yield (
                    Place("double", number, count[0], txt_length, generated, shared),
                    block,
                    (spread, txt_mod),
                )
            else:
                index = number - count[0]
                mod = modulations.single[index]
                others = [(length, group.single[index]) for length, group in groups]
                spread = per_token([(txt_length + generated, mod), *others]) if others else mod
                yield Place("single", index, count[1], txt_length, generated, shared), block, (spread,)

    def ops(self, device: torch.device | None = None, compiled: bool | None = None) -> Ops:
        """The operations for a device, this model's own unless given; the reference with gradients on."""
        from ..backends.choose import ops_for  # here, so that reading this file needs no back end

        compiled = self.runner is not None if compiled is None else compiled
        return ops_for(self, device or self.device, compiled)

    def _resident(self, parts: Sequence[Part], then: Sequence[nn.Module] = ()) -> Iterable[Part]:
        """The parts, each while its weights are where it computes; `then` come after them."""
        return parts if self.streaming is None else self.streaming.each(parts, then)


def _call(
    runner: Runner | None,
    block: nn.Module,
    modulation: tuple[Chunks, ...],
    shared: Shared,
    streams: Streams,
    **changes: Any,
) -> Streams:
    """One block, through the runner where there is one; `changes` are fields of `shared` for it alone."""
    shared = replace(shared, **changes) if changes else shared
    hidden = (streams.img,) if streams.txt is None else (streams.img, streams.txt)
    inputs = (*hidden, *modulation)
    out = block(*inputs, shared) if runner is None else runner(block, inputs, shared)
    streams = Streams(out) if streams.txt is None else Streams(*out)
    if streams.img.dtype != torch.float16:
        return streams
    return Streams(_clipped(streams.img), None if streams.txt is None else _clipped(streams.txt))


def _clipped(x: Tensor) -> Tensor:
    """x within float16's range, which FLUX.1's residual streams exceed.

    BFL's code, which runs in bfloat16, has no such limit; diffusers and ComfyUI have.
    """
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


class _Rows:
    """Modulations of a conditioning at sigmas, each linear layer applied to all of them as one batch."""

    def __init__(self, model: FluxTransformer, conditioning: Conditioning) -> None:
        self._model, self._given = model, conditioning.guidance
        pooled = conditioning.pooled
        if pooled is None:
            pooled = torch.zeros(conditioning.txt.shape[0], model.spec.vec_in)
        self._pooled = pooled.to(model.device)

    def __call__(self, values: Sequence[float]) -> dict[float, Modulations]:
        batch = len(self._pooled)
        sigma = torch.tensor(values, device=self._pooled.device).repeat_interleave(batch)
        guidance = None if self._given is None else torch.full_like(sigma, self._given)
        stacked = self._model.modulate(
            self._model.embed_time(sigma, guidance, self._pooled.repeat(len(values), 1))
        )
        return dict(zip(values, split_modulations(stacked, batch), strict=True))


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype that a linear layer computes in, however its weight is kept."""
    return cast(Any, layer).weight.dtype


def device_of(layer: nn.Module) -> torch.device:
    """The device that a linear layer is on, however its weight is kept."""
    own = getattr(layer, "device", None)
    return own if isinstance(own, torch.device) else cast(Any, layer).weight.device
