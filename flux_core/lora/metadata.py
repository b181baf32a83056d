"""alpha from a LoRA file's metadata, for the layers that have no tensor of it, as its trainer meant it.

Where settings are found, the first that gives alpha counts:

  "lora_adapter_metadata"    JSON, PEFT's settings by part, "transformer.lora_alpha" (diffusers, SimpleTuner)
  "adapter_config", ...      JSON, PEFT's settings; also the file adapter_config.json beside PEFT's own files
  "transformer.lora_alpha"   the settings of a part, one by one
  "lora_alpha", "alpha"      one by one (PEFT, LightX2V)
  "network_alpha"            kohya's arguments
  "ss_network_alpha"         kohya

`alpha_pattern` gives some layers an alpha of their own. Its keys are regular expressions for the end of a
layer's name, at its start or after a dot; the first that matches decides (peft/utils/other.py,
get_pattern_key). `use_rslora` divides by the root of the rank instead of the rank (arXiv:2312.03732).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import regex

from .conventions import CLIP, PREFIX, T5, TEXT_PREFIXES, TRANSFORMER

_NESTED = ("lora_adapter_metadata", "adapter_config", "peft_config", "lora_config")
_ALPHAS = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
_PARTS = {TRANSFORMER: ("transformer", "unet"), CLIP: ("text_encoder",), T5: ("text_encoder_2",)}
CONFIG_FILE = "adapter_config.json"
"""PEFT's settings, beside a file `adapter_model.safetensors`."""

MAX_EXPRESSIONS, MAX_PATTERN_LENGTH, MAX_COPIES, MATCH_SECONDS, ALL_SECONDS = 200, 300, 1000, 0.1, 1.0
"""Limits: expressions, length of one, product of its counts in braces, seconds for one match and for all.

A short expression can take for ever; real ones take microseconds.
"""

_Settings = Mapping[str, object]


class TrainerSettings:
    """A file's settings, and, as sentences, which of them were used or cannot be used."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._notices: dict[str, None] = {}
        self._used: dict[str, int] = {}
        self._sources = [
            (name, self._parsed(name, metadata[name])) for name in _NESTED if metadata.get(name, "").strip()
        ]
        flat = {name: _value(text) for name, text in metadata.items() if name not in _NESTED}
        self._sources.append(("", flat))
        self._patterns: dict[tuple[str, str], _Patterns] = {}
        self._seconds_left = ALL_SECONDS

    def notices(self) -> tuple[str, ...]:
        """What was used, with the number of layers, and what was not."""
        used = [
            f"{name} of the metadata used for {count} {'layer' if count == 1 else 'layers'} without alpha"
            for name, count in self._used.items()
        ]
        unused = [notice for patterns in self._patterns.values() for notice in patterns.notices]
        return (*used, *self._notices, *unused)

    def alpha_of(self, layer: str, part: str, rank: int) -> float | None:
        """alpha of a layer of the file, such that alpha / rank is its scale; None where nothing gives one."""
        for source, settings in self._sources:
            for prefix in (*(f"{name}." for name in _PARTS[part]), ""):
                alpha = self._from(source, settings, prefix, layer)
                if alpha is not None:
                    rooted = self._is_true(settings, prefix, "use_rslora")
                    return alpha * (math.sqrt(rank) if rooted else 1.0)
        return None

    def note_of_part(self, part: str, has_magnitudes: bool) -> None:
        """Add what a part's settings say that its tensors do not carry out."""
        for _, settings in self._sources:
            for prefix in (*(f"{name}." for name in _PARTS[part]), ""):
                if self._is_true(settings, prefix, "use_dora") and not has_magnitudes:
                    self._note(f"{prefix}use_dora of the metadata not used: the file has no magnitudes")
                init = settings.get(f"{prefix}init_lora_weights")
                if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "loftq")):
                    self._note(
                        f"{prefix}init_lora_weights of the metadata not used: {init[:40]} trains on a base "
                        "model that it changed first, which only PEFT can repeat"
                    )

    def _from(self, source: str, settings: _Settings, prefix: str, layer: str) -> float | None:
        """alpha by the settings of one source with one prefix."""
        patterns = settings.get(f"{prefix}alpha_pattern")
        if isinstance(patterns, dict):
            own = self._by_pattern(source, prefix, patterns, layer)
            if own is not None:
                return own
        elif patterns is not None:
            self._note(
                f"{prefix}alpha_pattern of the metadata not used: expected a JSON object, "
                f"got {str(patterns)[:80]!r}"
            )
        for name in _ALPHAS:
            value = settings.get(f"{prefix}{name}")
            if value is None:
                continue
            alpha = _number(value)
            if alpha is None:
                self._note(
                    f"{prefix}{name} of the metadata not used: expected a number, got {str(value)[:80]!r}"
                )
            elif alpha != 0.0 or not name.endswith("network_alpha"):  # kohya: 0 means the rank
                self._count(source, f"{prefix}{name} {alpha:g}")
                return alpha
        return None

    def _by_pattern(self, source: str, prefix: str, alphas: Mapping[str, object], layer: str) -> float | None:
        patterns = self._patterns.get((source, prefix))
        if patterns is None:
            patterns = self._patterns[source, prefix] = _Patterns(alphas)
        start = time.monotonic()
        alpha = patterns.alpha_of(_name_in_part(layer), self._seconds_left)
        self._seconds_left = max(0.0, self._seconds_left - (time.monotonic() - start))
        if alpha is not None:
            self._count(source, f"{prefix}alpha_pattern")
        return alpha

    def _is_true(self, settings: _Settings, prefix: str, name: str) -> bool:
        return settings.get(f"{prefix}{name}") in (True, "True")

    def _count(self, source: str, name: str) -> None:
        name = f"{source}: {name}" if source else name
        self._used[name] = self._used.get(name, 0) + 1

    def _note(self, notice: str) -> None:
        self._notices.setdefault(" ".join(notice.split()))

    def _parsed(self, name: str, text: str) -> _Settings:
        """Settings in JSON, those of a part also as an object of their own: {"transformer": {...}}."""
        settings = _value(text)
        if not isinstance(settings, dict):
            self._note(f"{name} of the metadata not used: expected a JSON object, got {text[:80]!r}")
            return {}
        flat: dict[str, object] = dict(settings)
        for part in (part for parts in _PARTS.values() for part in parts):
            inner = settings.get(part)
            if isinstance(inner, dict):
                flat |= {f"{part}.{key}": value for key, value in inner.items()}
        return flat


