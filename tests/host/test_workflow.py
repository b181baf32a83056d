"""Workflow files to prompts. The class table is written out in graphs.py, to read every prompt off it."""

from __future__ import annotations

from typing import Any

import pytest
from rectiflux.host.workflow import Document, WorkflowError, apply_settings, to_prompt

from .graphs import API, INFO, chain, graph, node, pair, prompt_of, subgraph


def test_values_are_named_by_position_and_the_seeds_control_is_stepped_over() -> None:
    assert prompt_of(pair()) == {
        "1": {"class_type": "Number", "inputs": {"seed": 7, "scale": 2.5}},
        "2": {
            "class_type": "Mix",
            "inputs": {"a": ["1", 0], "mode": "mul", "text": "hi", "flag": True, "n": 9},
        },
    }


def test_a_file_from_before_the_seeds_control_reads_the_same() -> None:
    assert prompt_of(graph([node(1, "Number", [7, 2.5])], []))["1"]["inputs"] == {"seed": 7, "scale": 2.5}


def test_values_may_be_saved_by_name() -> None:
    document = graph([node(1, "Number", {"scale": 3.0, "seed": 1})], [])
    assert prompt_of(document)["1"]["inputs"] == {"seed": 1, "scale": 3.0}


def test_widgets_newer_than_the_file_take_their_defaults() -> None:
    inputs = prompt_of(pair(widgets_values=["mul"]))["2"]["inputs"]
    assert inputs == {"a": ["1", 0], "mode": "mul", "text": "-", "flag": False, "n": 4}


def test_the_upload_buttons_value_is_no_input() -> None:
    assert prompt_of(graph([node(1, "Load", ["x.png", "image"])], []))["1"]["inputs"] == {"image": "x.png"}


def test_links_saved_as_objects() -> None:
    document = pair()
    document["links"] = [{"id": 1, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0}]
    assert prompt_of(document)["2"]["inputs"]["a"] == ["1", 0]


def test_a_wire_into_a_widget_wins_over_its_value() -> None:
    document = pair()
    document["nodes"][1]["inputs"] = [{"name": "n", "type": "INT", "link": 1, "widget": {"name": "n"}}]
    inputs = prompt_of(document)["2"]["inputs"]
    assert inputs["n"] == ["1", 0] and inputs["text"] == "hi"


def test_a_primitive_gives_its_value_and_a_note_nothing() -> None:
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


def test_reroutes_are_followed_to_where_they_lead() -> None:
    document = graph(
        [
            node(1, "Number", [7, "fixed", 2.5]),
            node(5, "Reroute", [], {"": 1}),
            node(6, "Reroute", [], {"": 2}),
            node(2, "Mix", ["add"], {"a": 3}),
        ],
        [[1, 1, 0, 5, 0, "*"], [2, 5, 0, 6, 0, "*"], [3, 6, 0, 2, 0, "*"]],
    )
    assert prompt_of(document)["2"]["inputs"]["a"] == ["1", 0]
    assert prompt_of(document).keys() == {"1", "2"}


def test_a_bypassed_node_hands_its_input_through() -> None:
    prompt = prompt_of(chain(4))
    assert prompt.keys() == {"1", "3"} and prompt["3"]["inputs"]["a"] == ["1", 0]


def test_a_muted_node_takes_its_wires_with_it() -> None:
    prompt = prompt_of(chain(2))
    assert prompt.keys() == {"1", "3"} and "a" not in prompt["3"]["inputs"]


def test_a_subgraph_is_flattened_to_ids_with_a_colon() -> None:
    prompt = prompt_of(subgraph())
    assert prompt.keys() == {"1", "2", "5:3"}
    assert prompt["2"]["inputs"]["a"] == ["5:3", 0]
    assert prompt["5:3"]["inputs"] == {"a": ["1", 0], "mode": "mul", "text": "inner", "flag": False, "n": 1}


def test_a_value_shown_on_the_subgraphs_node_wins() -> None:
    assert prompt_of(subgraph(["outer"]))["5:3"]["inputs"]["text"] == "outer"


def test_the_older_list_of_shown_widgets_is_read_too() -> None:
    prompt = prompt_of(subgraph([8], proxyWidgets=[["3", "n"]]))
    assert prompt["5:3"]["inputs"]["n"] == 8


def refusal(document: Any) -> str:
    with pytest.raises(WorkflowError) as caught:
        to_prompt(document if isinstance(document, Document) else Document(document, None), INFO)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_nodes_are_all_named() -> None:
    document = graph([node(1, "Foo"), node(2, "Bar"), node(3, "Baz", mode=2)], [])
    assert refusal(document) == (
        "the workflow uses nodes that are not installed here: node 1 (Foo), node 2 (Bar); remove or mute them"
    )


def test_a_link_that_does_not_exist() -> None:
    document = pair()
    document["links"] = []
    assert refusal(document) == (
        "input a of node 2 (Mix) names the link 1, which does not exist; connect it again"
    )


def test_a_link_from_a_node_that_does_not_exist() -> None:
    document = pair()
    del document["nodes"][0]
    assert refusal(document) == (
        "input a of node 2 (Mix) is linked to node 1, which does not exist; connect it again"
    )


def test_reroutes_in_a_circle() -> None:
    document = graph(
        [node(1, "Reroute", [], {"": 1}), node(2, "Mix", ["add"], {"a": 2})],
        [[1, 1, 0, 1, 0, "*"], [2, 1, 0, 2, 0, "*"]],
    )
    assert "is fed in a circle" in refusal(document)


def test_a_subgraph_inside_itself() -> None:
    document = subgraph()
    document["definitions"]["subgraphs"][0]["nodes"].append(node(9, "uuid"))
    assert refusal(document) == "the subgraph of node 5:9 contains itself"


@pytest.mark.parametrize("broken", [{"nodes": [1], "links": []}, {"nodes": [], "links": [[1, 2]]}])
def test_a_damaged_graph(broken: dict[str, Any]) -> None:
    assert refusal(broken).startswith("the workflow is damaged")


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


def test_a_title_of_another_form_is_passed_over() -> None:
    prompt = {"1": {**API["1"], "_meta": ["x"]}, "2": {**API["1"], "_meta": {"title": "Mine"}}}
    with pytest.raises(WorkflowError, match=r"say which: 1.seed \(A Number\), 2.seed \(Mine\)"):
        apply_settings(Document(None, prompt), ["seed=1"], INFO)
