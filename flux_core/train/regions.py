"""Connected regions of a picture's mask: pieces, filled holes, a rim taken off. Neighbours share an edge."""

from __future__ import annotations

import numpy as np


def label(mask: np.ndarray) -> np.ndarray:
    """The number of the connected piece that each place of a mask bool [H, W] belongs to, 0 outside.

    By runs: each row's unbroken stretches are joined to those of the row above that they touch.
    """
    labels = np.zeros(mask.shape, dtype=np.int64)
    parent = [0]
    above: list[tuple[int, int, int]] = []  # (first column, column after the last, run)
    for y, row in enumerate(mask):
        ends = np.flatnonzero(np.diff(row, prepend=False, append=False)).tolist()
        here = []
        for start, stop in zip(ends[::2], ends[1::2], strict=True):
            run = len(parent)
            parent.append(run)
            for other_start, other_stop, other in above:
                if start < other_stop and other_start < stop:
                    parent[_root(parent, other)] = _root(parent, run)
            here.append((start, stop, run))
            labels[y, start:stop] = run
        above = here
    return np.array([_root(parent, run) for run in range(len(parent))])[labels]


def _root(parent: list[int], run: int) -> int:
    while parent[run] != run:
        parent[run] = run = parent[parent[run]]
    return run


def pieces(mask: np.ndarray, least: float = 0.0) -> list[np.ndarray]:
    """The connected pieces of a mask bool [H, W] with more than `least` pixels, the largest first."""
    labels = label(mask)
    names, sizes = np.unique(labels[mask], return_counts=True)
    return [labels == names[i] for i in np.argsort(-sizes, kind="stable") if sizes[i] > least]


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """The mask bool [H, W] with all that is not connected to the outside."""
    outside = label(np.pad(~mask, 1, constant_values=True))
    return (outside != outside[0, 0])[1:-1, 1:-1]


def erode(mask: np.ndarray, rim: int) -> np.ndarray:
    """The mask bool [H, W] without what lies within `rim` steps of the outside; the frame is no outside."""
    for _ in range(rim):
        p = np.pad(mask, 1, constant_values=True)
        mask = p[1:-1, 1:-1] & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    return mask