class _Patterns:
    """alphas by the end of a layer's name: plain names are looked up, expressions tried in their order."""

    def __init__(self, alphas: Mapping[str, object]) -> None:
        self.notices: list[str] = []
        self._plain: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, str, Any, float]] = []
        for order, (key, value) in enumerate(alphas.items()):
            alpha = _number(value)
            if alpha is None:
                self._refuse(key, f"expected a number, got {str(value)[:80]!r}")
            elif re.fullmatch(r"[\w.]+", plain := key.replace(r"\.", ".")):
                self._plain.setdefault(plain, (order, alpha))
            elif len(self._expressions) < MAX_EXPRESSIONS:
                self._compile(order, key, alpha)
            else:
                self._refuse(key, f"only {MAX_EXPRESSIONS} regular expressions are")

    def alpha_of(self, name: str, seconds: float) -> float | None:
        """The alpha of the first key that matches the end of a name, or None."""
        pieces = name.split(".")
        ends = (".".join(pieces[i:]) for i in range(len(pieces)))
        deadline = time.monotonic() + seconds
        found = min((self._plain[end] for end in ends if end in self._plain), default=(math.inf, None))
        for entry in list(self._expressions):
            order, key, expression, alpha = entry
            if order > found[0]:
                break
            try:
                left = deadline - time.monotonic()
                if left <= 0.0:
                    raise TimeoutError
                if expression.match(name, timeout=min(left, MATCH_SECONDS)):
                    return alpha
            except (TimeoutError, RecursionError, MemoryError):
                self._expressions.remove(entry)
                self._refuse(key, "it takes too long to match")
        return found[1]

    def _compile(self, order: int, key: str, alpha: float) -> None:
        counts = re.findall(r"\{(\d*),?(\d*)\}", key)
        copies = math.prod(int(number or 1) for count in counts for number in count)
        if len(key) > MAX_PATTERN_LENGTH or copies > MAX_COPIES or len(counts) != key.count("{"):
            self._refuse(key, f"it is longer than {MAX_PATTERN_LENGTH} characters or repeats too much")
            return
        try:
            re.compile(key)  # regex has more syntax than PEFT's re
            expression = regex.compile(rf"(?:.*\.)?(?:{key})$")
        except (regex.error, re.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
            self._refuse(key, f"it is no regular expression ({str(error)[:80]})")
            return
        self._expressions.append((order, key, expression, alpha))

    def _refuse(self, key: str, why: str) -> None:
        notice = f"alpha_pattern {key[:80]!r} of the metadata not used: {why}"
        self.notices.append(" ".join(notice.split()))


def _name_in_part(layer: str) -> str:
    """A layer's name as PEFT knows it, without what files put before it."""
    for pattern, _ in TEXT_PREFIXES:
        if match := pattern.match(layer):
            return layer[match.end() :]
    return PREFIX.sub("", layer, count=1) if PREFIX.match(layer) else layer


def _value(text: str) -> object:
    """A setting that is written as text: parsed as JSON where it can be."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None if text.strip() in ("", "None") else text


def _number(value: object) -> float | None:
    """A setting as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and abs(number) < 1e30 else None
