"""Steps whose deeper blocks are not computed, because what they would add is known well enough.

From one step to the next the network's blocks change their minds little. The first block is always computed.
When what it changes is nearly what it changed at the last computed step, what all the deeper ones add is not
computed either: it is taken from that step ("first block", after ParaAttention's first block cache,
chengzeyi/ParaAttention), or carried on in a straight line from the last two ("forecast", the first order of
TaylorSeer, Liu et al. 2025, arXiv:2503.06923, in sigma). With few steps nothing is alike, and nothing is
skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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

    def memory(self) -> BlockMemory:
        """An empty memory for one prompt during one run."""
        return BlockMemory(self.threshold, points=2 if self.method == "forecast" else 1)


class BlockMemory:
    """What the deeper blocks added at the last computed steps of one run, for one prompt.

    `skipped` and `computed` count evaluations. A picture of another size, or a sigma above the last, begins
    anew.
    """

    def __init__(self, threshold: float, points: int) -> None:
        self.threshold, self._points = threshold, points
        self.skipped = self.computed = 0
        self._change: Tensor | None = None
        self._known: list[tuple[float, Tensor]] = []

    def guess(self, sigma: float, change: Tensor) -> Tensor | None:
        """What the deeper blocks would add [B, N, hidden], or None where they must be computed.

        `change` [B, N, hidden] is what the first block has changed. Of a batch the picture that has changed
        most decides.
        """
        before = self._change
        if (
            before is not None
            and self._known
            and (before.shape != change.shape or sigma > self._known[-1][0])
        ):
            self._known.clear()
        if len(self._known) < self._points or before is None or self._moved(before, change) >= self.threshold:
            self._change = change
            return None
        self.skipped += 1
        sigma_last, last = self._known[-1]
        sigma_first, first = self._known[0]
        if sigma_first == sigma_last:
            return last
        return last + (last - first) * ((sigma - sigma_last) / (sigma_last - sigma_first))

    def keep(self, sigma: float, added: Tensor) -> None:
        """Remember what the deeper blocks added when they were computed."""
        self.computed += 1
        if self._known and self._known[-1][0] == sigma:
            self._known.pop()
        self._known = [*self._known, (sigma, added)][-self._points :]

    @staticmethod
    def _moved(before: Tensor, change: Tensor) -> float:
        """The mean absolute difference over the mean magnitude, the largest of a batch."""
        moved = (change - before).abs().flatten(1).float().mean(dim=1)
        return float((moved / before.abs().flatten(1).float().mean(dim=1).clamp_min(1e-12)).max())
