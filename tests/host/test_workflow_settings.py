"""Settings (`--set`) into a document: its prompt and its graph say the same afterwards."""

from __future__ import annotations

from typing import Any

import pytest
from rectiflux.host.workflow import Document, WorkflowError, apply_settings, to_prompt

from .graphs import API, INFO, chain, graph, node, pair, prompt_of, subgraph


def settle(document: dict[str, Any], *settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(prompt inputs by node, graph) after these settings."""
    found = apply_settings(Document(document, None), list(settings), INFO)
    assert found.prompt is not None and found.graph is not None
    return {key: value["inputs"] for key, value in found.prompt.items()}, found.graph


def test_a_set_widget_that_is_newer_than_the_file_leaves_no_holes_before_it() -> None:
    _, after = settle(pair(widgets_values=["mul"]), "n=3")
    assert after["nodes"][1]["widgets_values"] == ["mul", "-", False, 3]


def test_a_setting_goes_into_the_prompt_and_the_graph() -> None:
    document = pair()
    inputs, after = settle(document, "seed=9", "2.text=a=b, ünïcode", "scale=1e-1", "flag=no", "mode=add")
    assert inputs["1"] == {"seed": 9, "scale": 0.1}
    assert inputs["2"] == {"a": ["1", 0], "mode": "add", "text": "a=b, ünïcode", "flag": False, "n": 9}
    assert after["nodes"][0]["widgets_values"] == [9, "fixed", 0.1]
    assert after["nodes"][1]["widgets_values"] == ["add", "a=b, ünïcode", False, 9]
    assert document == pair(), "the document that was read stays as it was"


def test_a_set_graph_says_what_its_prompt_says() -> None:
    for document in (pair(), subgraph(["outer"]), pair(widgets_values=["mul"])):
        inputs, after = settle(document, "seed=9", "2.n=3")
        assert {key: value["inputs"] for key, value in prompt_of(after).items()} == inputs


def test_a_setting_reaches_values_saved_by_name() -> None:
    document = pair()
    document["nodes"][0]["widgets_values_named"] = {
        "seed": 7,
        "control_after_generate": "fixed",
        "scale": 2.5,
    }
    _, after = settle(document, "seed=9")
    assert after["nodes"][0]["widgets_values"][0] == after["nodes"][0]["widgets_values_named"]["seed"] == 9


def test_a_setting_reaches_the_primitive_that_holds_the_value() -> None:
    document = graph(
        [node(1, "PrimitiveNode", [42, "fixed"]), node(2, "Number", [0, "fixed", 1.0], {"seed": 1})],
        [[1, 1, 0, 2, 0, "INT"]],
    )
    inputs, after = settle(document, "seed=5")
    assert inputs["2"]["seed"] == 5 and after["nodes"][0]["widgets_values"] == [5, "fixed"]


def test_a_setting_reaches_into_a_subgraph() -> None:
    inputs, after = settle(subgraph(["outer"]), "5:3.text=new", "5:3.n=3")
    assert inputs["5:3"]["text"] == "new" and after["nodes"][1]["widgets_values"] == ["new"]
    assert after["definitions"]["subgraphs"][0]["nodes"][0]["widgets_values"][3] == 3


def test_settings_of_an_api_prompt_and_of_a_picture() -> None:
    assert apply_settings(Document(None, API), ["seed=1"], INFO).prompt["1"]["inputs"]["seed"] == 1
    both = apply_settings(Document(pair(), to_prompt(Document(pair(), None), INFO)), ["seed=1"], INFO)
    assert both.prompt["1"]["inputs"]["seed"] == both.graph["nodes"][0]["widgets_values"][0] == 1


def test_a_picture_from_elsewhere_may_be_set() -> None:
    """LoadImage's list has what lies in its folder; its own check knows the rest."""
    inputs, _ = settle(graph([node(1, "Load", ["x.png", "image"])], []), "image=made.png [output]")
    assert inputs["1"]["image"] == "made.png [output]"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("seed", "--set takes NAME=VALUE, got 'seed'"),
        ("=3", "--set takes NAME=VALUE, got '=3'"),
        ("sead=3", "--set sead: no such widget here; there are flag, mode, n, scale, seed, text"),
        ("1.text=x", "--set 1.text: node 1 has no such widget; it has scale, seed"),
        ("8.seed=1", "--set 8.seed: there is no node 8; there are 1 (A Number), 2 (Mix)"),
        ("a=1", "--set a: no such widget here; there are flag, mode, n, scale, seed, text"),
        ("2.a=1", "--set 2.a: this input is fed by a wire; set the value where the wire starts"),
        ("seed=many", "--set seed: takes a whole number, got 'many'"),
        ("seed=1.5", "--set seed: takes a whole number, got '1.5'"),
        ("scale=big", "--set scale: takes a number, got 'big'"),
        ("scale=nan", "--set scale: takes a finite number, got 'nan'"),
        ("flag=maybe", "--set flag: takes true or false, got 'maybe'"),
        ("mode=div", "--set mode: 'div' is not in its list, which has add, mul"),
    ],
)
def test_settings_that_cannot_be(setting: str, says: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        settle(pair(), setting)
    assert str(caught.value) == says


def test_an_ambiguous_setting_lists_the_candidates() -> None:
    with pytest.raises(WorkflowError) as caught:
        settle(chain(0), "text=x")
    assert str(caught.value) == "--set text: 2 nodes have it, say which: 2.text (Mix), 3.text (Mix)"


def test_a_subgraph_used_twice_cannot_be_set_from_outside() -> None:
    document = subgraph()
    document["nodes"].append(node(6, "uuid", [], {"a": None, "words": None}))
    with pytest.raises(WorkflowError, match="node 5:3 is in a subgraph used twice; set it in the editor"):
        settle(document, "5:3.n=3")
