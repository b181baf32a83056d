"""Values on a subgraph's node: they run as the editor's graphToPrompt sends them; `--set` writes them there.

Every expected value was observed in comfyui-frontend-package 1.58.1 in Chromium. Public reports of the kind:
Comfy-Org/comfy-cli#722, #815, #858, Comfy-Org/ComfyUI_frontend#10257, artokun/comfyui-mcp-panel#366.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from rectiflux.host.saved_graph import WorkflowError
from rectiflux.host.workflow import Document, apply_settings, to_prompt

from .graphs import INFO, graph, node, prompt_of

WIDGETS = {"text": 3, "seed": 4, "n": 3}
"""{widget: the inner node that has it}: Mix (3) with "inner" and 7, Number (4) with 1."""
ON_NODE = ["outer", 5, 4]
KINDS = {"text": "STRING", "seed": "INT", "n": "INT"}


def inner_nodes() -> dict[int, dict[str, Any]]:
    return {
        3: node(3, "Mix", ["mul", "inner", False, 7], {"a": 50}),
        4: node(4, "Number", [1, "fixed", 2.5]),
        8: node(8, "Mix", ["add", "second", True, 2]),
    }


def definition(name: str, nodes: dict[int, Any], targets: dict[str, list[int]]) -> dict[str, Any]:
    """A subgraph whose inputs lead to the widgets of the same name of these nodes."""
    links: list[Any] = [{"id": 50, "origin_id": -10, "origin_slot": 0, "target_id": 3, "target_slot": 0}]
    inputs: list[dict[str, Any]] = [{"name": "a", "type": "NUM", "linkIds": [50]}]
    for slot, (widget, ends) in enumerate(targets.items(), 1):
        inputs.append({"name": widget, "type": KINDS[widget], "linkIds": []})
        for end in ends:
            number, at = 51 + len(links), len(nodes[end]["inputs"])
            nodes[end]["inputs"].append(
                {"name": widget, "type": KINDS[widget], "link": number, "widget": {"name": widget}}
            )
            links.append(
                {"id": number, "origin_id": -10, "origin_slot": slot, "target_id": end, "target_slot": at}
            )
            inputs[-1]["linkIds"].append(number)
    return {
        "id": name,
        "name": name,
        "inputs": inputs,
        "outputs": [],
        "nodes": list(nodes.values()),
        "links": links,
    }


def use(
    number: int, kind: str, values: Any, listed: tuple[str, ...] = (), **properties: Any
) -> dict[str, Any]:
    """A node of a subgraph that lists these widgets as inputs."""
    found = node(number, kind, [], {"a": None}, properties=properties)
    found["widgets_values"] = copy.deepcopy(values)
    found["inputs"] += [
        {"name": name, "type": KINDS[name], "link": None, "widget": {"name": name}} for name in listed
    ]
    return found


def plan(
    *uses: dict[str, Any],
    order: tuple[str, ...] = ("text", "seed", "n"),
    nodes: Any = None,
    **targets: list[int],
) -> dict[str, Any]:
    """A graph of uses of one subgraph with the inputs `order`."""
    ends = {name: targets.get(name, [WIDGETS[name]]) for name in order}
    subgraphs = [definition("plan", nodes or inner_nodes(), ends)]
    return graph(list(uses), [], definitions={"subgraphs": subgraphs})


def nested(outer: Any, middle: Any = ("middle", 8, 9), **properties: Any) -> dict[str, Any]:
    """The subgraph inside another; the node between them holds `middle`."""
    held = list(middle) if isinstance(middle, tuple) else middle
    document = plan(use(30, "around", outer, **properties))
    inside = {3: use(3, "plan", held, ())}
    ends = {name: [3] for name in WIDGETS}
    document["definitions"]["subgraphs"].append(definition("around", inside, ends))
    return document


def values_of(document: dict[str, Any], prefix: str = "30:") -> list[Any]:
    """[text, seed, n] of the three inner widgets in the prompt."""
    prompt = prompt_of(document)
    return [prompt[f"{prefix}{WIDGETS[name]}"]["inputs"][name] for name in ("text", "seed", "n")]


QUARANTINE = {"originalEntry": ["-1", "seed"], "reason": "missingSubgraphInput", "hostValue": 77}
LISTED = [["3", "text"], ["4", "seed"], ["3", "n"]]


@pytest.mark.parametrize("listed", [(), ("seed",), ("n", "text"), ("text", "seed", "n")])
@pytest.mark.parametrize(
    ("values", "right"),
    [
        (ON_NODE, ON_NODE),
        ([*ON_NODE, 99], ON_NODE),
        (["outer"], ["outer", 1, 7]),
        ([], ["inner", 1, 7]),
        (None, ["inner", 1, 7]),
        (["outer", None, 4], ["outer", None, 4]),
        ({"text": "outer"}, ["inner", 1, 7]),
    ],
)
def test_values_belong_to_the_definitions_widgets_in_order(listed: Any, values: Any, right: Any) -> None:
    assert values_of(plan(use(30, "plan", values, listed))) == right


def test_the_order_is_the_definitions() -> None:
    document = plan(use(30, "plan", [5, "outer", 4], ("seed",)), order=("seed", "text", "n"))
    assert values_of(document) == ON_NODE


def test_every_use_has_its_own_values() -> None:
    document = plan(use(30, "plan", ON_NODE), use(31, "plan", ["other", 6, 3]), use(32, "plan", []))
    assert values_of(document) == ON_NODE and values_of(document, "31:") == ["other", 6, 3]
    assert values_of(document, "32:") == ["inner", 1, 7]


@pytest.mark.parametrize(
    ("outer", "middle", "right"),
    [
        (ON_NODE, ("middle", 8, 9), ON_NODE),
        (["outer"], ("middle", 8, 9), ["outer", 8, 9]),
        ([], ("middle", 8, 9), ["middle", 8, 9]),
        ([], ("middle",), ["middle", 1, 7]),
        (None, None, ["inner", 1, 7]),
    ],
)
def test_the_outermost_value_of_nested_subgraphs_counts(outer: Any, middle: Any, right: Any) -> None:
    assert values_of(nested(outer, middle), "30:3:") == right


def test_an_input_may_lead_to_several_widgets() -> None:
    document = plan(use(30, "plan", ON_NODE), text=[8, 3])
    assert values_of(document) == ON_NODE and prompt_of(document)["30:8"]["inputs"]["text"] == "outer"
    document = plan(use(30, "plan", []), text=[8, 3])
    assert values_of(document)[0] == "second", "the first one's value is shown"


@pytest.mark.parametrize(
    ("values", "properties", "right"),
    [
        (ON_NODE, {"proxyWidgets": LISTED}, ON_NODE),
        (ON_NODE, {"proxyWidgets": json.dumps(LISTED)}, ON_NODE),
        ([4, 5, "outer"], {"proxyWidgets": LISTED[::-1]}, ON_NODE),
        ([4, 5, "outer"], {"proxyWidgets": [["-1", "n"], ["-1", "seed"], ["-1", "text"]]}, ON_NODE),
        (["lost", *ON_NODE], {"proxyWidgets": [["99", "x"], *LISTED]}, ON_NODE),
        (["lost", *ON_NODE], {"proxyWidgets": [["4", "$$canvas-image-preview"], *LISTED]}, ON_NODE),
        (ON_NODE, {"proxyWidgets": [["3", "9: 8: text"], *LISTED[1:]]}, ON_NODE),
        (ON_NODE, {"proxyWidgets": [["3", "text"], ["4"], 5]}, ON_NODE),
        (ON_NODE, {"proxyWidgetErrorQuarantine": [QUARANTINE]}, ["outer", 77, 4]),
        (ON_NODE, {"proxyWidgetErrorQuarantine": [{**QUARANTINE, "originalEntry": ["4", "seed"]}]}, ON_NODE),
        (ON_NODE, {"previewExposures": [{"sourceNodeId": "4", "sourcePreviewName": "$$x"}]}, ON_NODE),
    ],
)
def test_values_of_older_files(values: Any, properties: Any, right: Any) -> None:
    assert values_of(plan(use(30, "plan", values, **properties))) == right


def test_a_listed_widget_that_no_input_leads_to() -> None:
    document = plan(use(30, "plan", [*ON_NODE, 0.5], proxyWidgets=[*LISTED, ["4", "scale"]]))
    assert values_of(document) == ON_NODE and prompt_of(document)["30:4"]["inputs"]["scale"] == 0.5
    document = nested([9], middle=(), proxyWidgets=[["3", "n"]])
    assert values_of(document, "30:3:") == [9, 1, 9], "the first value counts twice, as in the editor"


def primitive(document: dict[str, Any], value: Any, number: int = 40, **more: Any) -> dict[str, Any]:
    """The graph with a PrimitiveNode wired to the widget input `text` of node 30."""
    found = node(number, "PrimitiveNode", [value], **more)
    document["nodes"].append(found)
    slots = document["nodes"][0]["inputs"]
    slots[1]["link"] = 1
    document["links"] = [[1, number, 0, 30, 1, "STRING"]]
    return document


def test_a_primitive_wired_to_a_subgraph_gives_the_value_inside() -> None:
    document = primitive(plan(use(30, "plan", ON_NODE, ("text", "seed", "n"))), "wired")
    assert values_of(document) == ["inner", 5, 4]


@pytest.mark.parametrize("mode", [0, 2, 4])
def test_a_primitive_sets_the_widget_that_it_is_wired_to(mode: int) -> None:
    mix = node(30, "Mix", ["add"], {"a": None, "text": None})
    mix["inputs"][1]["widget"] = {"name": "text"}
    document = primitive(graph([mix], []), "wired", mode=mode)
    assert prompt_of(document)["30"]["inputs"]["text"] == "wired"
    document["nodes"].append(node(41, "Reroute", [], {"": 1}))
    document["links"] = [[1, 40, 0, 41, 0, "*"], [2, 41, 0, 30, 1, "*"]]
    mix["inputs"][1]["link"] = 2
    assert prompt_of(document)["30"]["inputs"]["text"] == "-", "a reroute lies between them"


@pytest.mark.parametrize(
    ("widget", "options", "value", "right"),
    [
        ("FLOAT", {"step": 0.1, "max": 30}, 2.25, 2.3),
        ("FLOAT", {"step": 0.1, "max": 30}, 2.24, 2.2),
        ("FLOAT", {"step": 0.1, "max": 30}, -5.0, 0),
        ("FLOAT", {"step": 0.1, "max": 30}, 1e9, 30),
        ("INT", {"step": 32, "min": 32, "max": 8192}, 100.7, 96),
        ("INT", {"step": 32, "min": 32, "max": 8192}, 131, 128),
        ("INT", {"step": 32, "min": 32, "max": 8192}, "99", 96),
        ("INT", {"step": 32, "min": 32, "max": 8192}, 1e9, 8192),
        ("INT", {"max": 2**64 - 1}, 2**60 + 1, 2**60 + 1),
        ("STRING", {}, 3, 3),
    ],
)
def test_a_primitives_number_is_rounded_as_its_widget_does(
    widget: str, options: dict[str, Any], value: Any, right: Any
) -> None:
    info = {"Take": {"input": {"required": {"n": [widget, options]}}, "display_name": "Take"}}
    taker = node(30, "Take", [0], {"first": None, "n": None})
    document = primitive(graph([taker], []), value)
    assert to_prompt(Document(document, None), info)["30"]["inputs"]["n"] == right


def test_a_list_as_a_value_is_no_wire() -> None:
    document = graph([node(1, "Number", [["4", 0], "fixed", 1.0])], [])
    assert prompt_of(document)["1"]["inputs"]["seed"] == {"__value__": ["4", 0]}
    assert values_of(plan(use(30, "plan", [["4", 0]])))[0] == {"__value__": ["4", 0]}


# --set


def apply(document: dict[str, Any], *settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(prompt, graph) after these settings; the graph converts to this prompt."""
    found = apply_settings(Document(document, None), list(settings), INFO)
    assert found.prompt is not None and found.graph is not None
    assert to_prompt(Document(found.graph, None), INFO) == found.prompt
    return found.prompt, found.graph


