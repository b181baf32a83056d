"""The FLUX.1 transformer: packed latent tokens, a prompt and a sigma in, the velocity of each token out.

Work is split by what it depends on. `prepare` does, once per run, all that does not depend on the image: the
text projection, the rotary table and the modulations for every sigma (27 % of FLUX.1 [dev]'s weights serve
only these). `forward` does the rest, once per step.
Where a solver chooses its sigmas as it goes, the modulations alone follow it, one sigma at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from .layers import (
    Chunks,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    Modulation,
    Rope,
    SingleStreamBlock,
    compute_dtype,
    device_of,
    rope_table,
    sinusoidal_embedding,
)
from .spec import Conditioning, FluxSpec

Part = TypeVar("Part", bound=nn.Module)


class Streamer(Protocol):
    """Hands out parts of the network in turn, each while its weights are where it computes."""

    def each(self, parts: Sequence[Part], then: Sequence[nn.Module] = ()) -> Iterator[Part]: ...


class Runner(Protocol):
    """Calls a block with its inputs (flux_core/backends/compile.py: its compiled twin)."""

    def __call__(self, block: nn.Module, *inputs: Tensor | tuple[Tensor, ...]) -> Any: ...


class Memory(Protocol):
    """Knows from earlier steps what the blocks after the first add to the image (step_cache.py)."""

    def guess(self, sigma: float, change: Tensor) -> Tensor | None: ...

    def keep(self, sigma: float, added: Tensor) -> None: ...


@dataclass(frozen=True)
class Modulations:
    """Shifts, scales, gates of one evaluation: (image, text) a double block, one a single block, the last."""

    double: tuple[tuple[Chunks, Chunks], ...]
    single: tuple[Chunks, ...]
    last: Chunks

    def chunks(self) -> list[Tensor]:
        """All of them in order."""
        return [c for chunks in (*itertools.chain(*self.double), *self.single, self.last) for c in chunks]

    def laid_out(self, table: Tensor) -> Modulations:
        """Views of a table [P, B, 1, hidden] in the places of these."""
        rows = iter(table.unbind())

        def next_of(chunks: Chunks) -> Chunks:
            return tuple(itertools.islice(rows, len(chunks)))

        double = tuple((next_of(img), next_of(txt)) for img, txt in self.double)
        return Modulations(double, tuple(map(next_of, self.single)), next_of(self.last))


@dataclass(frozen=True)
class Prepared:
    """What does not depend on the image: `txt` [B, L, hidden], the rotary table, modulations by sigma."""

    txt: Tensor
    rope: Rope
    modulations: Mapping[float, Modulations] = field(repr=False)

    def at(self, sigma: float) -> Modulations:
        """The modulations at a sigma. Raises ValueError when it is none of those prepared."""
        try:
            return self.modulations[float(sigma)]
        except KeyError:
            raise ValueError(
                f"sigma {sigma} was not prepared; pass every sigma that the solver asks for to prepare"
            ) from None


class _OnDemand(Mapping[float, Modulations]):
    """Modulations made when they are asked for. Only the latest are kept: a solver that chooses its sigmas
    comes back to none but the last.
    """

    def __init__(self, make: Callable[[float], Modulations]) -> None:
        self._make = make
        self._latest: dict[float, Modulations] = {}

    def __getitem__(self, sigma: float) -> Modulations:
        if sigma not in self._latest:
            self._latest = {sigma: self._make(sigma)}
        return self._latest[sigma]

    def __iter__(self) -> Iterator[float]:
        return iter(self._latest)

    def __len__(self) -> int:
        return len(self._latest)


def pack(latent: Tensor) -> Tensor:
    """Tokens [B, N, 4 c] from a latent [B, c, h, w]: each 2x2 patch is one token, ordered (c ph pw).

    Raises ValueError when h or w is odd.
    """
    h, w = latent.shape[-2:]
    if h % 2 or w % 2:
        raise ValueError(
            f"latent height and width must be even to pack 2x2, got {h}x{w}; "
            "make the image's sides multiples of 16"
        )
    return rearrange(latent, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Latent [B, c, h, w] from tokens [B, N, 4 c]: the inverse of `pack`."""
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=h // 2, w=w // 2, ph=2, pw=2)


