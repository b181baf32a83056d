"""Converts the editor's saved graph to a prompt {node id: {class_type, inputs}}, as its Run button does.

A saved graph stores widget values by position; their names come from the node classes (`object_info`, which
the editor reads as well). Source of the rules: `graphToPrompt` of comfyui-frontend-package 1.58, observed
from outside. Muted nodes are dropped, bypassed ones pass their input through, Reroute and
PrimitiveNode are followed to their source, notes are ignored, subgraphs are flattened to ids such as `5:3`.
Not supported: group nodes (the predecessor of subgraphs) and values computed by a pack's JavaScript.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

NOTES = ("Note", "MarkdownNote")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
MUTED, BYPASSED = 2, 4
SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS = "-10", "-20"  # node ids of a subgraph's boundary in its links
CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
MAX_DEPTH = 200  # reroutes, bypassed nodes and subgraph levels in one chain
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

Info = dict[str, dict[str, Any]]
Node = dict[str, Any]


class WorkflowError(ValueError):
    """A workflow file cannot be used; the message is one sentence for the user."""


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


@dataclass(frozen=True)
class Source:
    """Where an input gets its value: a node's output (`wire`, as in a prompt) or another node's widget.

    A widget's value is stored in `holder["widgets_values"][index]`.
    """

    wire: list[Any] | None = None
    value: Any = None
    holder: Node | None = None
    index: int = 0


@dataclass(frozen=True)
class FlatNode:
    """A node that runs: its id in the prompt, its saved form, its level and its class description."""

    id: str
    node: Node
    scope: Scope
    info: dict[str, Any]


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


def widget_value(flat_node: FlatNode, name: str) -> Any:
    """The saved value of a widget; its default if the file is older than the widget."""
    values = flat_node.node.get("widgets_values") or []
    kind, options = widget_specs(flat_node.info)[name]
    if isinstance(values, dict):
        found = values.get(name)
    else:
        index = widget_positions(flat_node.info, values)[name]
        found = values[index] if index < len(values) else None
    if found is not None:
        return found
    choices = kind if isinstance(kind, (list, tuple)) else options.get("options")
    return options.get("default", choices[0] if choices else None)


@contextmanager
def parse_errors(where: str = "the workflow") -> Iterator[None]:
    """Context manager that raises WorkflowError for errors from a malformed document."""
    try:
        yield
    except WorkflowError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise WorkflowError(
            f"{where} is damaged: it has a malformed node or link; save it again in the editor"
        ) from error


def read_scope(graph: dict[str, Any], where: str = "the workflow") -> Scope:
    """The top level of a saved graph. Raises WorkflowError for malformed nodes or links."""
    with parse_errors(where):
        nodes = {str(node["id"]): node for node in graph["nodes"] if node["type"] is not None}
        links = dict(_read_link(link) for link in graph.get("links") or [])
    return Scope("", nodes, links)


def _read_link(link: Any) -> tuple[Any, Link]:
    if isinstance(link, dict):
        ends = (link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"])
        link_id = link["id"]
    else:
        link_id, *ends = link[:5]
    return link_id, Link(str(ends[0]), int(ends[1]), str(ends[2]), int(ends[3]))


def promoted(use: Use) -> Iterator[tuple[str, str, Source]]:
    """(inner node id, widget name, value) of the widgets that a subgraph's node shows and stores itself.

    The id is "-1" if the name is that of a subgraph input connected to the widget. Files of 2025 list the
    widgets in `properties.proxyWidgets`; later ones mark the inputs of the subgraph's node.
    """
    listed = (use.node.get("properties") or {}).get("proxyWidgets")
    if listed:
        owners = [(str(entry[0]), str(entry[1])) for entry in listed]
    else:
        owners = [
            ("-1", str(slot.get("name"))) for slot in use.node.get("inputs") or [] if slot.get("widget")
        ]
    values = use.node.get("widgets_values")
    for index, value in enumerate(values[: len(owners)] if isinstance(values, list) else ()):
        if value is not None:
            yield *owners[index], Source(value=value, holder=use.node, index=index)


class Graph:
    """A saved graph with the node classes that name its widget values."""

    def __init__(self, document: dict[str, Any], info: Info) -> None:
        self.info = info
        subgraphs = (document.get("definitions") or {}).get("subgraphs") or []
        self.definitions = {str(definition["id"]): definition for definition in subgraphs}
        self.top = read_scope(document)

    def flat_nodes(self) -> list[FlatNode]:
        """Every node that runs, subgraphs flattened. Raises WorkflowError listing unknown types."""
        unknown: dict[str, str] = {}
        found = list(self._walk(self.top, unknown, ()))
        if unknown:
            named = ", ".join(f"node {node_id} ({kind})" for node_id, kind in unknown.items())
            raise WorkflowError(
                f"the workflow uses nodes that are not installed here: {named}; remove or mute them"
            )
        return found

    def _walk(self, scope: Scope, unknown: dict[str, str], inside: tuple[str, ...]) -> Iterator[FlatNode]:
        for node_id, node in scope.nodes.items():
            kind = str(node["type"])
            if kind in (*NOTES, REROUTE, PRIMITIVE) or node.get("mode", 0) in (MUTED, BYPASSED):
                continue
            if kind in self.definitions:
                if kind in inside:
                    raise WorkflowError(f"the subgraph of node {scope.prefix}{node_id} contains itself")
                yield from self._walk(self.enter(scope, node), unknown, (*inside, kind))
            elif kind in self.info:
                yield FlatNode(scope.prefix + node_id, node, scope, self.info[kind])
            else:
                unknown[scope.prefix + node_id] = kind

    def enter(self, scope: Scope, node: Node) -> Scope:
        """The level inside a subgraph node."""
        definition = self.definitions[str(node["type"])]
        inner = read_scope(definition, f"the subgraph of node {scope.prefix}{node['id']}")
        prefix = f"{scope.prefix}{node['id']}:"
        return Scope(prefix, inner.nodes, inner.links, Use(scope, node, definition))

    def source(self, scope: Scope, node: Node, slot: dict[str, Any], depth: int = 0) -> Source | None:
        """The source of an input slot, None if it has none. Raises WorkflowError."""
        link_id = slot.get("link")
        if link_id is None:
            return None
        where = f"input {slot.get('name')} of node {scope.prefix}{node['id']} ({node['type']})"
        link = scope.links.get(link_id)
        if link is None:
            raise WorkflowError(f"{where} refers to link {link_id}, which does not exist; connect it again")
        if depth > MAX_DEPTH:
            raise WorkflowError(f"{where} depends on itself; disconnect one of its reroutes")
        if link.origin == SUBGRAPH_INPUTS and scope.use is not None:
            return self._from_outside(scope.use, link, depth)
        origin = scope.nodes.get(link.origin)
        if origin is None:
            missing = scope.prefix + link.origin
            raise WorkflowError(
                f"{where} is linked to node {missing}, which does not exist; connect it again"
            )
        return self._from_output(scope, origin, link.origin_slot, slot.get("type"), depth)

    def _from_outside(self, use: Use, link: Link, depth: int) -> Source | None:
        """The source of a subgraph's input: a link to its node, or a value stored there."""
        names = [slot.get("name") for slot in use.definition.get("inputs") or []]
        name = names[link.origin_slot] if link.origin_slot < len(names) else None
        for slot in use.node.get("inputs") or []:
            if slot.get("name") == name and slot.get("link") is not None:
                return self.source(use.scope, use.node, slot, depth + 1)
        return next(
            (source for inner, named, source in promoted(use) if (inner, named) == ("-1", name)), None
        )

    def _from_output(self, scope: Scope, node: Node, output: int, kind: Any, depth: int) -> Source | None:
        """The source behind a node's output: the node itself, or what it passes through."""
        slots = node.get("inputs") or []
        mode = node.get("mode", 0)
        if mode == MUTED:
            return None
        if mode == BYPASSED:
            same = [slot for slot in slots[output : output + 1] + slots if slot.get("type") in (kind, "*")]
            return self.source(scope, node, same[0], depth + 1) if same else None
        if node["type"] == REROUTE:
            return self.source(scope, node, slots[0], depth + 1) if slots else None
        if node["type"] == PRIMITIVE:
            values = node.get("widgets_values") or []
            return Source(value=values[0], holder=node) if values else None
        if str(node["type"]) in self.definitions:
            inner = self.enter(scope, node)
            for link in inner.links.values():
                if link.target == SUBGRAPH_OUTPUTS and link.target_slot == output:
                    if link.origin == SUBGRAPH_INPUTS:
                        return self._from_outside(
                            Use(scope, node, self.definitions[node["type"]]), link, depth + 1
                        )
                    if link.origin in inner.nodes:
                        origin = inner.nodes[link.origin]
                        return self._from_output(inner, origin, link.origin_slot, kind, depth + 1)
            return None
        return Source(wire=[scope.prefix + str(node["id"]), output])

    def sources(self, flat_node: FlatNode) -> dict[str, Source]:
        """{input name: source} of the connected inputs of a node."""
        found = {}
        if flat_node.scope.use is not None:
            own = str(flat_node.node["id"])
            found = {name: source for inner, name, source in promoted(flat_node.scope.use) if inner == own}
        for slot in flat_node.node.get("inputs") or []:
            source = self.source(flat_node.scope, flat_node.node, slot)
            if source is not None:
                name = (slot.get("widget") or {}).get("name") or slot.get("name")
                found[str(name)] = source
        return found

    def prompt(self) -> dict[str, dict[str, Any]]:
        """The prompt of this graph. Raises WorkflowError."""
        nodes = self.flat_nodes()
        running = {flat_node.id for flat_node in nodes}
        prompt = {}
        for flat_node in nodes:
            inputs = {name: widget_value(flat_node, name) for name in widget_specs(flat_node.info)}
            for name, source in self.sources(flat_node).items():
                if source.wire is None:
                    inputs[name] = source.value
                elif source.wire[0] in running:
                    inputs[name] = list(source.wire)
            title = (
                flat_node.node.get("title") or flat_node.info.get("display_name") or flat_node.node["type"]
            )
            prompt[flat_node.id] = {
                "class_type": flat_node.node["type"],
                "inputs": inputs,
                "_meta": {"title": title},
            }
        return prompt
