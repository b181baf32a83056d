"""Reads a prompt for a text encoder: its tokens with their weights, and notices of what has no effect.

FLUX.1 was trained on plain text, so a prompt is read literally by default. With the weights of ComfyUI,
`(word)` multiplies by 1.1, `(word:1.3)` sets 1.3, and `\\(` and `\\)` are plain brackets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tokenizers import Encoding, Tokenizer

T = TypeVar("T")

LITERAL, COMFY = "literal", "comfy"
WEIGHTS = (LITERAL, COMFY)
"""How the weights in a prompt are read: as plain text, or as ComfyUI reads them."""

BRACKET_WEIGHT = 1.1
"""The weight of one pair of brackets without a number."""
MAX_DEPTH = 20
"""Brackets nested deeper than this are plain text."""
WHOLE = 8
"""A weighted part of fewer tokens is not split where a row is full (ComfyUI, sd1_clip.py)."""
SHOWN = 200
"""Characters of a prompt that a message quotes."""

TAGS = re.compile(
    r"<[A-Za-z]\w*:[^<>\n]*>"  # <lora:name:0.8>
    r"|(?<!\w)embedding:[^\s,()]+"
    r"|\b(?:BREAK|ADDCOL|ADDROW|ADDCOMM|ADDBASE)\b"
    r"|(?<![A-Z]\s)(?<!\S)AND(?!\S)(?!\s[A-Z]{2})"  # not in a text in capitals
    r"|\[[^\[\]:\n]*:[^\[\]:\n]*:\s*[\d.]+\s*\]"  # [from:to:0.5]
    r"|\[[^\[\]|\n]+(?:\|[^\[\]|\n]+)+\]"  # [one|other]
    r"|(?<!\w)__[\w/*-]{1,100}__(?!\w)"  # a wildcard
    r"|(?<!\S)--[a-z]+(?: [\d.:]+)?(?!\S)"  # --ar 16:9
    r"|(?<!\S)-?\d+(?:\.\d+)?::[^:\n]+::"  # 1.3::text::
    r"|^Negative prompt:|^Steps: \d+(?=,)",
    re.MULTILINE,
)
"""Tags of other programs, which are plain words here."""

Token = tuple[int, float, int]
"""A token's id, its weight, and the number of its part of the prompt from 1; 0 for a mark."""


@dataclass(frozen=True)
class Part:
    """A part of a prompt and its weight."""

    text: str
    weight: float = 1.0


def weighted_parts(prompt: str) -> tuple[list[Part], list[str]]:
    """The parts of a prompt as ComfyUI weights them, and the brackets that state a weight, as written.

    The syntax is that of ComfyUI's token_weights (sd1_clip.py), except that a weight which is not finite and
    brackets nested more than 20 deep are plain text.
    """
    parts: list[Part] = []
    stated: list[str] = []

    def read(text: str, weight: float, depth: int) -> None:
        for group in _groups(text):
            if depth == MAX_DEPTH or not _is_bracketed(group):
                parts.append(Part(group.replace(r"\)", ")").replace(r"\(", "("), weight))
                continue
            content, own = group[1:-1], weight * BRACKET_WEIGHT
            head, _, tail = content.rpartition(":")
            number = _finite(tail) if head else None
            if number is not None:
                stated.append(group)
                content, own = head, number
            read(content, own, depth + 1)

    read(prompt, 1.0, 0)
    return parts, stated


def _groups(text: str) -> Iterator[str]:
    """Outermost brackets and the text between them; brackets that do not match are part of the text."""
    depth = start = 0
    for i, char in enumerate(text):
        if char not in "()" or text[i - 1 : i] == "\\":
            continue
        if char == "(":
            if depth == 0 and i > start:
                yield text[start:i]
            if depth == 0:
                start = i
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                yield text[start : i + 1]
                start = i + 1
    if start < len(text):
        yield text[start:]


def _is_bracketed(group: str) -> bool:
    return len(group) >= 2 and group[0] == "(" and group[-1] == ")" and group[-2] != "\\"