def position_ids(text_length: int, h: int, w: int) -> Tensor:
    """Ids [L + N, 3], float32: zeros for the text, (0, row, column) for the tokens of an h x w latent."""
    image = torch.zeros(h // 2, w // 2, 3)
    image[..., 1] = torch.arange(h // 2)[:, None]
    image[..., 2] = torch.arange(w // 2)[None, :]
    return torch.cat([torch.zeros(text_length, 3), rearrange(image, "h w i -> (h w) i")])


class FluxTransformer(nn.Module):
    """FLUX.1's velocity network (black-forest-labs/flux, src/flux/model.py: Flux), sized by `spec`.

    With `streaming` (flux_core.memory.stream sets it) it may be larger than the memory; with `runner`
    (flux_core.backends.compile.compile_blocks sets it) its blocks are compiled.
    """

    streaming: Streamer | None = None
    runner: Runner | None = None

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
        return compute_dtype(self.img_in)

    @property
    def device(self) -> torch.device:
        return device_of(self.img_in)

    # What does not depend on the image

    def embed_time(self, sigma: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """Conditioning vector [B, hidden] from sigma [B] in 0..1, guidance [B] or None, pooled [B, P].

        A model with a guidance embedder needs guidance (ValueError); one without ignores it.
        """
        dtype = compute_dtype(self.time_in.in_layer)
        vec = self.time_in(sinusoidal_embedding(sigma).to(dtype)) + self.vector_in(pooled.to(dtype))
        if self.guidance_in is None:
            return vec
        if guidance is None:
            raise ValueError(
                "this model takes a distilled guidance scale, got none; set guidance (3.5 is usual)"
            )
        return vec + self.guidance_in(sinusoidal_embedding(guidance).to(dtype))

    def modulate(self, vec: Tensor) -> Modulations:
        """Modulations of every block for conditioning vectors [B, hidden]."""
        made = [modulation(vec) for modulation in self._near(self.modulations())]
        double = 2 * len(self.double_blocks)
        return Modulations(
            tuple(zip(made[:double:2], made[1:double:2], strict=True)),
            tuple(made[double:]),
            self.final_layer.modulate(vec),
        )

    def project_text(self, txt: Tensor) -> Tensor:
        """The text stream's first state [B, L, hidden] from a T5 sequence [B, L, C]."""
        if txt.shape[-1] != self.spec.context_in:
            raise ValueError(
                f"the model reads text of width {self.spec.context_in}, got {txt.shape[-1]}; "
                "choose the text encoders that belong to it"
            )
        return self.txt_in(txt.to(self.dtype))

    def rope(self, text_length: int, h: int, w: int) -> Rope:
        """Rotary table for `text_length` text tokens and an h x w latent."""
        ids = position_ids(text_length, h, w)
        return rope_table(ids, self.spec.axes_dim, self.spec.theta, self.device)

    def prepare(self, conditioning: Conditioning, sigmas: Sequence[float] | None, h: int, w: int) -> Prepared:
        """All that a run at these sigmas on an h x w latent needs besides the image.

        The modulations of all sigmas go through each linear layer as one batch; with None for the sigmas,
        those of each sigma when `forward` is first asked for it. Raises ValueError for text or pooled
        vectors of another width, and for guidance
        that is missing.
        """
        pooled = conditioning.pooled.to(self.device)
        if pooled.shape[-1] != self.spec.vec_in:
            raise ValueError(
                f"the model reads a pooled vector of width {self.spec.vec_in}, got {pooled.shape[-1]}; "
                "choose the text encoders that belong to it"
            )

        def rows(values: Sequence[float]) -> dict[float, Modulations]:
            batch = pooled.shape[0]
            sigma = torch.tensor(values, device=self.device).repeat_interleave(batch)
            given = conditioning.guidance
            guidance = None if given is None else torch.full_like(sigma, given)
            stacked = self.modulate(self.embed_time(sigma, guidance, pooled.repeat(len(values), 1)))
            by_row = torch.stack(stacked.chunks(), dim=1).unflatten(0, (len(values), batch))
            # [S, P, B, 1, hidden], those of a sigma in one piece; a clone has the strides of its shape alone
            tables = by_row.transpose(1, 2).clone(memory_format=torch.contiguous_format)
            return {v: stacked.laid_out(table) for v, table in zip(values, tables, strict=True)}

        if sigmas is None:
            modulations = _OnDemand(lambda sigma: rows([sigma])[sigma])
        else:
            modulations = rows(sorted({float(sigma) for sigma in sigmas}))
        txt = self.project_text(conditioning.txt.to(self.device))
        return Prepared(txt, self.rope(txt.shape[1], h, w), modulations)

    def modulations(self) -> list[Modulation]:
        """The blocks' own: image's and text's of each double block, then the single blocks'."""
        double = cast("Iterable[DoubleStreamBlock]", self.double_blocks)
        single = cast("Iterable[SingleStreamBlock]", self.single_blocks)
        pairs = [modulation for block in double for modulation in (block.img_mod, block.txt_mod)]
        return pairs + [block.modulation for block in single]

    # What does

    def forward(
        self, tokens: Tensor, prepared: Prepared, sigma: float, memory: Memory | None = None
    ) -> Tensor:
        """Velocity [B, N, out_channels] of tokens [B, N, in_channels] at `sigma`.

        With a memory only as many blocks are computed as it asks for. Raises ValueError when `sigma` is none
        of those prepared.
        """
        modulations = prepared.at(sigma)
        txt = prepared.txt.expand(tokens.shape[0], -1, -1)
        if memory is not None:
            return self.blocks_unless_known(tokens, txt, modulations, prepared.rope, sigma, memory)
        return self.blocks(tokens, txt, modulations, prepared.rope)

    def blocks(self, tokens: Tensor, txt: Tensor, modulations: Modulations, rope: Rope) -> Tensor:
        """The network proper: velocity [B, N, out_channels] of tokens [B, N, in_channels].

        `txt` [B, L, hidden] is the projected text.
        """
        x = self.double_stream(tokens, txt, modulations, rope)
        x = self.single_stream(x, modulations, rope)
        return self.final_layer(x[:, txt.shape[1] :], modulations.last)

    def blocks_unless_known(
        self, tokens: Tensor, txt: Tensor, modulations: Modulations, rope: Rope, sigma: float, memory: Memory
    ) -> Tensor:
        """As `blocks`, but what the memory knows of the blocks after the first is not computed."""
        length = txt.shape[1]
        img = self.img_in(tokens.to(self.dtype))
        first, txt = self._double(img, txt, modulations, rope, 0, 1)
        added = memory.guess(sigma, first - img)
        if added is not None:
            return self.final_layer(first + added, modulations.last)
        img, txt = self._double(first, txt, modulations, rope, 1, len(self.double_blocks))
        x = self.single_stream(torch.cat([txt, img], dim=1), modulations, rope)[:, length:]
        memory.keep(sigma, x - first)
        return self.final_layer(x, modulations.last)

    def double_stream(self, tokens: Tensor, txt: Tensor, modulations: Modulations, rope: Rope) -> Tensor:
        """The joint state [B, L + N, hidden], text first, after the double blocks."""
        img = self.img_in(tokens.to(self.dtype))
        img, txt = self._double(img, txt, modulations, rope, 0, len(self.double_blocks))
        return torch.cat([txt, img], dim=1)

    def _double(
        self, img: Tensor, txt: Tensor, modulations: Modulations, rope: Rope, first: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """img [B, N, hidden] and txt [B, L, hidden] after the double blocks from `first` up to `stop`."""
        every = list(self.double_blocks)
        blocks = self._near(every[first:stop], then=[*every[stop:], *self.single_blocks])
        for block, (img_mod, txt_mod) in zip(blocks, modulations.double[first:stop], strict=True):
            img, txt = self._run(block, img, txt, img_mod, txt_mod, rope)
        return img, txt

    def single_stream(
        self, x: Tensor, modulations: Modulations, rope: Rope, first: int = 0, stop: int | None = None
    ) -> Tensor:
        """The joint state [B, L + N, hidden] after the single blocks from `first` up to before `stop`."""
        blocks = self._near(list(self.single_blocks)[first:stop], then=list(self.double_blocks))
        for block, mod in zip(blocks, modulations.single[first:stop], strict=True):
            x = self._run(block, x, mod, rope)
        return x

    def _run(self, block: nn.Module, *inputs: Tensor | tuple[Tensor, ...]) -> Any:
        return block(*inputs) if self.runner is None else self.runner(block, *inputs)

    def _near(self, parts: Sequence[Part], then: Sequence[nn.Module] = ()) -> Iterable[Part]:
        """The parts, each while its weights are where it computes; `then` come after them."""
        return parts if self.streaming is None else self.streaming.each(parts, then)
