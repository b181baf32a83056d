"""The widgets that a subgraph's node shows (promoted widgets): which widgets they are, and their values.

They are the inputs of the subgraph's definition that lead to a widget, in the definition's order, whatever
the node itself lists. Their values are the node's `widgets_values`; without one the value inside applies.
Files of 2025 list widgets in `properties.proxyWidgets` as [inner node id, widget name], values in that order;
the editor converts those when it loads a file, which this repeats. Source: comfyui-frontend-package 1.58,
observed from outside.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .json_reader import JsonError, read_json
from .saved_graph import Use

Target = tuple[str, str]
"""(inner node id, widget name)"""
INSIDE = object()
"""Stands for a value that the subgraph's node does not have: that of the widget inside applies."""
_OLD_PREFIX = re.compile(r"^\s*\d+\s*:\s*(.+)$", re.DOTALL)


@dataclass
class Shown:
    """A widget on a subgraph's node."""

    target: Target
    value: Any = INSIDE
    index: int | None = None
    """Its position in `widgets_values`; None if it has only `entries`."""
    entries: list[tuple[Any, Any]] = field(default_factory=list)
    """(list or object, key) of further places in the file that hold its value."""


@dataclass(frozen=True)
class ShownWidgets:
    """All widgets on a subgraph's node."""

    by_name: dict[str, Shown]
    """{name of the definition's input: widget}"""
    by_node: dict[str, dict[str, Shown]]
    """{inner node id: {widget name: widget}} of those in `proxyWidgets` that no input leads to"""


def store_shown(use: Use, name: str, shown: Shown, value: Any, current: list[Any]) -> None:
    """Write a widget's value into the saved graph, everywhere the editor reads it.

    `current`: the values of the node's widgets in their order, for those that it does not store yet.
    """
    if shown.index is not None:
        if not isinstance(use.node.get("widgets_values"), list):
            use.node["widgets_values"] = []
        values = use.node["widgets_values"]
        values.extend(current[len(values) : shown.index + 1])
        values[shown.index] = value
    for container, key in shown.entries:
        container[key] = value
    if isinstance(named := use.node.get("widgets_values_named"), dict):
        named[name] = value


def shown_widgets(
    use: Use, targets: list[tuple[str, Target]], is_widget: Callable[[Target], bool]
) -> ShownWidgets:
    """The widgets of one subgraph node.

    `targets`: (name of a definition's input, the widget that it leads to), in the definition's order;
    `is_widget(target)`: whether the subgraph has this widget.
    """
    by_name: dict[str, Shown] = {}
    by_target: dict[Target, Shown] = {}
    values = use.node.get("widgets_values")
    values = values if isinstance(values, list) else []
    for index, (name, target) in enumerate(targets):
        by_name[name] = Shown(target, values[index] if index < len(values) else INSIDE, index)
        by_target.setdefault(target, by_name[name])
    properties = use.node.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    for entry in reversed(_quarantined(properties.get("proxyWidgetErrorQuarantine"))):
        node_id, name = entry["originalEntry"][:2]
        if node_id == "-1" and name in by_name:
            by_name[name].value = entry["hostValue"]
            by_name[name].entries.append((entry, "hostValue"))
    by_node: dict[str, dict[str, Shown]] = {}
    for index, (node_id, name) in enumerate(_listed(properties.get("proxyWidgets"))):
        if node_id == "-1":
            found = by_name.get(name)
        else:
            name = _current_name(node_id, name, is_widget)
            found = by_target.get((node_id, name))
            if found is None and is_widget((node_id, name)):
                found = by_target[(node_id, name)] = Shown((node_id, name))
                by_node.setdefault(node_id, {})[name] = found
        if found is not None and index < len(values):
            found.value = values[index]
            found.entries.append((values, index))
    return ShownWidgets(by_name, by_node)


def _quarantined(entries: Any) -> list[dict[str, Any]]:
    """Values that the editor put aside while it converted an older file."""
    return [
        entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
        and isinstance(entry.get("originalEntry"), list)
        and len(entry["originalEntry"]) in (2, 3)
        and all(isinstance(part, str) for part in entry["originalEntry"])
        and "hostValue" in entry
    ]


def _listed(entries: Any) -> list[Target]:
    """The entries of `proxyWidgets`; none if one of them is malformed, as in the editor."""
    if isinstance(entries, str):
        try:
            entries = read_json(entries)
        except JsonError:
            return []
    entries = entries if isinstance(entries, list) else []
    valid = all(
        isinstance(entry, list) and len(entry) in (2, 3) and all(isinstance(part, str) for part in entry)
        for entry in entries
    )
    return [(entry[0], entry[1]) for entry in entries] if valid else []


def _current_name(node_id: str, name: str, is_widget: Callable[[Target], bool]) -> str:
    """A widget's name without the ids of deeper levels that older files put before it ("4: prompt")."""
    while not is_widget((node_id, name)) and (found := _OLD_PREFIX.match(name)):
        name = found[1]
    return name