def _finite(text: str) -> float | None:
    """The finite number that a text is, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Reading:
    """A prompt as one encoder reads it: `groups` of tokens, one for each part, without marks."""

    encoder: str
    groups: tuple[tuple[Token, ...], ...]
    start: tuple[int, ...]
    end: tuple[int, ...]
    unknown: tuple[str, ...]
    """The text of each unknown token that is not in a tag."""

    @property
    def words(self) -> int:
        """The number of tokens without marks."""
        return sum(map(len, self.groups))

    @property
    def needed(self) -> int:
        """The number of tokens with marks."""
        return self.words + len(self.start) + len(self.end)

    def rows(self, limit: int | None = None) -> list[list[Token]]:
        """The tokens with marks, in rows of at most `limit` tokens (as ComfyUI's SDTokenizer fills them)."""
        room = self.words if limit is None else max(1, limit - len(self.start) - len(self.end))
        rows: list[list[Token]] = [[]]
        for group in self.groups:
            split, used = len(group) >= min(WHOLE, room + 1), 0
            while len(group) - used > (free := room - len(rows[-1])):
                if split:
                    rows[-1] += group[used : used + free]
                    used += free
                rows.append([])
            rows[-1] += group[used:]
        start, end = [(mark, 1.0, 0) for mark in self.start], [(mark, 1.0, 0) for mark in self.end]
        return [[*start, *row, *end] for row in rows]


def fit(row: Sequence[T], length: int, filler: T) -> list[T]:
    """The row with exactly `length` tokens: truncated before its last one, or padded."""
    if len(row) > length:
        return [*row[: length - 1], row[-1]]
    return [*row, *([filler] * (length - len(row)))]


class PromptReader:
    """Reads prompts by an encoder's tokenizer: `read_text` returns a text's ids, and its unknown parts."""

    def __init__(
        self,
        encoder: str,
        read_text: Callable[[str], tuple[list[int], list[str]]],
        start: Sequence[int],
        end: Sequence[int],
    ) -> None:
        self.encoder, self.start, self.end = encoder, tuple(start), tuple(end)
        self._read_text = read_text

    @classmethod
    def of(cls, encoder: str, tokenizer: Tokenizer) -> PromptReader:
        """A reader by a tokenizer whose template adds the marks, the last of them at the end."""
        marks = encoded(tokenizer, "", encoder).ids
        name = getattr(tokenizer.model, "unk_token", None) or "<unk>"
        unknown_id = tokenizer.token_to_id(name)

        def read_text(text: str) -> tuple[list[int], list[str]]:
            found = encoded(tokenizer, text, encoder, marks=False)
            if unknown_id is None or unknown_id in marks or unknown_id not in found.ids:
                return found.ids, []
            spans = [span for id, span in zip(found.ids, found.offsets, strict=True) if id == unknown_id]
            tags = [tag.span() for tag in TAGS.finditer(text)]  # they have a notice of their own
            missing = [
                text[start:end]
                for start, end in spans
                if not any(first <= start and end <= last for first, last in tags)
            ]
            return found.ids, missing

        return cls(encoder, read_text, marks[:-1], marks[-1:])

    def read(self, prompt: str, weights: str = LITERAL) -> Reading:
        """The tokens of a prompt, with `weights` as one of WEIGHTS. Raises ValueError for another one."""
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be {' or '.join(WEIGHTS)}, got {weights!r}; choose one of them")
        prompt = as_unicode(prompt)
        parts = weighted_parts(prompt)[0] if weights == COMFY else [Part(prompt)]
        groups, unknown = [], []
        for number, part in enumerate(parts, 1):
            ids, missing = self._read_text(part.text)
            groups.append(tuple((id, part.weight, number) for id in ids))
            unknown += missing
        return Reading(self.encoder, tuple(groups), self.start, self.end, tuple(unknown))


def encoded(tokenizer: Tokenizer, text: str, encoder: str, marks: bool = True) -> Encoding:
    """What the tokenizer makes of a text. Raises ValueError where it fails, as a broken one does."""
    try:
        return tokenizer.encode(text, add_special_tokens=marks)
    except BaseException as error:  # a panic of the tokenizers library is none of Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{encoder}'s tokenizer fails on {quoted(text)} ({quoted(str(error))}); "
            "put the tokenizer.json that belongs to this encoder beside it"
        ) from error


def as_unicode(text: str) -> str:
    """The text with U+FFFD for half an emoji (a lone surrogate), which a tokenizer does not accept."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def quoted(text: str) -> str:
    """The text in quotes, on one line and of at most 200 characters."""
    shown = repr(as_unicode(text[: SHOWN + 1]))
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 4]}...{shown[-1]}"


# Notices: one sentence each, of what in a prompt has no effect


def syntax_notices(texts: Sequence[str], weights: str = LITERAL) -> list[str]:
    """Notices of tags of other programs, and of weights that are read literally."""
    notices = []
    texts = list(dict.fromkeys(map(as_unicode, texts)))
    tags = [tag.strip() for text in texts for tag in TAGS.findall(text)]
    if tags:
        notices.append(
            f"FLUX.1 reads the tags {_listed(tags)} as plain words, they have no other effect; remove them"
        )
    stated = [group for text in texts for group in weighted_parts(text)[1]]
    if stated and weights == LITERAL:
        notices.append(
            f"the weights in {_listed(stated)} are read as plain text, as FLUX.1 was trained on; "
            f"remove them, or set weights to {COMFY} to apply them"
        )
    return notices


def reading_notices(readings: Sequence[Reading], limits: Sequence[int | None]) -> list[str]:
    """Notices of prompts longer than their limit, and of characters that a tokenizer does not know."""
    notices = [
        f"the prompt is too long for {reading.encoder}: {reading.needed} tokens, "
        f"of which it reads the first {limit}"
        for reading, limit in zip(readings, limits, strict=True)
        if limit is not None and reading.needed > limit
    ]
    lacking = [reading for reading in readings if reading.unknown]
    if lacking:
        counts = " and ".join(
            f"{reading.encoder} cannot read {len(reading.unknown)} of {reading.words} tokens"
            for reading in lacking
        )
        unknown = [text for reading in lacking for text in reading.unknown]
        notices.append(f"{counts}: {_listed(unknown)}; FLUX.1 reads English, write it in other words")
    return notices


def _listed(texts: Sequence[str]) -> str:
    return quoted(", ".join(dict.fromkeys(texts)))
