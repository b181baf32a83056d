"""A strength for each block, written as text.

    double_blocks.0-9=0.5, single_blocks=0, *.img_attn=1

Rules are separated by commas, semicolons or line ends. The pattern is the start of a layer's name (BFL's, as
in `double_blocks.3.img_attn.qkv`), in pieces between dots: a name, in which * matches anything, an index, or
a range of indices a-b. `*.` in front skips any pieces, so that `*.img_attn` means that attention in every
block; `*` alone means every layer. The last rule that fits a layer decides; without one its strength is 1.
It is multiplied by the LoRA's own strength. Text encoders have their own strength and no rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

_RANGE = re.compile(r"(\d{1,4})-(\d{1,4})")


@dataclass(frozen=True)
class Rule:
    """One `pattern=strength`: the pattern's pieces, whether it may start at any piece, and the strength."""

    pieces: tuple[str, ...]
    anywhere: bool
    strength: float

    def fits(self, module: str) -> bool:
        """Whether the pattern begins the name, or (after `*.`) the rest of it from some piece on."""
        name, length = module.split("."), len(self.pieces)
        starts = range(len(name) - length + 1) if self.anywhere else range(len(name) >= length)
        return any(all(map(_fits, self.pieces, name[start : start + length])) for start in starts)


@dataclass(frozen=True)
class BlockStrengths:
    """The rules of a text, in its order."""

    rules: tuple[Rule, ...] = ()

    def of(self, module: str) -> float:
        """The strength of a layer of the transformer: the last rule's that fits it, else 1."""
        return next((rule.strength for rule in reversed(self.rules) if rule.fits(module)), 1.0)


def parse_blocks(text: str, modules: Sequence[str]) -> BlockStrengths:
    """The rules in a text; `modules` are the model's layers.

    Raises ValueError for a rule that cannot be parsed and for one that fits no layer.
    """
    rules: list[Rule] = []
    for written in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        pattern, equals, value = (part.strip() for part in written.partition("="))
        if not equals or not pattern:
            raise ValueError(
                f"a block strength is written pattern=strength, got {written[:80]!r}; "
                "write for example double_blocks.0-9=0.5"
            )
        rule = _rule(pattern, _strength(value, written))
        if not any(rule.fits(module) for module in modules):
            raise ValueError(
                f"no layer's name starts with {pattern[:80]!r}; "
                "write for example double_blocks.0-18, single_blocks.5.linear2 or *.img_attn"
            )
        rules.append(rule)
    return BlockStrengths(tuple(rules))


def _strength(value: str, written: str) -> float:
    try:
        strength = float(value)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ValueError(f"a block strength must be a number, got {value[:80]!r} in {written[:80]!r}")
    return strength


def _rule(pattern: str, strength: float) -> Rule:
    pieces = tuple(pattern.split("."))
    anywhere = pieces[0] == "*" and len(pieces) > 1
    for piece in pieces:
        if (bounds := _RANGE.fullmatch(piece)) and int(bounds[1]) > int(bounds[2]):
            raise ValueError(f"a range of blocks must rise, got {piece} in {pattern[:80]!r}")
    return Rule(pieces[1:] if anywhere else pieces, anywhere, strength)


def _fits(pattern: str, piece: str) -> bool:
    """Whether one piece of a pattern fits a piece of a name."""
    if bounds := _RANGE.fullmatch(pattern):
        return piece.isdecimal() and int(bounds[1]) <= int(piece) <= int(bounds[2])
    return fnmatchcase(piece, pattern)
