"""Workflow files to prompts. The class table is written out here, to read every expected prompt off it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rectiflux.host.workflow import Document, WorkflowError, apply_settings, read_document, to_prompt

SEED = ["INT", {"default": 0, "control_after_generate": True}]
INFO: dict[str, dict[str, Any]] = {
    "Number": {
        "input": {"required": {"seed": SEED, "scale": ["FLOAT", {"default": 1.5}]}},
        "display_name": "A Number",
    },
    "Mix": {
        "input": {
            "required": {
                "a": ["NUM", {}],
                "mode": [["add", "mul"], {}],
                "text": ["STRING", {"default": "-"}],
            },
            "optional": {
                "b": ["NUM", {}],
                "flag": ["BOOLEAN", {"default": False}],
                "n": ["INT", {"default": 4}],
            },
        },
        "display_name": "Mix",
    },
    "Load": {"input": {"required": {"image": [["x.png"], {"image_upload": True}]}}, "display_name": "Load"},
}


def graph(nodes: list[dict[str, Any]], links: list[Any], **more: Any) -> dict[str, Any]:
    return {"nodes": nodes, "links": links, "version": 0.4, **more}


def node(number: int, kind: str, values: Any = (), wires: dict[str, int] | None = None, **more: Any) -> Any:
    """A saved node; `wires` {input: link id}, in the order of its sockets. All sockets are NUM."""
    inputs = [{"name": name, "type": "NUM", "link": link} for name, link in (wires or {}).items()]
    values = values if isinstance(values, dict) else list(values)
    outputs = [{"name": "out", "type": "NUM", "links": []}]
    return {
        "id": number,
        "type": kind,
        "inputs": inputs,
        "outputs": outputs,
        "widgets_values": values,
        **more,
    }


def prompt_of(document: dict[str, Any]) -> dict[str, Any]:
    """The prompt without titles."""
    prompt = to_prompt(Document(document, None), INFO)
    return {key: {"class_type": n["class_type"], "inputs": n["inputs"]} for key, n in prompt.items()}


def pair(**second: Any) -> dict[str, Any]:
    """Number (1) wired into Mix (2)."""
    return graph(
        [
            node(1, "Number", [7, "fixed", 2.5]),
            {**node(2, "Mix", ["mul", "hi", True, 9], {"a": 1}), **second},
        ],
        [[1, 1, 0, 2, 0, "NUM"]],
    )


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


def chain(mode: int) -> dict[str, Any]:
    """Number (1) -> Mix (2, in this mode) -> Mix (3)."""
    return graph(
        [
            node(1, "Number", [7, "fixed", 2.5]),
            node(2, "Mix", ["add"], {"a": 1}, mode=mode),
            node(3, "Mix", ["mul"], {"a": 2}),
        ],
        [[1, 1, 0, 2, 0, "NUM"], [2, 2, 0, 3, 0, "NUM"]],
    )


def test_a_bypassed_node_hands_its_input_through() -> None:
    prompt = prompt_of(chain(4))
    assert prompt.keys() == {"1", "3"} and prompt["3"]["inputs"]["a"] == ["1", 0]


def test_a_muted_node_takes_its_wires_with_it() -> None:
    prompt = prompt_of(chain(2))
    assert prompt.keys() == {"1", "3"} and "a" not in prompt["3"]["inputs"]


def subgraph(instance_values: list[Any] | None = None, **properties: Any) -> dict[str, Any]:
    """Number (1) -> subgraph (5): Mix (3), its text promoted -> Mix (2)."""
    inner = node(3, "Mix", ["mul", "inner", False, 1], {"a": 1, "text": 2})
    inner["inputs"][1]["widget"] = {"name": "text"}
    definition = {
        "id": "uuid",
        "name": "Group",
        "inputs": [{"name": "a"}, {"name": "words"}],
        "outputs": [{"name": "out"}],
        "nodes": [inner],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 3, "target_slot": 0},
            {"id": 2, "origin_id": -10, "origin_slot": 1, "target_id": 3, "target_slot": 1},
            {"id": 3, "origin_id": 3, "origin_slot": 0, "target_id": -20, "target_slot": 0},
        ],
    }
    instance = node(5, "uuid", instance_values or [], {"a": 1, "words": None}, properties=properties)
    instance["inputs"][1]["widget"] = {"name": "words"}
    return graph(
        [node(1, "Number", [7, "fixed", 2.5]), instance, node(2, "Mix", ["add"], {"a": 2})],
        [[1, 1, 0, 5, 0, "NUM"], [2, 5, 0, 2, 0, "NUM"]],
        definitions={"subgraphs": [definition]},
    )


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


# Reading files


def saved(tmp_path: Path, content: str | bytes, name: str = "w.json") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


API = {"1": {"class_type": "Number", "inputs": {"seed": 7, "scale": 2.5}}}


def png(tmp_path: Path, **texts: Any) -> Path:
    info = PngInfo()
    for name, value in texts.items():
        info.add_text(name, value if isinstance(value, str) else json.dumps(value))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "w.png", pnginfo=info)
    return tmp_path / "w.png"


def test_reads_the_editors_and_the_api_format(tmp_path: Path) -> None:
    assert read_document(saved(tmp_path, json.dumps(pair()))) == Document(pair(), None)
    assert read_document(saved(tmp_path, json.dumps(API))) == Document(None, API)
    assert read_document(saved(tmp_path, json.dumps({"prompt": API, "client_id": "x"}))) == Document(
        None, API
    )
    assert read_document(saved(tmp_path, b"\xef\xbb\xbf" + json.dumps(API).encode())) == Document(None, API)


def test_a_png_gives_the_prompt_that_made_it_and_the_graph(tmp_path: Path) -> None:
    found = read_document(png(tmp_path, prompt=API, workflow=pair()))
    assert found == Document(pair(), API)
    assert to_prompt(found, INFO) == API
    assert read_document(png(tmp_path, workflow=pair())) == Document(pair(), None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00junk", "is neither JSON nor a PNG"),
        (json.dumps(pair())[:-40].encode(), "is not valid JSON (line 1, column"),
        (b"[1, 2]", "holds no workflow: neither the editor's format"),
        (b"{}", "holds no workflow"),
        (b'{"1": {"class_type": "Number", "inputs": []}}', "is damaged: a node's inputs"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_files_that_are_no_workflow(tmp_path: Path, content: bytes, says: str) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(WorkflowError) as caught:
        read_document(path)
    assert str(caught.value).startswith(f"{path} ") and says in str(caught.value)


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match="^there is no file .*nowhere.json$"):
        read_document(tmp_path / "nowhere.json")
    with pytest.raises(WorkflowError, match="is a folder; name a workflow's .json or a picture's .png"):
        read_document(tmp_path)


def test_pngs_cut_short_damaged_or_without_a_workflow(tmp_path: Path) -> None:
    path = png(tmp_path, prompt=API)
    whole = path.read_bytes()
    for part in (whole[:20], whole[: len(whole) // 2], whole[:-15], whole[:60] + b"XX" + whole[62:]):
        path.write_bytes(part)
        with pytest.raises(WorkflowError, match="is a damaged PNG, perhaps cut short"):
            read_document(path)
    with pytest.raises(WorkflowError, match="carries no workflow"):
        read_document(png(tmp_path))
    with pytest.raises(WorkflowError, match=r"w.png \(workflow\) is not valid JSON"):
        read_document(png(tmp_path, workflow='{"nodes": ['))


def test_a_set_widget_that_is_newer_than_the_file_leaves_no_holes_before_it() -> None:
    _, after = settle(pair(widgets_values=["mul"]), "n=3")
    assert after["nodes"][1]["widgets_values"] == ["mul", "-", False, 3]


# --set


def settle(document: dict[str, Any], *settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(prompt inputs by node, graph) after these settings."""
    found = apply_settings(Document(document, None), list(settings), INFO)
    assert found.prompt is not None and found.graph is not None
    return {key: value["inputs"] for key, value in found.prompt.items()}, found.graph


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
        ("mode=div", "--set mode: 'div' is not in its list: add, mul"),
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
