"""The modulations of all blocks in one evaluation: how they are stacked, split and spread over tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Chunks


@dataclass(frozen=True)
class Modulations:
    """Shifts, scales, gates of one evaluation: (image, text) a double block, one a single block, the last."""

    double: tuple[tuple[Chunks, Chunks], ...]
    single: tuple[Chunks, ...]
    last: Chunks

    def chunks(self) -> list[Tensor]:
        """All of them in order."""
        return [c for chunks in (*itertools.chain(*self.double), *self.single, self.last) for c in chunks]

    def like(self, table: Iterable[Tensor]) -> Modulations:
        """Modulations of the same structure whose chunks are the rows of `table`, in order."""
        rows = iter(table)

        def next_of(chunks: Chunks) -> Chunks:
            return tuple(itertools.islice(rows, len(chunks)))

        double = tuple((next_of(img), next_of(txt)) for img, txt in self.double)
        return Modulations(double, tuple(map(next_of, self.single)), next_of(self.last))


class ModulationsOnDemand(Mapping[float, Modulations]):
    """Modulations computed on first access. Only the latest are kept: a solver that chooses its sigmas
    returns to none but the last.
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


Group = tuple[int, Modulations]
"""A number of image tokens, and the modulations that they get."""


def split_modulations(stacked: Modulations, batch: int) -> Iterator[Modulations]:
    """Modulations of one evaluation after the other, from those of a batch of evaluations of `batch` rows."""
    by_row = torch.stack(stacked.chunks(), dim=1).unflatten(0, (-1, batch))  # [S, B, chunks, 1, hidden]
    for table in by_row.transpose(1, 2):
        yield stacked.like(table.clone(memory_format=torch.contiguous_format).unbind())


def per_token(groups: Sequence[tuple[int, Chunks]]) -> Chunks:
    """Chunks [B, L, hidden] from those of groups: (number of tokens, chunks [B, 1, hidden]) each."""
    columns = zip(*(chunks for _, chunks in groups), strict=True)
    lengths = [length for length, _ in groups]
    return tuple(
        torch.cat([c.expand(-1, n, -1) for c, n in zip(column, lengths, strict=True)], dim=1)
        for column in columns
    )
