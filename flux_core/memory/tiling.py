"""Runs the autoencoder in strips of rows: images of any size within a memory limit, without seams.

Nothing is blended or approximated at the borders. Every layer is computed strip by strip, with the rows of
neighboring strips that its convolution needs. A GroupNorm's statistics are accumulated over all strips before
the layer behind it starts. So the result equals that of one piece up to rounding. What this costs:

- The widest activations never exist as a whole. The output of an Upsample is recomputed whenever it is read.
  A residual block overwrites its input from the top; where its inner activation does not fit, the first
  convolution runs twice, once for the statistics and once for the result.
- Where one whole activation does not fit, float32 is stored as 16-bit integers between layers, with a scale
  for each row of each channel, and computed in float32 as before.

The lowest resolution, 1/64 of the pixels, is computed in one piece, and a batch image by image. How an
activation is stored is in strips.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.autoencoder import AutoEncoder, Downsample, Level, ResnetBlock, Upsample, norm_silu
from ..model.group_norm import ChannelMoments
from . import free_memory
from .strips import RowBuffer, RowSource, UpsampledRows, convolve_rows, downsample_rows

CPU_LIMIT = 1_700_000_000
"""Bytes of activations on a CPU, above which strips are used."""
STRIPS_PER_LIMIT = 96
"""A strip of the widest activation takes this fraction of the limit."""

Progress = Callable[[int, int], None]


def activation_limit(device: torch.device) -> int:
    """Bytes that activations may take on a device: 90 % of its free memory, on a CPU at most CPU_LIMIT."""
    free = free_memory(device)
    limit = CPU_LIMIT if free is None else free * 9 // 10
    return limit if device.type == "cuda" else min(limit, CPU_LIMIT)


@torch.no_grad()
def decode(
    autoencoder: AutoEncoder, raw: Tensor, on_progress: Progress | None = None, limit: int | None = None
) -> Tensor:
    """Images [B, 3, H, W], about -1..1 (not clamped), of raw latents [B, 16, h, w], as `AutoEncoder.decode`.

    In one piece where its activations take at most `limit` bytes (default: `activation_limit`), otherwise
    image by image, each in strips where needed. `on_progress` is then called with (done, total); an exception
    that it raises stops the work. Without gradients. Raises what `AutoEncoder.decode` raises.
    """
    autoencoder.check_latent(raw)
    height, width = (side * autoencoder.factor for side in raw.shape[2:])
    need = activation_bytes(autoencoder, height, width)
    limit = activation_limit(autoencoder.device) if limit is None else limit
    if need * len(raw) <= limit:
        return autoencoder.decode(raw)
    decoder = autoencoder.decoder
    steps = list(block_steps(cast(Iterable[Level], reversed(decoder.up)), raw.shape[2] * raw.shape[3]))
    strips = StripPass(limit, len(raw) * sum(step.cost for step in steps), on_progress)

    def decode_one(latent: Tensor) -> Tensor:
        if need <= limit:
            image = autoencoder.decode(latent)
            strips.advance(sum(step.cost for step in steps))
            return image
        latent = latent.contiguous(memory_format=torch.channels_last)
        strips.start(RowBuffer.of(decoder.mid(decoder.conv_in(latent))))
        strips.run(steps)
        return strips.finish(decoder.norm_out, decoder.conv_out)

    return torch.cat([decode_one(latent) for latent in raw.to(autoencoder.dtype).split(1)])


@torch.no_grad()
def encode(
    autoencoder: AutoEncoder, image: Tensor, on_progress: Progress | None = None, limit: int | None = None
) -> Tensor:
    """Raw latent [B, 16, h, w] of images [B, 3, H, W] in -1..1, as `AutoEncoder.encode`.

    In one piece or in strips, and with the arguments, as `decode`. Raises what `AutoEncoder.encode` raises.
    """
    autoencoder.check_image(image)
    height, width = image.shape[2:]
    need = activation_bytes(autoencoder, height, width)
    limit = activation_limit(autoencoder.device) if limit is None else limit
    if need * len(image) <= limit:
        return autoencoder.encode(image)
    encoder = autoencoder.encoder
    steps = list(block_steps(cast(Iterable[Level], encoder.down), height * width))
    strips = StripPass(limit, len(image) * sum(step.cost for step in steps), on_progress)

    def encode_one(single: Tensor) -> Tensor:
        if need <= limit:
            latent = autoencoder.encode(single)
            strips.advance(sum(step.cost for step in steps))
            return latent
        strips.start_with(encoder.conv_in, single)
        strips.run(steps)
        return encoder.conv_out(norm_silu(encoder.mid(strips.x.whole()), encoder.norm_out)).chunk(2, dim=1)[0]

    return torch.cat([encode_one(single) for single in image.to(autoencoder.dtype).split(1)])


def activation_bytes(autoencoder: AutoEncoder, height: int, width: int) -> int:
    """Approximate peak bytes of activations for one image in one piece.

    The peak is in the first residual block of a level: its input, that normalized, and the convolution's
    output.
    """
    spec = autoencoder.spec
    widths = [spec.ch * multiple for multiple in spec.ch_mult]
    channels = [2 * before + after for after, before in zip(widths, [*widths[1:], widths[-1]], strict=True)]
    return max(c * height * width // 4**i for i, c in enumerate(channels)) * autoencoder.dtype.itemsize


@dataclass(frozen=True)
class BlockStep:
    """A residual block, the resampling before it, and their cost (approximate multiplications)."""

    block: ResnetBlock
    resample: Upsample | Downsample | None
    cost: int


def block_steps(levels: Iterable[Level], pixels: int) -> Iterator[BlockStep]:
    """The blocks of levels in order of execution; `pixels` are those of the first level."""
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


class StripPass:
    """Runs levels in strips: the current activation `x`, its `moments`, and the progress."""

    x: RowBuffer
    moments: ChannelMoments
    _like: Tensor

    def __init__(self, limit: int, total: int, on_progress: Progress | None) -> None:
        self._limit, self._total, self._on_progress = limit, total, on_progress
        self._done = 0.0

    def start(self, x: RowBuffer) -> None:
        """Start with an activation."""
        self.x, self.moments, self._like = x, ChannelMoments().add(x.whole()), x.whole().new_empty(0)

    def start_with(self, conv: nn.Conv2d, image: Tensor) -> None:
        """Start with a 3x3 convolution of a whole image."""
        self._like, source = image.new_empty(0), RowBuffer.of(image)
        self.x = self._new((conv.out_channels, image.shape[2], image.shape[3]), source)
        self._fill(lambda *span: convolve_rows(conv, source.rows, image.shape[2], *span), 0)

    def run(self, steps: Iterable[BlockStep]) -> None:
        """Run blocks on the activation."""
        for step in steps:
            cost = step.cost / 2
            source: RowSource = self.x
            if isinstance(step.resample, Upsample):
                cost = step.cost / 3
                source = UpsampledRows(self.x, step.resample)
                self.moments = ChannelMoments()
                for span in self._strips(source.shape, cost):
                    self.moments.add(source.rows(*span))
            elif step.resample is not None:
                cost = step.cost / 3
                source = self._downsample(step.resample, cost)
            self._run_block(step.block, source, cost)

    def finish(self, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
        """The last norm, SiLU and convolution of the activation."""
        x, moments = self.x, self.moments
        _, height, width = x.shape
        out = torch.empty(
            (1, conv.out_channels, height, width),
            dtype=self._like.dtype,
            device=self._like.device,
            memory_format=torch.channels_last,
        )
        for first, last in self._strips(x.shape, 0):  # a list of results would fragment the memory
            out[:, :, first:last] = convolve_rows(
                conv, lambda a, b: norm_silu_rows(x.rows(a, b), moments, norm), height, first, last
            )
        return out

    def advance(self, cost: float) -> None:
        """Report progress."""
        self._done += cost
        if self._on_progress is not None:
            self._on_progress(min(round(self._done), self._total), self._total)

    def _downsample(self, layer: Downsample, cost: float) -> RowBuffer:
        channels, height, width = self.x.shape
        before = self.x
        self.x = self._new((channels, height // 2, width // 2), before)
        self._fill(lambda *span: downsample_rows(layer, before, *span), cost)
        return self.x

    def _run_block(self, block: ResnetBlock, source: RowSource, cost: float) -> None:
        """Assign the output of a residual block to `x`, and its moments to `moments`."""
        _, height, width = source.shape
        shape = (block.conv2.out_channels, height, width)
        moments, inner_moments = self.moments, ChannelMoments()

        def first_half(first: int, last: int) -> Tensor:
            return convolve_rows(
                block.conv1,
                lambda a, b: norm_silu_rows(source.rows(a, b), moments, block.norm1),
                height,
                first,
                last,
            )

        in_place = source if isinstance(source, RowBuffer) and source.shape == shape else None
        inner = None if in_place is not None and not self._fits(shape, source) else self._new(shape, source)
        for first, last in self._strips(source.shape, cost):
            rows = first_half(first, last)
            inner_moments.add(rows)
            if inner is not None:
                inner.fill(first, rows)
        inner_rows = first_half if inner is None else inner.rows
        out = cast(RowBuffer, in_place or inner)
        self.moments = ChannelMoments()
        for first, last in self._strips(source.shape, cost):
            rows = convolve_rows(
                block.conv2,
                lambda a, b: norm_silu_rows(inner_rows(a, b), inner_moments, block.norm2),
                height,
                first,
                last,
            ).add_(block.nin_shortcut(source.rows(first, last)))
            self.moments.add(rows)
            out.overwrite(first, rows)
        self.x = out

    def _fill(self, compute: Callable[[int, int], Tensor], cost: float) -> None:
        self.moments = ChannelMoments()
        for first, last in self._strips(self.x.shape, cost):
            rows = compute(first, last)
            self.moments.add(rows)
            self.x.fill(first, rows)

    def _bytes(self, shape: tuple[int, int, int]) -> int:
        return shape[0] * shape[1] * shape[2] * self._like.dtype.itemsize

    def _fits(self, shape: tuple[int, int, int], beside: RowSource) -> bool:
        return beside.nbytes + self._bytes(shape) <= self._limit

    def _new(self, shape: tuple[int, int, int], beside: RowSource) -> RowBuffer:
        """A new buffer; compact where it would not fit beside another, which may become compact, too."""
        if self._fits(shape, beside):
            return RowBuffer(shape, self._like)
        if beside.nbytes + self._bytes(shape) // 2 > self._limit:
            beside.compact()
        return RowBuffer(shape, self._like, compact=True)

    def _strips(self, shape: tuple[int, int, int], cost: float) -> Iterator[tuple[int, int]]:
        """Rows [first, last) of each strip; `cost` is that of all of them."""
        height = shape[1]
        rows = max(4, self._limit // STRIPS_PER_LIMIT // max(1, self._bytes(shape) // height) // 2 * 2)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            yield first, last
            self.advance(cost * (last - first) / height)


def norm_silu_rows(rows: Tensor, moments: ChannelMoments, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm and SiLU of rows, with the moments of the whole activation."""
    return F.silu(moments.normalize(rows, norm), inplace=True)
