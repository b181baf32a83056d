"""The editor's saved graph read as a prompt {node id: {class_type, inputs}}: what pressing Run does there.

A saved graph keeps widget values by position, without names; those come from the node classes (`object_info`,
the table that the editor itself reads). Source of the rules: the frontend's `graphToPrompt`
(comfyui-frontend-package 1.58), observed from outside. Muted nodes fall away, bypassed ones hand their input
through, Reroute and PrimitiveNode are followed to where they lead, notes are ignored, subgraphs are flattened
to ids like `5:3`. Not covered: the group nodes of before subgraphs, and values that a pack's own JavaScript
makes up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

NOTES = ("Note", "MarkdownNote")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
MUTED, BYPASSED = 2, 4
SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS = "-10", "-20"  # the two ends of a subgraph, as node ids in its links
CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

Info = dict[str, dict[str, Any]]
Node = dict[str, Any]


class WorkflowError(ValueError):
    """One sentence on what is wrong with a workflow file and what to do about it."""


@dataclass(frozen=True)
class Link:
    """A wire of the saved graph: from an output slot to an input slot, by node id."""

    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass(frozen=True)
class Scope:
    """One level of a graph: the graph itself, or one use of a subgraph (`prefix` "5:" for the node 5)."""

    prefix: str
    nodes: dict[str, Node]
    links: dict[Any, Link]
    use: Use | None = None


@dataclass(frozen=True)
class Use:
    """What a subgraph's level knows of outside: the node that stands for it, where, and the definition."""

    scope: Scope
    node: Node
    definition: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where an input gets its value: a node's output (`wire`, as in a prompt) or a widget elsewhere.

    `holder` and `index` name the list that keeps a widget's value: the node's `widgets_values[index]`.
    """

    wire: list[Any] | None = None
    value: Any = None
    holder: Node | None = None
    index: int = 0


@dataclass(frozen=True)
class Placed:
    """A node that runs: its id in the prompt, its saved form, the level it stands on and its class."""

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
    """{widget name: index into `widgets_values`}, stepping over what the editor adds after seeds.

    A seed carries a second value, how it changes after a run; a combo with that control a filter as well. Old
    files may lack them, so a value is stepped over only if it can be one.
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


def widget_value(placed: Placed, name: str) -> Any:
    """The saved value of a widget; its default where the file is older than the widget."""
    values = placed.node.get("widgets_values") or []
    kind, options = widget_specs(placed.info)[name]
    if isinstance(values, dict):
        found = values.get(name)
    else:
        index = widget_positions(placed.info, values)[name]
        found = values[index] if index < len(values) else None
    if found is not None:
        return found
    choices = kind if isinstance(kind, (list, tuple)) else options.get("options")
    return options.get("default", choices[0] if choices else None)


@contextmanager
def reading(where: str = "the workflow") -> Iterator[None]:
    """A block that walks a document; WorkflowError where it has not the form that the editor writes."""
    try:
        yield
    except WorkflowError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise WorkflowError(
            f"{where} is damaged: a node or link in it has no readable form; save it again in the editor"
        ) from error


def read_scope(graph: dict[str, Any], where: str = "the workflow") -> Scope:
    """The top level of a saved graph. Raises WorkflowError when its nodes or links have no readable form."""
    with reading(where):
        nodes = {str(node["id"]): node for node in graph["nodes"] if node["type"] is not None}
        links = dict(_read_link(link) for link in graph.get("links") or [])
    return Scope("", nodes, links)


