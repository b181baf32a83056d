"""A cache of the deeper blocks' outputs: steps in which only the first block is computed.

Block outputs change little between neighboring steps. The first block is always computed. When its change to
the image differs little from that of the last computed step, what all deeper blocks would add is not computed
either: it is reused from that step ("first block", after ParaAttention's first block cache,
chengzeyi/ParaAttention), or extrapolated linearly in sigma from the last two ("forecast", the first order of
TaylorSeer, Liu et al. 2025, arXiv:2503.06923). With few steps no two are alike, and nothing is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..model.hooks import BlockHook, Finished, Place, RunBlock, Streams

METHODS = ("forecast", "first block")


@dataclass(frozen=True)
class Caching:
    """How steps are skipped: by which of METHODS, and up to which relative change of the first block.

    Raises ValueError for another method, and for a threshold below 0, which would never be met.
    """

    method: str = "forecast"
    threshold: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"steps are cached by {' or '.join(METHODS)}, got {self.method!r}")
        if not self.threshold >= 0.0:
            raise ValueError(f"the threshold of a cache must be at least 0, got {self.threshold}")

    def new_cache(self) -> StepCache:
        """An empty cache for one prompt during one run."""
        return StepCache(self.threshold, points=2 if self.method == "forecast" else 1)


class StepCache:
    """What the deeper blocks added at the last computed steps of one run, for one prompt.

    `skipped` and `computed` count evaluations. An image of another size, or a sigma above the last, clears
    the cache. `hook` attaches it to the block loop:

        velocity = model(tokens, prepared, sigma, Hooks(blocks=(cache.hook(sigma),)))
    """

    def __init__(self, threshold: float, points: int) -> None:
        self.threshold, self._points = threshold, points
        self.skipped = self.computed = 0
        self._change: Tensor | None = None
        self._known: list[tuple[float, Tensor]] = []

    def clear(self) -> None:
        """Drop the tensors, and keep the counts: the run is over."""
        self._change = None
        self._known.clear()

    def hook(self, sigma: float) -> BlockHook:
        """The block hook of one evaluation at `sigma`. It must be the outermost hook."""
        first: list[Tensor] = []

        def cached(at: Place, streams: Streams, block: RunBlock) -> Streams | Finished:
            out = block(streams)
            if at.kind == "double" and at.index == 0:
                first.append(out.img)
                added = self.lookup(sigma, out.img - streams.img)
                if added is not None:
                    return Finished(out.img + added)
            elif at.is_last:
                self.store(sigma, at.image(out) - first[0])
            return out

        return cached

    def lookup(self, sigma: float, change: Tensor) -> Tensor | None:
        """What the deeper blocks would add [B, N, hidden], or None where they must be computed.

        `change` [B, N, hidden] is what the first block added. In a batch the image that changed most decides.
        """
        before = self._change
        if (
            before is not None
            and self._known
            and (before.shape != change.shape or sigma > self._known[-1][0])
        ):
            self._known.clear()
        if (
            len(self._known) < self._points
            or before is None
            or _relative_change(before, change) >= self.threshold
        ):
            self._change = change
            return None
        self.skipped += 1
        sigma_last, last = self._known[-1]
        sigma_first, first = self._known[0]
        if sigma_first == sigma_last:
            return last
        return last + (last - first) * ((sigma - sigma_last) / (sigma_last - sigma_first))

    def store(self, sigma: float, added: Tensor) -> None:
        """Keep what the deeper blocks added when they were computed."""
        self.computed += 1
        if self._known and self._known[-1][0] == sigma:
            self._known.pop()
        self._known = [*self._known, (sigma, added)][-self._points :]


def _relative_change(before: Tensor, change: Tensor) -> float:
    """The mean absolute difference over the mean magnitude, the largest of a batch."""
    moved = (change - before).abs().flatten(1).float().mean(dim=1)
    return float((moved / before.abs().flatten(1).float().mean(dim=1).clamp_min(1e-12)).max())
