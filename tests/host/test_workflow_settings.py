"""Settings (`--set`) applied to a document: its prompt and its graph agree afterwards."""

from __future__ import annotations

from typing import Any

import pytest
from rectiflux.host.workflow import Document, WorkflowError, apply_settings, to_prompt

from .graphs import API, INFO, chain, graph, node, pair, prompt_of, subgraph


def apply(document: dict[str, Any], *settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(prompt inputs by node, graph) after these settings."""
    found = apply_settings(Document(document, None), list(settings), INFO)
    assert found.prompt is not None and found.graph is not None
    return {key: value["inputs"] for key, value in found.prompt.items()}, found.graph


def test_setting_a_widget_newer_than_the_file_fills_in_the_ones_before_it() -> None:
    _, after = apply(pair(widgets_values=["mul"]), "n=3")
    assert after["nodes"][1]["widgets_values"] == ["mul", "-", False, 3]


def test_a_setting_goes_into_the_prompt_and_the_graph() -> None:
    document = pair()
    inputs, after = apply(document, "seed=9", "2.text=a=b, ünïcode", "scale=1e-1", "flag=no", "mode=add")
    assert inputs["1"] == {"seed": 9, "scale": 0.1}
    assert inputs["2"] == {"a": ["1", 0], "mode": "add", "text": "a=b, ünïcode", "flag": False, "n": 9}
    assert after["nodes"][0]["widgets_values"] == [9, "fixed", 0.1]
    assert after["nodes"][1]["widgets_values"] == ["add", "a=b, ünïcode", False, 9]
    assert document == pair(), "the original is not changed"


def test_graph_and_prompt_agree_after_a_setting() -> None:
    for document in (pair(), subgraph(["outer"]), pair(widgets_values=["mul"])):
        inputs, after = apply(document, "seed=9", "2.n=3")
        assert {key: value["inputs"] for key, value in prompt_of(after).items()} == inputs


def test_values_saved_by_name_are_set() -> None:
    document = pair()
    named = {"seed": 7, "control_after_generate": "fixed", "scale": 2.5}
    document["nodes"][0]["widgets_values_named"] = named
    _, after = apply(document, "seed=9")
    assert after["nodes"][0]["widgets_values"][0] == after["nodes"][0]["widgets_values_named"]["seed"] == 9


def test_a_value_in_a_primitive_node_is_set() -> None:
    document = graph(
        [node(1, "PrimitiveNode", [42, "fixed"]), node(2, "Number", [0, "fixed", 1.0], {"seed": 1})],
        [[1, 1, 0, 2, 0, "INT"]],
    )
    inputs, after = apply(document, "seed=5")
    assert inputs["2"]["seed"] == 5 and after["nodes"][0]["widgets_values"] == [5, "fixed"]


def test_a_value_in_a_subgraph_is_set() -> None:
    inputs, after = apply(subgraph(["outer"]), "5:3.text=new", "5:3.n=3")
    assert inputs["5:3"]["text"] == "new" and after["nodes"][1]["widgets_values"] == ["new"]
    assert after["definitions"]["subgraphs"][0]["nodes"][0]["widgets_values"][3] == 3


def test_settings_of_an_api_prompt_and_of_an_image() -> None:
    assert apply_settings(Document(None, API), ["seed=1"], INFO).prompt["1"]["inputs"]["seed"] == 1
    both = apply_settings(Document(pair(), to_prompt(Document(pair(), None), INFO)), ["seed=1"], INFO)
    assert both.prompt["1"]["inputs"]["seed"] == both.graph["nodes"][0]["widgets_values"][0] == 1


def test_an_image_in_another_folder_may_be_set() -> None:
    """LoadImage lists its own folder only, and validates other names itself."""
    inputs, _ = apply(graph([node(1, "Load", ["x.png", "image"])], []), "image=made.png [output]")
    assert inputs["1"]["image"] == "made.png [output]"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed", "--set must be NAME=VALUE, got 'seed'"),
        ("=3", "--set must be NAME=VALUE, got '=3'"),
        ("sead=3", "--set sead: unknown widget; the workflow has flag, mode, n, scale, seed, text"),
        ("1.text=x", "--set 1.text: unknown widget; node 1 has scale, seed"),
        ("8.seed=1", "--set 8.seed: node 8 does not exist; the workflow has 1 (A Number), 2 (Mix)"),
        ("a=1", "--set a: unknown widget; the workflow has flag, mode, n, scale, seed, text"),
        ("2.a=1", "--set 2.a: this input is connected to a wire; "),
        ("seed=many", "--set seed: must be an integer, got 'many'"),
        ("seed=1.5", "--set seed: must be an integer, got '1.5'"),
        ("scale=big", "--set scale: must be a number, got 'big'"),
        ("scale=nan", "--set scale: must be finite, got 'nan'"),
        ("flag=maybe", "--set flag: must be true or false, got 'maybe'"),
        ("mode=div", "--set mode: 'div' is not one of add, mul"),
    ],
)
def test_invalid_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        apply(pair(), setting)
    assert str(caught.value).startswith(message)


def test_a_number_of_many_digits_is_read_or_refused_in_a_short_sentence() -> None:
    """Python's floats end at 1e308, its conversion of text to integers at 4300 digits."""
    assert apply(pair(), f"seed={'9' * 400}")[0]["1"]["seed"] == 10**400 - 1
    with pytest.raises(WorkflowError, match="--set seed: must be an integer, got '99") as caught:
        apply(pair(), f"seed={'9' * 5000}")
    assert len(str(caught.value)) < 300


def test_an_ambiguous_setting_lists_the_candidates() -> None:
    prompt = {"1": {**API["1"], "_meta": ["x"]}, "2": {**API["1"], "_meta": {"title": "Mine"}}}
    with pytest.raises(WorkflowError, match=r"2 nodes have it; .* 1.seed \(A Number\), 2.seed \(Mine\)"):
        apply_settings(Document(None, prompt), ["seed=1"], INFO)
    with pytest.raises(WorkflowError, match=r"2 nodes have it; .* 2.text \(Mix\), 3.text \(Mix\)"):
        apply(chain(0), "text=x")


def test_a_subgraph_used_twice_cannot_be_set_from_outside() -> None:
    document = subgraph()
    document["nodes"].append(node(6, "uuid", [], {"a": None, "words": None}))
    with pytest.raises(WorkflowError, match="node 5:3 is in a subgraph used several times"):
        apply(document, "5:3.n=3")
