"""Saved graphs to prompts. The node classes are in graphs.py, so that every prompt can be derived by hand."""

from __future__ import annotations

from typing import Any

import pytest
from rectiflux.host.workflow import Document, WorkflowError, apply_settings, to_prompt

from .graphs import INFO, chain, graph, node, pair, prompt_of, subgraph


def test_values_are_named_by_position_and_the_seeds_control_is_skipped() -> None:
    mix = {"a": ["1", 0], "mode": "mul", "text": "hi", "flag": True, "n": 9}
    assert prompt_of(pair()) == {
        "1": {"class_type": "Number", "inputs": {"seed": 7, "scale": 2.5}},
        "2": {"class_type": "Mix", "inputs": mix},
    }


@pytest.mark.parametrize(
    ("kind", "values", "inputs"),
    [
        ("Number", [7, 2.5], {"seed": 7, "scale": 2.5}),  # a file without control_after_generate
        ("Number", {"scale": 3.0, "seed": 1}, {"seed": 1, "scale": 3.0}),  # values saved by name
        ("Load", ["x.png", "image"], {"image": "x.png"}),  # the upload button has a value, too
        (
            "Mix",
            [None, None, None, 3],
            {"mode": "add", "text": None, "flag": None, "n": 3},
        ),  # null in a combo
        ("Mix", ["mul"], {"mode": "mul", "text": "-", "flag": False, "n": 4}),  # newer widgets: defaults
    ],
)
def test_other_ways_in_which_values_are_saved(kind: str, values: Any, inputs: dict[str, Any]) -> None:
    assert prompt_of(graph([node(1, kind, values)], []))["1"]["inputs"] == inputs


def test_links_saved_as_objects() -> None:
    document = pair()
    document["links"] = [{"id": 1, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0}]
    assert prompt_of(document)["2"]["inputs"]["a"] == ["1", 0]


def test_a_wire_into_a_widget_replaces_its_value() -> None:
    document = pair()
    document["nodes"][1]["inputs"] = [{"name": "n", "type": "INT", "link": 1, "widget": {"name": "n"}}]
    inputs = prompt_of(document)["2"]["inputs"]
    assert inputs["n"] == ["1", 0] and inputs["text"] == "hi"


def test_primitive_nodes_give_their_value_and_notes_are_ignored() -> None:
    document = graph(
        [
            node(1, "PrimitiveNode", [42, "randomize"]),
            node(2, "Number", [0, "fixed", 1.0], {"seed": 1}),
            node(3, "Note", ["read me"]),
            node(4, "MarkdownNote", ["# read me"]),
        ],
        [[1, 1, 0, 2, 0, "INT"]],
    )
    assert prompt_of(document) == {"2": {"class_type": "Number", "inputs": {"seed": 42, "scale": 1.0}}}


def test_reroutes_are_followed_to_their_source() -> None:
    document = graph(
        [
            node(1, "Number", [7, "fixed", 2.5]),
            node(5, "Reroute", [], {"": 1}),
            node(6, "Reroute", [], {"": 2}),
            node(2, "Mix", ["add"], {"a": 3}),
        ],
        [[1, 1, 0, 5, 0, "*"], [2, 5, 0, 6, 0, "*"], [3, 6, 0, 2, 0, "*"]],
    )
    prompt = prompt_of(document)
    assert prompt["2"]["inputs"]["a"] == ["1", 0] and prompt.keys() == {"1", "2"}


def test_a_bypassed_node_passes_its_input_through_and_a_muted_one_does_not() -> None:
    bypassed, muted = prompt_of(chain(4)), prompt_of(chain(2))
    assert bypassed.keys() == muted.keys() == {"1", "3"}
    assert bypassed["3"]["inputs"]["a"] == ["1", 0] and "a" not in muted["3"]["inputs"]


def test_subgraphs_are_flattened_to_ids_with_a_colon() -> None:
    prompt = prompt_of(subgraph())
    assert prompt.keys() == {"1", "2", "5:3"}
    assert prompt["2"]["inputs"]["a"] == ["5:3", 0]
    assert prompt["5:3"]["inputs"] == {"a": ["1", 0], "mode": "mul", "text": "inner", "flag": False, "n": 1}


def test_values_on_the_subgraphs_node_replace_those_inside() -> None:
    assert prompt_of(subgraph(["outer"]))["5:3"]["inputs"]["text"] == "outer"
    listed = subgraph([8], proxyWidgets=[["3", "n"]])  # the format of 2025
    assert prompt_of(listed)["5:3"]["inputs"]["n"] == 8


def without(key: str, index: int | None = None) -> dict[str, Any]:
    """The graph `pair` without its links or one of its nodes."""
    document = pair()
    document[key] = [] if index is None else [n for i, n in enumerate(document[key]) if i != index]
    return document


def nested_in_itself() -> dict[str, Any]:
    document = subgraph()
    document["definitions"]["subgraphs"][0]["nodes"].append(node(9, "uuid"))
    return document


CIRCLE = graph(
    [node(1, "Reroute", [], {"": 1}), node(2, "Mix", ["add"], {"a": 2})],
    [[1, 1, 0, 1, 0, "*"], [2, 1, 0, 2, 0, "*"]],
)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            graph([node(1, "Foo"), node(2, "Bar"), node(3, "Baz", mode=2)], []),
            r"node 1 \(Foo\), node 2 \(Bar\);",
        ),
        (
            graph([node(1, "workflow>Mine")], []),
            r"node 1 \(workflow>Mine\); convert group nodes to subgraphs in the editor, remove",
        ),
        (without("links"), r"^input a of node 2 \(Mix\) refers to link 1, which does not exist"),
        (without("nodes", 0), r"^input a of node 2 \(Mix\) is linked to node 1, which does not exist"),
        (CIRCLE, "depends on itself"),
        (nested_in_itself(), "^the subgraph of node 5:9 contains itself$"),
        ({"nodes": [1], "links": []}, "^the workflow is damaged"),
        ({"nodes": [], "links": [[1, 2]]}, "^the workflow is damaged"),
    ],
)
def test_invalid_graphs_are_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkflowError, match=message) as caught:
        to_prompt(Document(document, None), INFO)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "junk"),
    [
        (("nodes", 1, "inputs"), 7),
        (("nodes", 1, "inputs", 0), "a"),
        (("nodes", 1, "inputs", 0, "link"), []),
        (("nodes", 1, "inputs", 1, "name"), {}),
        (("nodes", 1, "inputs", 1, "widget"), 3),
        (("nodes", 1, "properties"), [1]),
        (("nodes", 2, "widgets_values"), True),
        (("definitions",), [1]),
        (("definitions", "subgraphs"), {"a": 1}),
        (("definitions", "subgraphs", 0, "id"), None),
        (("definitions", "subgraphs", 0, "inputs", 0), None),
        (("definitions", "subgraphs", 0, "nodes", 0, "inputs", 0, "name"), [0]),
        (("definitions", "subgraphs", 0, "links", 0, "origin_slot"), "x"),
    ],
)
@pytest.mark.parametrize("settings", [[], ["seed=9"], ["5:3.text=new"]])
def test_a_graph_with_junk_in_it_is_read_or_refused(path: Any, junk: Any, settings: list[str]) -> None:
    document = found = subgraph(["outer"])
    for key in path[:-1]:
        found = found[key]
    found[path[-1]] = junk
    try:
        apply_settings(Document(document, None), settings, INFO)
    except WorkflowError as refused:
        assert "is damaged" in str(refused) or "not installed here" in str(refused) or settings
