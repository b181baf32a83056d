"""Replaces placeholders in file name prefixes, as the editor does before it sends a prompt.

`%date:FORMAT%`: the date or time, with d, M, h, m, s (doubled: two digits), yy, yyyy. `%A.b%`: the value of
widget b of the first node whose "Node name for S&R" is A, else whose title is A; characters that file names
cannot have become `_`. Anything else stays, so that %width% and %height% reach the node.
Source: comfyui-frontend-package 1.58, observed from outside.
"""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from .saved_graph import NOTES, PRIMITIVE, Node, Scope

if TYPE_CHECKING:
    from .graph import Graph

SEARCH_NAME = "Node name for S&R"
NAMELESS = (*NOTES, PRIMITIVE, "Reroute", "SaveImage")
"""Nodes that have a "Node name for S&R" only if the file gives one; others have their type."""
_PLACEHOLDER = re.compile(r"%([^%]+)%")
_DATE_PART = re.compile("dd?|MM?|hh?|mm?|ss?|yyy?y?")
_FORBIDDEN = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')


class Placeholders:
    """The names of a graph's nodes, and the values of their widgets."""

    def __init__(self, graph: Graph, now: datetime | None = None) -> None:
        self.graph = graph
        self.now = now or datetime.now()
        self._by_name: dict[str, tuple[Scope, Node]] | None = None
        self._by_title: dict[str, tuple[Scope, Node]] = {}

    def expand(self, text: str) -> str:
        """The text with its placeholders replaced, once and from left to right."""
        return _PLACEHOLDER.sub(self._replacement, text)

    def _replacement(self, placeholder: re.Match[str]) -> str:
        """What stands for `%name%`: itself if nothing has that name."""
        parts = placeholder[1].split(".")
        if len(parts) != 2:
            is_date = parts[0].startswith("date:")
            return format_date(parts[0].removeprefix("date:"), self.now) if is_date else placeholder[0]
        if self._by_name is None:
            self._by_name = {}
            self._collect(self.graph.top, set())
        found = self._by_name.get(parts[0]) or self._by_title.get(parts[0])
        values = self._values(*found) if found else {}
        if parts[1] not in values:
            return placeholder[0]
        return _FORBIDDEN.sub("_", as_text(values[parts[1]]))

    def _collect(self, scope: Scope, entered: set[str]) -> None:
        """Add the nodes of a level; those inside a subgraph come before its node."""
        for node in scope.nodes.values():
            kind = str(node["type"])
            if kind in self.graph.definitions and kind not in entered:
                entered.add(kind)
                self._collect(self.graph.enter(scope, node), entered)
            properties = node.get("properties")
            name = properties.get(SEARCH_NAME) if isinstance(properties, dict) else None
            if name is None and kind in self.graph.info and kind not in NAMELESS:
                name = kind
            described = self.graph.info.get(kind) or self.graph.definitions.get(kind) or {}
            title = node.get("title") or described.get("display_name") or described.get("name") or kind
            if self._by_name is not None and isinstance(name, str):
                self._by_name.setdefault(name, (scope, node))
            self._by_title.setdefault(str(title), (scope, node))

    def _values(self, scope: Scope, node: Node) -> dict[str, Any]:
        kind = str(node["type"])
        saved = node.get("widgets_values")
        if kind in (*NOTES, PRIMITIVE):
            return (
                {"value" if kind == PRIMITIVE else "text": saved[0]}
                if isinstance(saved, list) and saved
                else {}
            )
        return {name: source.value for name, source in self.graph.own_values(scope, node).items()}


def format_date(pattern: str, now: datetime) -> str:
    """A date in the editor's notation: yyyy-MM-dd, h:mm."""
    numbers = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}

    def part(found: re.Match[str]) -> str:
        text = found[0]
        if text in ("yy", "yyyy"):
            return str(now.year)[-len(text) :]
        return str(numbers[text[0]]).rjust(len(text), "0") if text[0] in numbers else text

    return _DATE_PART.sub(part, pattern)


def as_text(value: Any) -> str:
    """A JSON value as JavaScript writes it: null is empty, 1.0 is 1, true, 1e-7."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e21:
            return str(int(value))
        if 1e-6 <= abs(value) < 1e-4:  # Python writes these with an exponent
            return format(Decimal(repr(value)), "f")
        return re.sub(r"e([+-])0", r"e\1", repr(value))
    if isinstance(value, list):
        return ",".join(map(as_text, value))
    return "[object Object]" if isinstance(value, dict) else str(value)