@pytest.mark.parametrize("values", [ON_NODE, ["outer"], [], None])
@pytest.mark.parametrize("listed", [(), ("seed",)])
def test_a_setting_is_written_on_the_subgraphs_node(values: Any, listed: Any) -> None:
    document = plan(use(30, "plan", values, listed), use(31, "plan", values, listed))
    before = values_of(document)
    _, after = apply(document, "30:4.seed=9")
    assert after["nodes"][0]["widgets_values"][1] == 9
    assert values_of(after) == [before[0], 9, before[2]] and values_of(after, "31:") == before
    _, again = apply(after, "30:4.seed=11")
    assert values_of(again)[1] == 11 and again["definitions"] == document["definitions"]


def test_a_setting_of_a_nested_subgraph_is_written_outside() -> None:
    _, after = apply(nested([]), "seed=9")
    assert after["nodes"][0]["widgets_values"] == ["middle", 9]
    assert values_of(after, "30:3:") == ["middle", 9, 9]


def test_a_setting_of_an_older_file() -> None:
    document = plan(use(30, "plan", ON_NODE, proxyWidgetErrorQuarantine=[dict(QUARANTINE)]))
    assert values_of(apply(document, "seed=9")[1]) == ["outer", 9, 4]
    document = plan(use(30, "plan", [*ON_NODE, 0.5], proxyWidgets=[*LISTED, ["4", "scale"]]))
    assert apply(document, "seed=9", "scale=1")[1]["nodes"][0]["widgets_values"] == ["outer", 9, 4, 1.0]
    with pytest.raises(
        WorkflowError, match=r"^--set n: node 30:3:3 shares this value with text of node 30:3:3"
    ):
        apply(nested([9], middle=(), proxyWidgets=[["3", "n"]]), "30:3:3.n=5")


