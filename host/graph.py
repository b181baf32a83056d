"""Converts the editor's saved graph to a prompt {node id: {class_type, inputs}}, as its Run button does.

Source of the rules: `graphToPrompt` of comfyui-frontend-package 1.58, observed from outside. Muted nodes are
dropped, bypassed ones pass an input through, Reroute is followed to its source, a PrimitiveNode sets the
widgets that it is wired to, notes are ignored, subgraphs are flattened to ids such as `5:3`. saved_graph.py
reads nodes and widget values, promoted.py the widgets that a subgraph's node shows, placeholders.py replaces
texts. Not supported: group nodes (the predecessor of subgraphs) and values computed by a pack's JavaScript.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from .json_reader import one_line
from .placeholders import Placeholders
from .promoted import INSIDE, Shown, ShownWidgets, Target, shown_widgets, store_shown
from .saved_graph import (
    BYPASSED,
    GROUP_PREFIXES,
    MUTED,
    NOTES,
    PRIMITIVE,
    REROUTE,
    SUBGRAPH_INPUTS,
    SUBGRAPH_OUTPUTS,
    FlatNode,
    Info,
    Link,
    Node,
    Scope,
    Source,
    Use,
    WorkflowError,
    read_nodes,
    saved_values,
    widget_specs,
)

MAX_DEPTH = 100  # reroutes, bypassed nodes and subgraph levels in one chain
MAX_LEVELS = 50  # subgraphs inside one another
MAX_PLACED = 50_000  # nodes and their inputs, counted in every use of a subgraph
MAX_LISTED = 20  # nodes listed in a message
SAVE_NODES = ("SaveImage",)
"""Nodes in whose `filename_prefix` the editor replaces placeholders."""
_NUMBER = re.compile(r"\s*[+-]?\d{1,15}(\.\d{1,15})?\s*")


class Graph:
    """A saved graph with the node classes that name its widget values."""

    def __init__(self, document: dict[str, Any], info: Info) -> None:
        self.info = info
        subgraphs = (document.get("definitions") or {}).get("subgraphs") or []
        self.definitions = {str(definition["id"]): definition for definition in subgraphs}
        self.top = Scope("", *read_nodes(document, "the workflow"))
        self._levels: dict[str, tuple[dict[str, Node], dict[Any, Link]]] = {}
        self._output_links: dict[str, dict[int, Link]] = {}
        self._targets: dict[str, list[tuple[str, Target]]] = {}
        self._shown: dict[str, ShownWidgets] = {}
        self._wired: dict[str, dict[str, dict[str, Any]]] = {}
        self._resolved: dict[tuple[str, str, int, str], Source | None] = {}

    def flat_nodes(self) -> list[FlatNode]:
        """Every node that runs, subgraphs flattened. Raises WorkflowError listing unknown types."""
        unknown: dict[str, str] = {}
        self._placed = 0
        found = list(self._walk(self.top, unknown, ()))
        if unknown:
            listed = [
                f"node {one_line(node_id, 80)} ({one_line(kind, 80)})" for node_id, kind in unknown.items()
            ]
            named = ", ".join(listed[:MAX_LISTED])
            more = f" and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""
            advice = "remove or mute them"
            if any(kind.startswith(GROUP_PREFIXES) for kind in unknown.values()):
                advice = "convert group nodes to subgraphs in the editor, remove or mute others"
            missing = "the workflow uses nodes that are not installed here"
            raise WorkflowError(f"{missing}: {named}{more}; {advice}")
        return found

    def _walk(self, scope: Scope, unknown: dict[str, str], inside: tuple[str, ...]) -> Iterator[FlatNode]:
        for node_id, node in scope.nodes.items():
            self._placed += 1 + len(node.get("inputs") or [])
            if self._placed > MAX_PLACED:
                raise WorkflowError(
                    f"the workflow is too large: subgraphs counted in every use, it has more than "
                    f"{MAX_PLACED:,} nodes and inputs; use fewer subgraphs inside one another"
                )
            kind, full_id = str(node["type"]), scope.prefix + node_id
            is_off = node.get("mode", 0) in (MUTED, BYPASSED)
            if kind in self.definitions:
                if kind in inside:
                    raise WorkflowError(f"the subgraph of node {one_line(full_id)} contains itself")
                if len(inside) >= MAX_LEVELS:
                    raise WorkflowError(
                        f"the subgraph of node {one_line(full_id)} is nested too deeply: "
                        f"the limit is {MAX_LEVELS} levels; move it outside"
                    )
                self._placed += len(self.definitions[kind].get("inputs") or [])
                if not is_off or inside:  # the editor runs what is inside a muted subgraph of a subgraph
                    yield from self._walk(self.enter(scope, node), unknown, (*inside, kind))
            elif is_off or kind in (*NOTES, REROUTE, PRIMITIVE):
                continue
            elif kind in self.info:
                yield FlatNode(full_id, node, scope, self.info[kind])
            else:
                unknown[full_id] = kind

    def enter(self, scope: Scope, node: Node) -> Scope:
        """The level inside a subgraph node."""
        use = Use(scope, node, self.definitions[str(node["type"])])
        kind = str(node["type"])
        if kind not in self._levels:
            self._levels[kind] = read_nodes(use.definition, f"the subgraph of node {one_line(use.id)}")
        return Scope(f"{use.id}:", *self._levels[kind], use)

    # Widgets

    def shown(self, use: Use) -> ShownWidgets:
        """The widgets that a subgraph's node shows."""
        if use.id not in self._shown:
            inner, kind = self.enter(use.scope, use.node), str(use.node["type"])
            is_widget = partial(self._is_widget, inner, ())
            self._shown[use.id] = shown_widgets(use, self._shown_targets(kind, inner), is_widget)
        return self._shown[use.id]

    def _shown_targets(
        self, kind: str, inner: Scope, inside: tuple[str, ...] = ()
    ) -> list[tuple[str, Target]]:
        """(input name, widget that it leads to) of a subgraph's definition."""
        if kind in inside or len(inside) > MAX_LEVELS:
            raise WorkflowError(f"the subgraph {one_line(kind, 80)} contains itself or is nested too deeply")
        if kind not in self._targets:
            found = []
            for slot in self.definitions[kind].get("inputs") or []:
                ends = (self._end(inner, link_id) for link_id in slot.get("linkIds") or [])
                widgets = (end for end in ends if end and self._is_widget(inner, (*inside, kind), end))
                if (target := next(widgets, None)) is not None:
                    found.append((str(slot.get("name")), target))
            self._targets[kind] = found
        return self._targets[kind]

    def _end(self, scope: Scope, link_id: Any) -> Target | None:
        """(node id, input name) at the end of a link; None if the link is broken."""
        link = scope.links.get(link_id)
        slots = (scope.nodes.get(link.target, {}).get("inputs") or []) if link is not None else []
        if link is None or not 0 <= link.target_slot < len(slots):
            return None
        return link.target, input_name(slots[link.target_slot])

    def _is_widget(self, scope: Scope, inside: tuple[str, ...], target: Target) -> bool:
        """Whether a node of this level has this widget."""
        node = scope.nodes.get(target[0])
        if node is None:
            return False
        kind = str(node["type"])
        if kind in self.definitions:
            targets = self._shown_targets(kind, self.enter(scope, node), inside)
            return any(name == target[1] for name, _ in targets)
        return kind == PRIMITIVE or (kind in self.info and target[1] in widget_specs(self.info[kind]))

    def _value(self, use: Use, shown: Shown) -> Any:
        """The value of a widget that a subgraph's node shows."""
        scope = self.enter(use.scope, use.node)
        while shown.value is INSIDE:
            node = scope.nodes[shown.target[0]]
            kind = str(node["type"])
            if kind == PRIMITIVE:
                return (node.get("widgets_values") or [None])[0]
            if kind not in self.definitions:
                return saved_values(node, self.info[kind])[shown.target[1]]
            shown = self.shown(Use(scope, node, self.definitions[kind])).by_name[shown.target[1]]
            scope = self.enter(scope, node)
        return shown.value

    def _shown_source(self, use: Use, name: str, shown: Shown) -> Source:
        def store(value: Any) -> None:
            widgets = sorted(self.shown(use).by_name.values(), key=lambda widget: widget.index or 0)
            store_shown(use, name, shown, value, [self._value(use, widget) for widget in widgets])

        return Source(value=self._value(use, shown), store=store)

    def own_values(self, scope: Scope, node: Node) -> dict[str, Source]:
        """{name: value} of a node's own widgets, with what PrimitiveNodes set."""
        kind = str(node["type"])
        if kind in self.definitions:
            use = Use(scope, node, self.definitions[kind])
            shown = self.shown(use).by_name
            found = {name: self._shown_source(use, name, widget) for name, widget in shown.items()}
            for slot in node.get("inputs") or []:  # only placeholders read it, see _from_outside
                link = scope.links.get(slot.get("link"))
                origin = scope.nodes.get(link.origin, {}) if link is not None else {}
                if origin.get("type") == PRIMITIVE and origin.get("widgets_values"):
                    found[input_name(slot)] = Source(value=origin["widgets_values"][0])
            return found
        if kind not in self.info:
            return {}
        specs = widget_specs(self.info[kind])
        found = {name: Source(value=value) for name, value in saved_values(node, self.info[kind]).items()}
        for slot in node.get("inputs") or []:
            name = input_name(slot)
            link = scope.links.get(slot.get("link")) if name in specs else None
            origin = scope.nodes.get(link.origin) if link is not None else None
            if origin is not None and origin["type"] == PRIMITIVE and origin.get("widgets_values"):
                found[name] = self._primitive(scope, origin, *specs[name])
        return found

    def _primitive(self, scope: Scope, node: Node, kind: Any, options: dict[str, Any]) -> Source:
        """The value of a PrimitiveNode as it arrives in a widget."""
        if scope.use is not None:
            for name, shown in self.shown(scope.use).by_node.get(str(node["id"]), {}).items():
                return self._shown_source(scope.use, name, shown)
        values = node["widgets_values"]
        return Source(value=as_entered(values[0], kind, options), store=partial(values.__setitem__, 0))

    # Wires

    def source(
        self, scope: Scope, node: Node, slot: dict[str, Any], depth: int = 0, kind: Any = None
    ) -> Source | None:
        """The source of an input slot, None if it has none. Raises WorkflowError."""
        link_id = slot.get("link")
        if link_id is None:
            return None
        node_name = f"{scope.prefix}{node['id']} ({node['type']})"
        where = f"input {one_line(str(slot.get('name')), 80)} of node {one_line(node_name, 160)}"
        link = scope.links.get(link_id)
        if link is None:
            raise WorkflowError(
                f"{where} refers to link {one_line(str(link_id), 80)}, which does not exist; connect it again"
            )
        if depth > MAX_DEPTH:
            raise WorkflowError(f"{where} depends on itself; disconnect one of its reroutes")
        if link.origin == SUBGRAPH_INPUTS and scope.use is not None:
            return self._from_outside(scope.use, link, depth)
        origin = scope.nodes.get(link.origin)
        if origin is None:
            missing = one_line(scope.prefix + link.origin, 80)
            raise WorkflowError(
                f"{where} is linked to node {missing}, which does not exist; connect it again"
            )
        return self._from_output(scope, origin, link.origin_slot, kind or slot.get("type"), depth)

    def _from_outside(self, use: Use, link: Link, depth: int) -> Source | None:
        """The source of a subgraph's input: a link to its node, or a value stored there."""
        slots = use.definition.get("inputs") or []
        if not 0 <= link.origin_slot < len(slots):
            return None
        name = str(slots[link.origin_slot].get("name"))
        if use.id not in self._wired:
            self._wired[use.id] = {
                str(slot.get("name")): slot
                for slot in reversed(use.node.get("inputs") or [])
                if slot.get("link") is not None
            }
        if name in self._wired[use.id]:
            return self.source(use.scope, use.node, self._wired[use.id][name], depth + 1)
        if (outer := use.scope.use) is not None:
            listed = self.shown(outer).by_node.get(str(use.node["id"]), {})
            if name in listed:
                return self._shown_source(outer, name, listed[name])
        shown = self.shown(use).by_name.get(name)
        return None if shown is None else self._shown_source(use, name, shown)

    def _from_output(self, scope: Scope, node: Node, output: int, kind: Any, depth: int) -> Source | None:
        """The source behind a node's output: the node itself, or what it passes through."""
        key = (scope.prefix, str(node["id"]), output, str(kind))
        if key not in self._resolved:
            self._resolved[key] = self._follow(scope, node, output, kind, depth)
        return self._resolved[key]

    def _follow(self, scope: Scope, node: Node, output: int, kind: Any, depth: int) -> Source | None:
        slots = node.get("inputs") or []
        mode, node_type = node.get("mode", 0), str(node["type"])
        if mode == MUTED or node_type == PRIMITIVE:  # a PrimitiveNode sets widgets instead, see own_values
            return None
        if mode == BYPASSED:
            index = bypassed_slot(node, output, kind)
            return None if index is None else self.source(scope, node, slots[index], depth + 1)
        if node_type == REROUTE:
            return self.source(scope, node, slots[0], depth + 1, kind) if slots else None
        if node_type not in self.definitions:
            return Source(wire=[scope.prefix + str(node["id"]), output])
        inner = self.enter(scope, node)
        if node_type not in self._output_links:
            ends = [link for link in inner.links.values() if link.target == SUBGRAPH_OUTPUTS]
            self._output_links[node_type] = {link.target_slot: link for link in reversed(ends)}
        link = self._output_links[node_type].get(output)
        if link is None:
            return None
        if link.origin == SUBGRAPH_INPUTS and inner.use is not None:
            return self._from_outside(inner.use, link, depth + 1)
        origin = inner.nodes.get(link.origin)
        if origin is None:
            return None
        if depth > MAX_DEPTH:
            raise WorkflowError(f"node {one_line(scope.prefix + str(node['id']))} is nested too deeply")
        return self._from_output(inner, origin, link.origin_slot, kind, depth + 1)

    def sources(self, flat_node: FlatNode) -> dict[str, Source]:
        """{input name: source} of the connected inputs of a node."""
        found = {}
        for slot in flat_node.node.get("inputs") or []:
            source = self.source(flat_node.scope, flat_node.node, slot)
            if source is not None:
                found[input_name(slot)] = source
        if (use := flat_node.scope.use) is not None:
            for name, shown in self.shown(use).by_node.get(str(flat_node.node["id"]), {}).items():
                found[name] = self._shown_source(use, name, shown)
        return found

    def prompt(self) -> dict[str, dict[str, Any]]:
        """The prompt of this graph. Raises WorkflowError."""
        nodes = self.flat_nodes()
        running = {flat_node.id for flat_node in nodes}
        placeholders = Placeholders(self)
        prompt = {}
        for flat_node in nodes:
            own = self.own_values(flat_node.scope, flat_node.node)
            inputs = {name: _sent(source.value) for name, source in own.items()}
            prefix = inputs.get("filename_prefix")
            if flat_node.node["type"] in SAVE_NODES and isinstance(prefix, str):
                inputs["filename_prefix"] = placeholders.expand(prefix)
            for name, source in self.sources(flat_node).items():
                if source.wire is None:
                    inputs[name] = _sent(source.value)
                elif source.wire[0] in running:
                    inputs[name] = list(source.wire)
                else:
                    inputs.pop(name, None)
            title = (
                flat_node.node.get("title") or flat_node.info.get("display_name") or flat_node.node["type"]
            )
            prompt[flat_node.id] = {
                "class_type": flat_node.node["type"],
                "inputs": inputs,
                "_meta": {"title": title},
            }
        return prompt