def _read_link(link: Any) -> tuple[Any, Link]:
    if isinstance(link, dict):
        ends = (link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"])
        number = link["id"]
    else:
        number, *ends = link[:5]
    return number, Link(str(ends[0]), int(ends[1]), str(ends[2]), int(ends[3]))


def promoted(use: Use) -> Iterator[tuple[str, str, Source]]:
    """(inner node id, widget name, value) for the widgets that a subgraph's node shows and keeps itself.

    The id is "-1" where the name is that of a subgraph input, which leads to the widget. Files of 2025 list
    the widgets in `properties.proxyWidgets`; later ones mark the inputs of the subgraph's node.
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
    """A saved graph together with the node classes that give its values their names."""

    def __init__(self, document: dict[str, Any], info: Info) -> None:
        self.info = info
        subgraphs = (document.get("definitions") or {}).get("subgraphs") or []
        self.definitions = {str(definition["id"]): definition for definition in subgraphs}
        self.top = read_scope(document)

    def placed(self) -> list[Placed]:
        """Every node that runs, subgraphs flattened. Raises WorkflowError naming the unknown types."""
        unknown: dict[str, str] = {}
        found = list(self._walk(self.top, unknown, ()))
        if unknown:
            named = ", ".join(f"node {number} ({kind})" for number, kind in unknown.items())
            raise WorkflowError(
                f"the workflow uses nodes that are not installed here: {named}; remove or mute them"
            )
        return found

    def _walk(self, scope: Scope, unknown: dict[str, str], inside: tuple[str, ...]) -> Iterator[Placed]:
        for number, node in scope.nodes.items():
            kind = str(node["type"])
            if kind in (*NOTES, REROUTE, PRIMITIVE) or node.get("mode", 0) in (MUTED, BYPASSED):
                continue
            if kind in self.definitions:
                if kind in inside:
                    raise WorkflowError(f"the subgraph of node {scope.prefix}{number} contains itself")
                yield from self._walk(self.enter(scope, node), unknown, (*inside, kind))
            elif kind in self.info:
                yield Placed(scope.prefix + number, node, scope, self.info[kind])
            else:
                unknown[scope.prefix + number] = kind

    def enter(self, scope: Scope, node: Node) -> Scope:
        """The level inside a subgraph node."""
        definition = self.definitions[str(node["type"])]
        inner = read_scope(definition, f"the subgraph of node {scope.prefix}{node['id']}")
        prefix = f"{scope.prefix}{node['id']}:"
        return Scope(prefix, inner.nodes, inner.links, Use(scope, node, definition))

    def source(self, scope: Scope, node: Node, slot: dict[str, Any], depth: int = 0) -> Source | None:
        """What feeds an input slot, None when nothing does (any more). Raises WorkflowError."""
        number = slot.get("link")
        if number is None:
            return None
        where = f"input {slot.get('name')} of node {scope.prefix}{node['id']} ({node['type']})"
        link = scope.links.get(number)
        if link is None:
            raise WorkflowError(f"{where} names the link {number}, which does not exist; connect it again")
        if depth > 200:
            raise WorkflowError(f"{where} is fed in a circle; disconnect one of its reroutes")
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
        """What a subgraph takes from the node that stands for it: a wire there, or a value kept there."""
        names = [slot.get("name") for slot in use.definition.get("inputs") or []]
        name = names[link.origin_slot] if link.origin_slot < len(names) else None
        for slot in use.node.get("inputs") or []:
            if slot.get("name") == name and slot.get("link") is not None:
                return self.source(use.scope, use.node, slot, depth + 1)
        return next(
            (source for inner, named, source in promoted(use) if (inner, named) == ("-1", name)), None
        )

    def _from_output(self, scope: Scope, node: Node, output: int, kind: Any, depth: int) -> Source | None:
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

    def sources(self, placed: Placed) -> dict[str, Source]:
        """{input name: what feeds it} for the connected inputs of a node that runs."""
        found = {}
        if placed.scope.use is not None:
            own = str(placed.node["id"])
            found = {name: source for inner, name, source in promoted(placed.scope.use) if inner == own}
        for slot in placed.node.get("inputs") or []:
            source = self.source(placed.scope, placed.node, slot)
            if source is not None:
                name = (slot.get("widget") or {}).get("name") or slot.get("name")
                found[str(name)] = source
        return found

    def prompt(self) -> dict[str, dict[str, Any]]:
        """The prompt of this graph. Raises WorkflowError."""
        nodes = self.placed()
        running = {placed.id for placed in nodes}
        prompt = {}
        for placed in nodes:
            inputs = {name: widget_value(placed, name) for name in widget_specs(placed.info)}
            for name, source in self.sources(placed).items():
                if source.wire is None:
                    inputs[name] = source.value
                elif source.wire[0] in running:
                    inputs[name] = list(source.wire)
            title = placed.node.get("title") or placed.info.get("display_name") or placed.node["type"]
            prompt[placed.id] = {
                "class_type": placed.node["type"],
                "inputs": inputs,
                "_meta": {"title": title},
            }
        return prompt