def test_a_setting_that_would_change_another_widget_is_refused() -> None:
    document = plan(use(30, "plan", ON_NODE), text=[8, 3])
    with pytest.raises(
        WorkflowError, match=r"^--set text: node 30:3 shares this value with text of node 30:8; "
    ):
        apply(document, "30:3.text=new")


# Limits


def tower(levels: int, uses: int) -> dict[str, Any]:
    """Subgraphs, `uses` of the next in each of `levels`."""
    subgraphs = [
        {
            "id": f"level {level}",
            "nodes": [node(n, f"level {level + 1}" if level < levels else "Number") for n in range(uses)],
            "links": [
                {"id": n, "origin_id": -10, "origin_slot": 0, "target_id": n, "target_slot": 0}
                for n in range(uses)
            ],
            "inputs": [{"name": "seed", "linkIds": list(range(uses))}],
        }
        for level in range(1, levels + 1)
    ]
    for subgraph in subgraphs:
        for inner in subgraph["nodes"]:
            inner["inputs"] = [{"name": "seed", "link": inner["id"]}]
    return graph([node(1, "level 1", [5])], [], definitions={"subgraphs": subgraphs})


@pytest.mark.parametrize(("levels", "uses"), [(12, 10), (45, 2), (51, 1), (5000, 1), (3, 100)])
def test_subgraphs_inside_one_another_end(levels: int, uses: int) -> None:
    with pytest.raises(WorkflowError, match="too large|too deeply"):
        prompt_of(tower(levels, uses))


def test_deep_subgraphs_within_the_limit_run() -> None:
    prompt = prompt_of(tower(40, 1))
    assert [entry["inputs"]["seed"] for entry in prompt.values()] == [5]


@pytest.mark.parametrize("key", ["inputs", "outputs"])
def test_a_node_with_too_many_slots_is_refused(key: str) -> None:
    document = graph([node(1, "Number")], [])
    document["nodes"][0][key] = [{"name": str(n), "link": None} for n in range(251)]
    with pytest.raises(WorkflowError, match="more than 250"):
        prompt_of(document)


def test_messages_are_one_short_line() -> None:
    document = graph([node(n, "Unknown\n" * 10_000) for n in range(500)], [])  # type: ignore[arg-type]
    with pytest.raises(WorkflowError) as caught:
        prompt_of(document)
    assert (
        len(str(caught.value)) <= 2000 and "\n" not in str(caught.value) and "480 more" in str(caught.value)
    )
