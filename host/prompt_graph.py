"""A prompt as a graph: its wires, what a node needs, what needs it, and an order to run in.

Every function takes time proportional to the prompt's size.
"""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import TopologicalSorter
from typing import Any

MAX_DEPENDENT = 20  # outputs named for one error

Prompt = dict[str, dict[str, Any]]


def links(node: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """{input: (node id, output slot)} of the connected inputs."""
    return {
        name: (str(value[0]), value[1])
        for name, value in node["inputs"].items()
        if isinstance(value, list) and len(value) == 2 and type(value[1]) is int
    }


def upstream(prompt: Prompt, outputs: Iterable[str]) -> set[str]:
    """The nodes that the outputs need, themselves included."""
    found: set[str] = set()
    pending = list(outputs)
    while pending:
        node_id = pending.pop()
        if node_id in prompt and node_id not in found:
            found.add(node_id)
            pending.extend(source for source, _ in links(prompt[node_id]).values())
    return found


def downstream(prompt: Prompt, sources: Iterable[str]) -> set[str]:
    """The nodes that need one of these, themselves included."""
    consumers: dict[str, list[str]] = {}
    for node_id, node in prompt.items():
        for source, _ in links(node).values():
            consumers.setdefault(source, []).append(node_id)
    found: set[str] = set()
    pending = list(sources)
    while pending:
        node_id = pending.pop()
        if node_id not in found:
            found.add(node_id)
            pending.extend(consumers.get(node_id, ()))
    return found


def order(prompt: Prompt, outputs: Iterable[str]) -> list[str]:
    """The nodes that the outputs need, each after its inputs. Raises graphlib.CycleError."""
    needed = upstream(prompt, outputs)
    graph = {
        node_id: [source for source, _ in links(prompt[node_id]).values() if source in needed]
        for node_id in prompt
        if node_id in needed
    }
    return list(TopologicalSorter(graph).static_order())


def dependents(prompt: Prompt, outputs: list[str]) -> dict[str, int]:
    """{node id: the outputs that need it, bit i for outputs[i]}. Raises graphlib.CycleError."""
    found = dict.fromkeys(prompt, 0)
    found.update((output, 1 << index) for index, output in enumerate(outputs))
    for node_id in reversed(order(prompt, outputs)):
        for source, _ in links(prompt[node_id]).values():
            if source in found:
                found[source] |= found[node_id]
    return found


def listed(bits: int, outputs: list[str]) -> list[str]:
    """The outputs of a set of bits, the first MAX_DEPENDENT of them."""
    found = []
    while bits and len(found) < MAX_DEPENDENT:
        lowest = bits & -bits
        found.append(outputs[lowest.bit_length() - 1])
        bits ^= lowest
    return found
