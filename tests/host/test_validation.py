"""Every way in which a prompt can be invalid, reported on the right node before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.validation import InvalidPrompt, order, validate


def refused(prompt: Any, registry: Registry, node: str, kind: str) -> str:
    """The message with which `node`, and no other, is refused."""
    with pytest.raises(InvalidPrompt) as caught:
        validate(prompt, registry)
    assert list(caught.value.node_errors) == [node]
    entry = caught.value.node_errors[node]
    (found,) = entry["errors"]
    assert found["type"] == kind and entry["dependent_outputs"] == ["5"]
    assert entry["class_type"] == prompt[node]["class_type"]
    return found["details"]


def test_a_valid_prompt_is_ordered_and_its_values_converted(prompts: Any, registry: Registry) -> None:
    prompt = prompts.image("2", 3.0)
    checked = validate(prompt, registry)
    assert checked.outputs == ["5"] and checked.node_errors == {}
    assert checked.prompt["1"]["inputs"]["value"] == 2 and type(checked.prompt["2"]["inputs"]["value"]) is int
    assert prompt["1"]["inputs"]["value"] == "2", "the caller's prompt was changed"
    found = order(checked.prompt, checked.outputs)
    assert sorted(found) == ["1", "2", "3", "4", "5"]
    assert found.index("3") > max(found.index("1"), found.index("2")) and found[-2:] == ["4", "5"]


@pytest.mark.parametrize(
    ("widget", "value", "kind", "message"),
    [
        ("value", -1, "value_smaller_than_min", "value must be at least 0, got -1"),
        ("value", 11, "value_bigger_than_max", "value must be at most 10, got 11"),
        ("value", 1.5, "invalid_input_type", "value must be an integer, got 1.5"),
        ("value", None, "invalid_input_type", "value must be an integer, got None"),
        ("scale", 0.1, "value_smaller_than_min", "scale must be at least 0.5, got 0.1"),
        ("scale", float("nan"), "invalid_input_type", "scale must be a number, got nan"),
        ("scale", "wide", "invalid_input_type", "scale must be a number, got 'wide'"),
        ("mode", "italic", "value_not_in_list", "mode: 'italic' is not one of plain, bold"),
        ("sure", "false", "invalid_input_type", "sure must be true or false, got 'false'"),
    ],
)
def test_a_widget_out_of_bounds(
    prompts: Any, registry: Registry, widget: str, value: Any, kind: str, message: str
) -> None:
    prompt = prompts.image()
    prompt["1"]["inputs"][widget] = value
    assert refused(prompt, registry, "1", kind) == message


@pytest.mark.parametrize(
    ("options", "value", "message"),
    [
        ({"min": 16, "max": 64, "step": 16}, 40, "side must be a multiple of 16, got 40; "),
        ({"min": 5, "step": 10}, 26, "side must be 5 plus a multiple of 10, got 26; "),
        ({"min": 5, "step": 10}, 25, None),
        ({"step": 2}, -4, None),
    ],
)
def test_an_integer_must_match_its_widgets_step(
    folders: Folders, options: dict[str, Any], value: int, message: str | None
) -> None:
    class Sized:
        RETURN_TYPES = ()
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"side": ("INT", options)}}

    registry = Registry({"Sized": Sized}, {}, folders)
    prompt = {"5": {"class_type": "Sized", "inputs": {"side": value}}}
    if message is None:
        assert validate(prompt, registry).outputs == ["5"]
    else:
        assert refused(prompt, registry, "5", "custom_validation_failed").startswith(message)


def test_missing_inputs(prompts: Any, registry: Registry) -> None:
    prompt = prompts.image()
    del prompt["3"]["inputs"]["b"]  # an optional one
    assert validate(prompt, registry).outputs == ["5"]
    del prompt["3"]["inputs"]["a"]
    assert "wire of type NUMBER" in refused(prompt, registry, "3", "required_input_missing")
    prompt = prompts.image()
    del prompt["1"]["inputs"]["scale"]
    assert refused(prompt, registry, "1", "required_input_missing").startswith("scale has no value")


@pytest.mark.parametrize(
    ("node", "link", "kind", "message"),
    [
        ("3", ["99", 0], "bad_linked_input", "a is connected to node 99, which does not exist"),
        ("3", ["1", 1], "bad_linked_input", "a is connected to output 1 of node 1, which has 1"),
        ("3", ["1"], "bad_linked_input", "a must be a wire [node, output], got ['1']"),
        ("3", 5, "invalid_input_type", "a must be a wire of type NUMBER, got 5"),
        ("5", ["3", 1], "return_type_mismatch", "images must be IMAGE, but output 1 of node 3 is TEXT"),
    ],
)
def test_a_wrong_wire(
    prompts: Any, registry: Registry, node: str, link: Any, kind: str, message: str
) -> None:
    prompt = prompts.image()
    prompt[node]["inputs"]["images" if node == "5" else "a"] = link
    assert refused(prompt, registry, node, kind).startswith(message)


def test_a_cycle_is_reported_on_all_its_nodes(prompts: Any, registry: Registry) -> None:
    prompt = prompts.image()
    prompt["6"] = {"class_type": "Add", "inputs": {"a": ["3", 0]}}
    prompt["3"]["inputs"]["a"] = ["6", 0]
    with pytest.raises(InvalidPrompt) as caught:
        validate(prompt, registry)
    assert sorted(caught.value.node_errors) == ["3", "6"]
    for entry in caught.value.node_errors.values():
        assert [found["type"] for found in entry["errors"]] == ["dependency_cycle"]


def test_a_long_chain_needs_no_recursion(prompts: Any, registry: Registry) -> None:
    prompt = prompts.image()
    for index in range(100, 3100):
        prompt[str(index)] = {"class_type": "Add", "inputs": {"a": [str(index - 1), 0]}}
    prompt["100"]["inputs"]["a"] = ["1", 0]
    prompt["4"]["inputs"]["number"] = ["3099", 0]
    assert validate(prompt, registry).outputs == ["5"]


def test_an_unknown_node(prompts: Any, registry: Registry) -> None:
    prompt = prompts.image()
    prompt["3"] = {"class_type": "KSampler", "inputs": {}, "_meta": {"title": "My Sampler"}}
    with pytest.raises(InvalidPrompt, match="node 3 is a KSampler, which is not installed here") as caught:
        validate(prompt, registry)
    assert caught.value.error["type"] == "missing_node_type"
    extra = {"node_id": "3", "class_type": "KSampler", "node_title": "My Sampler"}
    assert caught.value.error["extra_info"] == extra


@pytest.mark.parametrize("prompt", [None, [], {}, {"1": []}, {"1": {"class_type": "Number", "inputs": []}}])
def test_malformed_prompts(prompt: Any, registry: Registry) -> None:
    with pytest.raises(InvalidPrompt) as caught:
        validate(prompt, registry)
    assert caught.value.error["type"] == "invalid_prompt"


def test_valid_outputs_run_although_another_is_invalid(prompts: Any, registry: Registry) -> None:
    prompt = prompts.image()
    prompt["6"] = {"class_type": "PreviewImage", "inputs": {}}
    checked = validate(prompt, registry)
    assert checked.outputs == ["5"]
    assert checked.node_errors["6"]["dependent_outputs"] == ["6"]


def test_targets_select_the_outputs(prompts: Any, registry: Registry) -> None:
    prompt = prompts.image()
    prompt["6"] = {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}
    assert validate(prompt, registry).outputs == ["5", "6"]
    assert validate(prompt, registry, ["6"]).outputs == ["6"]
    with pytest.raises(InvalidPrompt) as caught:
        validate(prompt, registry, ["4"])
    assert caught.value.error["type"] == "prompt_no_outputs"


def test_a_node_validates_its_own_values(registry: Registry, folders: Folders) -> None:
    Image.new("RGB", (4, 4)).save(folders.output / "made.png")
    (folders.user / "secret.png").write_bytes(b"x")

    def prompt(name: str) -> dict[str, Any]:
        return {
            "1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "5": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }

    assert validate(prompt("made.png [output]"), registry).outputs == ["5"]
    for name in ("made.png", "../user/secret.png", "../user/secret.png [output]"):
        assert name in refused(prompt(name), registry, "1", "custom_validation_failed")


# Large and malformed prompts


def chain(count: int, first: Any = "text") -> dict[str, Any]:
    """Preview nodes, each wired to the one before it."""
    sources = [first, *([str(index), 0] for index in range(count - 1))]
    return {
        str(index): {"class_type": "PreviewAny", "inputs": {"source": source}}
        for index, source in enumerate(sources)
    }


def test_a_long_chain_of_outputs_is_validated_in_linear_time(registry: Registry) -> None:
    assert len(validate(chain(5_000), registry).outputs) == 5_000
    with pytest.raises(InvalidPrompt) as caught:
        validate(chain(5_000, first=["lost", 0]), registry)
    (entry,) = caught.value.node_errors.values()
    assert entry["dependent_outputs"] == [str(index) for index in range(20)], "the first twenty"


def test_many_errors_give_a_short_answer(registry: Registry) -> None:
    for prompt in (
        chain(3_000, first=["2999", 0]),
        {**chain(3_000), "0": chain(1, first=["lost", 0])["0"]},
    ):
        for node in prompt.values():
            if isinstance(source := node["inputs"]["source"], list):
                source[1] = 7
        with pytest.raises(InvalidPrompt) as caught:
            validate(prompt, registry)
        assert len(caught.value.node_errors) == 3_000 and len(caught.value.sentences()) == 51
        assert len(str(caught.value)) < 20_000 and len(caught.value.error["details"]) < 20_000


def test_outputs_beside_a_cycle_run(registry: Registry, prompts: Any) -> None:
    prompt = prompts.image() | {
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["9", 0]}},
        "9": {"class_type": "PreviewAny", "inputs": {"source": ["8", 0]}},
        "10": {"class_type": "PreviewAny", "inputs": {"source": ["9", 0]}},
    }
    checked = validate(prompt, registry)
    assert checked.outputs == ["5"] and checked.node_errors.keys() == {"8", "9"}
    assert checked.node_errors["8"]["dependent_outputs"] == ["8", "9", "10"]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({str(n): {} for n in range(10_001)}, "too many nodes: the limit is 10,000, got 10,001"),
        ({"x" * 1001: {}}, "a node's id must have at most 1000 characters, got 'xxx"),
        ({"a\nb": 5}, "node a b is not an object"),
        ({"1": {"class_type": "Nope\n" * 9999}}, "node 1 is a Nope Nope"),
        ({"1": {"class_type": ["Add"] * 9999}}, "node 1 is a ['Add', 'Add'"),
        ({"1": {"class_type": None}}, "node 1 is a None"),
    ],
)
def test_a_malformed_prompt_is_refused_in_one_short_line(prompt: Any, says: str, registry: Registry) -> None:
    with pytest.raises(InvalidPrompt) as caught:
        validate(prompt, registry)
    message = caught.value.error["message"]
    assert says in message and len(message) < 400 and "\n" not in message


@pytest.mark.parametrize(
    "value", [{}, {"a": "b" * 9999}, [1, 2, 3], {"__value__": ["1", 0]}, "x\n" * 9999, 10**400]
)
@pytest.mark.parametrize("widget", ["value", "scale", "mode", "sure"])
def test_a_value_of_any_kind_is_refused_in_one_short_line(
    value: Any, widget: str, registry: Registry, prompts: Any
) -> None:
    prompt = prompts.image()
    prompt["1"]["inputs"][widget] = value
    with pytest.raises(InvalidPrompt) as caught:
        validate(prompt, registry)
    (found,) = caught.value.node_errors["1"]["errors"]
    assert (
        found["details"].startswith(widget) and len(found["details"]) < 400 and "\n" not in found["details"]
    )


@pytest.mark.parametrize(
    ("value", "says"),
    [(None, "got None"), ({"a": 1}, "got {'a': 1}"), ({"__value__": [1]}, "must be a single STRING")],
)
def test_text_is_no_table_and_not_null(value: Any, says: str, registry: Registry, prompts: Any) -> None:
    prompt = prompts.image()
    prompt["1"]["inputs"]["label"] = value
    assert says in refused(prompt, registry, "1", "invalid_input_type")


@pytest.mark.parametrize(
    "name", [5, 1.5, True, "", "x" * 300, "a/" * 2000, "\0", "\ud83d", "x.png [nowhere]", "../x.png", "CON"]
)
def test_an_image_name_of_any_kind_is_refused(name: Any, registry: Registry, prompts: Any) -> None:
    prompt = {"1": {"class_type": "LoadImage", "inputs": {"image": name}}} | {
        "5": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}}
    }
    details = refused(prompt, registry, "1", "custom_validation_failed")
    assert "image" in details and len(details) <= 1000 and "\n" not in details


@pytest.mark.parametrize("prefix", ["", "..", "\0", "x" * 300, "a\n/../../b", "\ud83d", "/etc/x"])
def test_a_prefix_of_any_kind_is_refused(prefix: Any, registry: Registry, prompts: Any) -> None:
    prompt = prompts.image()
    prompt["5"]["inputs"]["filename_prefix"] = prefix
    details = refused(prompt, registry, "5", "custom_validation_failed")
    assert "\n" not in details and len(details) < 400


def test_node_ids_of_any_kind_run(registry: Registry, prompts: Any) -> None:
    for name in ("ü🦊", "__proto__", " ", "a\nb", "\ud83d", "%s{}", "-10", "1:2:3", "x" * 1000):
        prompt = prompts.image()
        prompt[name] = prompt.pop("3")
        prompt["4"]["inputs"]["number"] = [name, 0]
        checked = validate(prompt, registry)
        assert name in order(checked.prompt, checked.outputs)
