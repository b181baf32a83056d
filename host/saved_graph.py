"""A saved graph as the editor stores it: nodes, links, the levels inside subgraphs, and widget values.

Widget values are stored by position; `object_info` of the node classes gives their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .json_reader import one_line

NOTES = ("Note", "MarkdownNote")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
GROUP_PREFIXES = ("workflow>", "workflow/")
"""Starts of the types of group nodes, which the file itself defines."""
MUTED, BYPASSED = 2, 4
SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS = "-10", "-20"  # node ids of a subgraph's boundary in its links
CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
MAX_SLOTS = 250  # inputs of a node

Info = dict[str, dict[str, Any]]
Node = dict[str, Any]


class WorkflowError(ValueError):
    """A workflow file cannot be used; the message is one sentence for the user, on one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, 2000))


@dataclass(frozen=True)
class Link:
    """A link of the saved graph, from an output slot to an input slot."""

    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass(frozen=True)
class Scope:
    """One level of a graph: the graph itself, or one instance of a subgraph (`prefix` "5:" for node 5)."""

    prefix: str
    nodes: dict[str, Node]
    links: dict[Any, Link]
    use: Use | None = None


@dataclass(frozen=True)
class Use:
    """An instance of a subgraph: its node, the level that node is on, and the subgraph's definition."""

    scope: Scope
    node: Node
    definition: dict[str, Any]

    @property
    def id(self) -> str:
        """The node's id in the prompt, "5" or "5:3"."""
        return f"{self.scope.prefix}{self.node['id']}"


@dataclass(frozen=True)
class Source:
    """Where an input gets its value: a node's output (`wire`, as in a prompt) or a stored value.

    `store` writes another value into the saved graph.
    """

    wire: list[Any] | None = None
    value: Any = None
    store: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class FlatNode:
    """A node that runs: its id in the prompt, its saved form, its level and its class description."""

    id: str
    node: Node
    scope: Scope
    info: dict[str, Any]


@contextmanager
def parse_errors(where: str = "the workflow") -> Iterator[None]:
    """Context manager that raises WorkflowError for errors from a malformed document."""
    try:
        yield
    except WorkflowError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise WorkflowError(
            f"{where} is damaged: it has a malformed node or link; save it again in the editor"
        ) from error


def read_nodes(graph: dict[str, Any], where: str) -> tuple[dict[str, Node], dict[Any, Link]]:
    """The nodes and links of one level, by id. Raises WorkflowError for malformed ones."""
    with parse_errors(where):
        for node in graph["nodes"]:
            if max(len(node.get("inputs") or []), len(node.get("outputs") or [])) > MAX_SLOTS:
                name = one_line(str(node["id"]), 80)
                raise WorkflowError(f"node {name} has more than {MAX_SLOTS} inputs or outputs; remove some")
        nodes = {str(node["id"]): node for node in graph["nodes"] if node["type"] is not None}
        links = dict(_read_link(link) for link in graph.get("links") or [])
    return nodes, links


def _read_link(link: Any) -> tuple[Any, Link]:
    if isinstance(link, dict):
        ends = (link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"])
        link_id = link["id"]
    else:
        link_id, *ends = link[:5]
    return link_id, Link(str(ends[0]), int(ends[1]), str(ends[2]), int(ends[3]))


def widget_specs(info: dict[str, Any]) -> dict[str, list[Any]]:
    """{widget name: [type, options]} of a node class in the editor's order (required before optional)."""
    specs: dict[str, list[Any]] = {}
    for part in ("required", "optional"):
        for name, spec in info["input"].get(part, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if (isinstance(kind, (list, tuple)) or kind in WIDGET_TYPES) and not options.get("forceInput"):
                specs[name] = [kind, options]
    return specs


def widget_positions(info: dict[str, Any], values: list[Any]) -> dict[str, int]:
    """{widget name: index into `widgets_values`}, skipping the values that the editor adds after seeds.

    A seed is followed by its control_after_generate value, a combo with that control also by a filter. Old
    files may lack them, so a value is skipped only if it is one of CONTROL_VALUES.
    """
    positions: dict[str, int] = {}
    index = 0
    for name, (kind, options) in widget_specs(info).items():
        positions[name] = index
        index += 1
        controlled = options.get("control_after_generate") or (
            kind == "INT" and name in ("seed", "noise_seed")
        )
        if controlled and index < len(values) and values[index] in CONTROL_VALUES:
            index += 2 if kind == "COMBO" or isinstance(kind, (list, tuple)) else 1
    return positions


def saved_values(node: Node, info: dict[str, Any]) -> dict[str, Any]:
    """{widget name: saved value} of a node; the default where the file is older, and for null in a combo."""
    values = node.get("widgets_values")
    values = [] if values is None else values
    by_name = isinstance(values, dict)
    positions = {} if by_name else widget_positions(info, values)
    found = {}
    for name, (kind, options) in widget_specs(info).items():
        is_combo = kind == "COMBO" or isinstance(kind, (list, tuple))
        if by_name:
            is_saved, value = name in values, values.get(name)
        else:
            is_saved = positions[name] < len(values)
            value = values[positions[name]] if is_saved else None
        if is_saved and not (value is None and is_combo):
            found[name] = value
        else:
            choices = kind if isinstance(kind, (list, tuple)) else options.get("options")
            found[name] = options.get("default", choices[0] if choices else None)
    return found


def store_value(node: Node, info: dict[str, Any], widget: str, value: Any) -> None:
    """Write a widget's value into a saved node, where the editor reads it."""
    if isinstance(node.get("widgets_values_named"), dict):
        node["widgets_values_named"][widget] = value
    if isinstance(node.get("widgets_values"), dict):
        node["widgets_values"][widget] = value
        return
    before = saved_values(node, info)
    if node.get("widgets_values") is None:
        node["widgets_values"] = []
    values = node["widgets_values"]
    positions = widget_positions(info, values)
    for earlier, index in positions.items():
        if len(values) <= min(index, positions[widget]):  # the file is older than these widgets
            values.append(before[earlier])
    values[positions[widget]] = value
