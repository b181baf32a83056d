"""Which keys of a LoRA were applied and which were not, as text for the user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .conventions import CLIP, T5, TRANSFORMER
from .entry import Entry
from .file import LoraFile

MAX_KEYS = 5
"""Unmatched keys that a report lists."""

_PARTS = {TRANSFORMER: "the transformer", CLIP: "CLIP-L", T5: "T5"}


@dataclass(frozen=True)
class Misfit:
    """An entry that does not fit the model, by its keys, and why, as a clause."""

    part: str
    keys: tuple[str, ...]
    why: str


@dataclass(frozen=True, eq=False)
class FileReport:
    """One LoRA: the parts that it was attached to, and the entries that do not fit them."""

    file: LoraFile
    attached: frozenset[str]
    misfits: tuple[Misfit, ...]

    def matched(self) -> int:
        """Keys of the file that fit the parts that it was attached to."""
        entries = [entry for entry in self.file.entries if entry.part in self.attached]
        return _count(entries) - sum(len(misfit.keys) for misfit in self.misfits)

    def unmatched(self) -> tuple[str, ...]:
        """Keys that mean nothing in FLUX.1, and those of entries that do not fit this model."""
        return (*self.file.unmatched, *(key for misfit in self.misfits for key in misfit.keys))

    def checked(self) -> FileReport:
        """The report itself; ValueError where the file has something for these parts but nothing fits."""
        if self.misfits and not self.matched():
            raise ValueError(
                f"nothing in {self.file.name} fits this model: {self.misfits[0].why}; "
                "choose a LoRA that was made for a model of these sizes"
            )
        return self

    def text(self) -> str:
        """Lines with the convention, the kinds of adapters, counts, and the first unmatched keys."""
        unmatched = self.unmatched()
        lines = [
            f"{self.file.name}: {self.file.convention}; {_kinds(self.file.entries)}",
            f"matched: {self.matched()} keys",
            f"unmatched: {len(unmatched)} keys{': ' if unmatched else ''}{_first(unmatched)}",
        ]
        if self.misfits:
            lines.append(f"does not fit: {self.misfits[0].why}")
        lines += [f"note: {notice}" for notice in self.file.notices[:MAX_KEYS]]
        if (more := len(self.file.notices) - MAX_KEYS) > 0:
            lines.append(f"note: and {more} more")
        for part in sorted(self.file.parts() - self.attached):
            count = _count(entry for entry in self.file.entries if entry.part == part)
            lines.append(f"not connected: {count} keys for {_PARTS[part]}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Report:
    """A report on each LoRA, in their order."""

    files: tuple[FileReport, ...]

    def joined(self, other: Report) -> Report:
        """One report of the same LoRAs attached to two models. Raises ValueError for other LoRAs."""
        if [a.file for a in self.files] != [b.file for b in other.files]:
            raise ValueError("only reports of the same LoRAs can be joined; attach the same ones to both")
        return Report(
            tuple(
                FileReport(a.file, a.attached | b.attached, (*a.misfits, *b.misfits))
                for a, b in zip(self.files, other.files, strict=True)
            )
        )

    def checked(self) -> Report:
        """The report itself; ValueError for a LoRA of which nothing was attached to what is connected."""
        for file in self.files:
            if not file.checked().matched():
                parts = " and ".join(_PARTS[part] for part in sorted(file.file.parts()))
                raise ValueError(
                    f"{file.file.name} changes nothing of what is connected here, only {parts}; "
                    "connect the CLIP too"
                )
        return self

    def text(self) -> str:
        """Each LoRA's lines."""
        return "\n".join(file.text() for file in self.files)


def _count(entries: Iterable[Entry]) -> int:
    return sum(len(entry.keys) for entry in entries)


def _kinds(entries: Sequence[Entry]) -> str:
    """The kinds of adapters with their ranks: "LoRA of rank 4 to 16 for 304 layers"."""
    ranks: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    for entry in entries:
        kind = "values" if entry.adapter is None else entry.adapter.kind
        counts[kind] = counts.get(kind, 0) + 1
        if entry.adapter is not None and entry.adapter.rank is not None:
            ranks.setdefault(kind, []).append(entry.adapter.rank)
    parts = []
    for kind, count in counts.items():
        low, high = min(ranks.get(kind, [0])), max(ranks.get(kind, [0]))
        rank = "" if not high else f" of rank {low}" if low == high else f" of rank {low} to {high}"
        parts.append(f"{kind}{rank} for {count} {'layer' if count == 1 else 'layers'}")
    return ", ".join(parts)


def _first(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - MAX_KEYS} more" if len(keys) > MAX_KEYS else ""
    return ", ".join(key[:120] for key in keys[:MAX_KEYS]) + more
