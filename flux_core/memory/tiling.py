"""The autoencoder in strips of rows: a picture of any size in little memory, and no seam anywhere.

Nothing is blended or guessed. Every layer is computed for one strip after another, with the rows that its
convolution needs of the strips around; the statistics of a GroupNorm are gathered over all strips before the
layer behind it begins. So the result is that of one piece but for rounding. What this costs:

- The widest activations never exist as a whole. What an Upsample gives is computed whenever it is read; a
  residual block overwrites its input from the top, and computes its first convolution twice, for the
  statistics and for the result, where there is no room to keep it.
- Where one whole activation does not fit, float32 is kept as 16 bits between layers, with an exponent for
  each row, and computed in float32 as ever.

The lowest resolution, a 64th of the pixels, is taken in one piece, and a batch picture by picture. How an
activation is kept is in strips.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.autoencoder import AutoEncoder, Downsample, Level, ResnetBlock, Upsample, activated
from ..model.group_norm import ChannelMoments
from . import free_memory
from .strips import Source, Stored, Upsampled, convolved, halved

LIMIT = 1_700_000_000
"""Bytes of activations to which a CPU keeps by strips."""
STRIPS = 96
"""A strip of the widest activation takes this part of the limit."""

Progress = Callable[[int, int], None]


def room(device: torch.device) -> int:
    """Bytes that activations may take on a device: nine tenths of what is free, on a CPU at most LIMIT."""
    free = free_memory(device)
    most = LIMIT if free is None else free * 9 // 10
    return most if device.type == "cuda" else min(most, LIMIT)


@torch.no_grad()
def decode(
    autoencoder: AutoEncoder, raw: Tensor, on_progress: Progress | None = None, limit: int | None = None
) -> Tensor:
    """Images [B, 3, H, W], about -1..1 (not clamped), of raw latents [B, 16, h, w], as `AutoEncoder.decode`.

    In one piece where its activations take at most `limit` bytes, otherwise picture by picture, and each in
    strips where that is needed; None is what `room` says. `on_progress` hears (done, total) of these; what it
    raises ends the work. Without gradients. Raises what `AutoEncoder.decode` raises.
    """
    autoencoder.check_latent(raw)
    height, width = (side * autoencoder.factor for side in raw.shape[2:])
    need = bytes_in_one_piece(autoencoder, height, width)
    limit = room(autoencoder.device) if limit is None else limit
    if need * len(raw) <= limit:
        return autoencoder.decode(raw)
    decoder = autoencoder.decoder
    steps = list(steps_of(cast(Iterable[Level], reversed(decoder.up)), raw.shape[2] * raw.shape[3]))
    walk = Walk(limit, len(raw) * sum(step.cost for step in steps), on_progress)

    def one(latent: Tensor) -> Tensor:
        if need <= limit:
            return walk.told(autoencoder.decode(latent), steps)
        walk.begin(
            Stored.of(decoder.mid(decoder.conv_in(latent.contiguous(memory_format=torch.channels_last))))
        )
        walk.through(steps)
        return walk.end(decoder.norm_out, decoder.conv_out)

    return torch.cat([one(latent) for latent in raw.to(autoencoder.dtype).split(1)])


@torch.no_grad()
def encode(
    autoencoder: AutoEncoder, image: Tensor, on_progress: Progress | None = None, limit: int | None = None
) -> Tensor:
    """Raw latent [B, 16, h, w] of images [B, 3, H, W] in -1..1, as `AutoEncoder.encode`.

    In one piece or in strips, and with the arguments, as `decode`. Raises what `AutoEncoder.encode` raises.
    """
    autoencoder.check_image(image)
    height, width = image.shape[2:]
    need = bytes_in_one_piece(autoencoder, height, width)
    limit = room(autoencoder.device) if limit is None else limit
    if need * len(image) <= limit:
        return autoencoder.encode(image)
    encoder = autoencoder.encoder
    steps = list(steps_of(cast(Iterable[Level], encoder.down), height * width))
    walk = Walk(limit, len(image) * sum(step.cost for step in steps), on_progress)

    def one(picture: Tensor) -> Tensor:
        if need <= limit:
            return walk.told(autoencoder.encode(picture), steps)
        walk.begin_with(encoder.conv_in, picture)
        walk.through(steps)
        last = activated(encoder.mid(walk.x.whole()), encoder.norm_out)
        return encoder.conv_out(last).chunk(2, dim=1)[0]

    return torch.cat([one(picture) for picture in image.to(autoencoder.dtype).split(1)])


def bytes_in_one_piece(autoencoder: AutoEncoder, height: int, width: int) -> int:
    """About the most bytes of activations at one time, for one picture in one piece.

    That is in the first residual block of a level: its input, the same normed, and what it makes of that.
    """
    spec = autoencoder.spec
    widths = [spec.ch * multiple for multiple in spec.ch_mult]
    channels = [2 * before + after for after, before in zip(widths, [*widths[1:], widths[-1]], strict=True)]
    return max(c * height * width // 4**i for i, c in enumerate(channels)) * autoencoder.dtype.itemsize


@dataclass(frozen=True)
class BlockStep:
    """A residual block, the change of size before it, and what they cost (multiplications, about)."""

    block: ResnetBlock
    resample: Upsample | Downsample | None
    cost: int


def steps_of(levels: Iterable[Level], pixels: int) -> Iterator[BlockStep]:
    """The blocks of levels in the order of computing; the first level has so many pixels."""
    resample: Upsample | Downsample | None = None
    for level in levels:
        if resample is not None:
            pixels = pixels * 4 if isinstance(resample, Upsample) else pixels // 4
        for block in cast(Iterable[ResnetBlock], level.block):
            layers: list[nn.Module] = [block] if resample is None else [block, resample]
            cost = pixels * sum(p.numel() for layer in layers for p in layer.parameters())
            yield BlockStep(block, resample, cost)
            resample = None
        resample = level.resample


class Walk:
    """One activation on its way through the levels in strips, its moments, and how far it is."""

    x: Stored
    moments: ChannelMoments
    _like: Tensor

    def __init__(self, limit: int, total: int, on_progress: Progress | None) -> None:
        self._limit, self._total, self._on_progress = limit, total, on_progress
        self._done = 0.0

    def begin(self, x: Stored) -> None:
        self.x, self.moments, self._like = x, ChannelMoments().add(x.whole()), x.whole().new_empty(0)

    def begin_with(self, conv: nn.Conv2d, picture: Tensor) -> None:
        """Begin with what a 3x3 convolution makes of a whole picture."""
        self._like, source = picture.new_empty(0), Stored.of(picture)
        self.x = self._new((conv.out_channels, picture.shape[2], picture.shape[3]), source)
        self._fill(lambda *span: convolved(conv, source.rows, picture.shape[2], *span), 0)

    def through(self, steps: Iterable[BlockStep]) -> None:
        """Take the activation through blocks."""
        for step in steps:
            cost = step.cost / 2
            source: Source = self.x
            if isinstance(step.resample, Upsample):
                cost = step.cost / 3
                source = Upsampled(self.x, step.resample)
                self.moments = ChannelMoments()
                for span in self._strips(source.shape, cost):
                    self.moments.add(source.rows(*span))
            elif step.resample is not None:
                cost = step.cost / 3
                source = self._halve(step.resample, cost)
            self._block(step.block, source, cost)

    def end(self, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
        """What the last norm, SiLU and convolution make of the activation."""
        x, moments = self.x, self.moments
        _, height, width = x.shape
        answer = torch.empty(
            (1, conv.out_channels, height, width),
            dtype=self._like.dtype,
            device=self._like.device,
            memory_format=torch.channels_last,
        )
        for first, last in self._strips(x.shape, 0):  # small results in between would hold memory open
            answer[:, :, first:last] = convolved(
                conv, lambda a, b: normed(moments, x.rows(a, b), norm), height, first, last
            )
        return answer

    def told(self, answer: Tensor, steps: Iterable[BlockStep]) -> Tensor:
        """The answer, after telling that the steps to it are done."""
        self._tell(sum(step.cost for step in steps))
        return answer

    def _halve(self, layer: Downsample, cost: float) -> Stored:
        channels, height, width = self.x.shape
        before = self.x
        self.x = self._new((channels, height // 2, width // 2), before)
        self._fill(lambda *span: halved(layer, before, *span), cost)
        return self.x

    def _block(self, block: ResnetBlock, source: Source, cost: float) -> None:
        """Put the activation that a residual block makes of another into `x`, and its moments beside it."""
        _, height, width = source.shape
        shape = (block.conv2.out_channels, height, width)
        moments, inner = self.moments, ChannelMoments()

        def first_half(first: int, last: int) -> Tensor:
            return convolved(
                block.conv1,
                lambda a, b: normed(moments, source.rows(a, b), block.norm1),
                height,
                first,
                last,
            )

        own = source if isinstance(source, Stored) and source.shape == shape else None
        kept = None if own is not None and not self._fits(shape, source) else self._new(shape, source)
        for first, last in self._strips(source.shape, cost):
            rows = first_half(first, last)
            inner.add(rows)
            if kept is not None:
                kept.fill(first, rows)
        half = first_half if kept is None else kept.rows
        into = cast(Stored, own or kept)
        self.moments = ChannelMoments()
        for first, last in self._strips(source.shape, cost):
            rows = convolved(
                block.conv2, lambda a, b: normed(inner, half(a, b), block.norm2), height, first, last
            ).add_(block.nin_shortcut(source.rows(first, last)))
            self.moments.add(rows)
            into.overwrite(first, rows)
        self.x = into

    def _fill(self, make: Callable[[int, int], Tensor], cost: float) -> None:
        self.moments = ChannelMoments()
        for first, last in self._strips(self.x.shape, cost):
            rows = make(first, last)
            self.moments.add(rows)
            self.x.fill(first, rows)

    def _bytes(self, shape: tuple[int, int, int]) -> int:
        return shape[0] * shape[1] * shape[2] * self._like.dtype.itemsize

    def _fits(self, shape: tuple[int, int, int], beside: Source) -> bool:
        return beside.nbytes + self._bytes(shape) <= self._limit

    def _new(self, shape: tuple[int, int, int], beside: Source) -> Stored:
        """Room for an activation, in 16 bits where it would not fit beside another; then perhaps that too."""
        if self._fits(shape, beside):
            return Stored(shape, self._like)
        if beside.nbytes + self._bytes(shape) // 2 > self._limit:
            beside.compact()
        return Stored(shape, self._like, compact=True)

    def _strips(self, shape: tuple[int, int, int], cost: float) -> Iterator[tuple[int, int]]:
        """First and last + 1 of the rows of each strip; all of them cost so much."""
        height = shape[1]
        rows = max(4, self._limit // STRIPS // max(1, self._bytes(shape) // height) // 2 * 2)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            yield first, last
            self._tell(cost * (last - first) / height)

    def _tell(self, cost: float) -> None:
        self._done += cost
        if self._on_progress is not None:
            self._on_progress(min(round(self._done), self._total), self._total)


def normed(moments: ChannelMoments, rows: Tensor, norm: nn.GroupNorm) -> Tensor:
    """SiLU of rows after a GroupNorm that has these moments of the whole activation."""
    return F.silu(moments.normalize(rows, norm), inplace=True)