def input_name(slot: dict[str, Any]) -> str:
    """The name of an input in the prompt."""
    return str((slot.get("widget") or {}).get("name") or slot.get("name"))


def _sent(value: Any) -> Any:
    """A widget's value as a prompt has it: a list is wrapped, because a plain one is a wire."""
    return {"__value__": value} if isinstance(value, list) else value


def bypassed_slot(node: Node, output: int, kind: Any) -> int | None:
    """The index of the input that a bypassed node passes to an output, for a wire of type `kind`."""
    types = [slot.get("type") for slot in node.get("inputs") or []]
    outputs = node.get("outputs") or []
    own = outputs[output].get("type", kind) if 0 <= output < len(outputs) else kind
    if kind in ("*", "", None):
        return output if 0 <= output < len(types) else 0 if types else None
    if 0 <= output < len(types) and _connects(types[output], own) and _connects(types[output], kind):
        return output
    exact = [index for index, name in enumerate(types) if name == kind]
    fitting = [index for index, name in enumerate(types) if _connects(name, own) and _connects(name, kind)]
    return next(iter(exact or fitting), None)


def _connects(first: Any, second: Any) -> bool:
    """Whether the editor connects these types."""
    if first in ("*", "", 0, None) or second in ("*", "", 0, None):
        return True
    return bool(set(str(first).lower().split(",")) & set(str(second).lower().split(",")))


def as_entered(value: Any, kind: Any, options: dict[str, Any]) -> Any:
    """A PrimitiveNode's value as the widget takes it: numbers are rounded to its step and clamped."""
    if kind in ("INT", "FLOAT") and isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if kind not in ("INT", "FLOAT") or not isinstance(value, (int, float, type(None))):
        return value
    low, high = options.get("min", 0), options.get("max", 2048)
    step = options.get("step", 1 if kind == "INT" else 0.5)
    if kind == "INT":
        start = low % step if step != 1 else 0
        entered = _round(value or 0, step, start)
        return entered if value is None else min(max(entered, low), high)
    digits = max(0, -math.floor(math.log10(step))) if step > 0 else 0
    unit = options.get("round") or (10**-digits if digits else None)
    entered = round(_round(value or 0, unit), digits) if unit else value or 0
    return min(max(entered, low), high)


def _round(value: float, step: float, start: float = 0) -> float:
    """The nearest multiple of `step` from `start`; a half is rounded up, as in JavaScript."""
    if isinstance(value, int) and isinstance(step, int):
        return (2 * (value - start) + step) // (2 * step) * step + start
    return math.floor((value - start) / step + 0.5) * step + start
