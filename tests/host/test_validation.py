"""Every way in which a prompt can be wrong, told on the right node before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.validation import InvalidPrompt, _check_value, order, validate


def refused(prompt: Any, registry: Registry, node: str, kind: str) -> str:
    """The sentence with which `node`, and no other, is refused."""
    with pytest.raises(InvalidPrompt) as caught:
        validate(prompt, registry)
    assert list(caught.value.node_errors) == [node]
    (found,) = caught.value.node_errors[node]["errors"]
    assert found["type"] == kind
    assert caught.value.node_errors[node]["dependent_outputs"] == ["5"]
    assert caught.value.node_errors[node]["class_type"] == prompt[node]["class_type"]
    return found["details"]


def test_a_sound_prompt_is_ordered_and_typed(prompts: Any, registry: Registry) -> None:
    prompt = prompts.picture("2", 3.0)
    checked = validate(prompt, registry)
    assert checked.outputs == ["5"] and checked.node_errors == {}
    assert checked.prompt["1"]["inputs"]["value"] == 2 and type(checked.prompt["2"]["inputs"]["value"]) is int
    assert prompt["1"]["inputs"]["value"] == "2", "the caller's prompt was changed"
    found = order(checked.prompt, checked.outputs)
    assert sorted(found) == ["1", "2", "3", "4", "5"]
    assert found.index("3") > max(found.index("1"), found.index("2")) and found[-2:] == ["4", "5"]


@pytest.mark.parametrize(
    ("widget", "value", "kind", "sentence"),
    [
        ("value", -1, "value_smaller_than_min", "value must be at least 0, got -1"),
        ("value", 11, "value_bigger_than_max", "value must be at most 10, got 11"),
        ("value", 1.5, "invalid_input_type", "value must be a whole number, got 1.5"),
        ("value", None, "invalid_input_type", "value must be a whole number, got None"),
        ("scale", 0.1, "value_smaller_than_min", "scale must be at least 0.5, got 0.1"),
        ("scale", float("nan"), "invalid_input_type", "scale must be a number, got nan"),
        ("scale", "wide", "invalid_input_type", "scale must be a number, got 'wide'"),
        ("mode", "italic", "value_not_in_list", "mode: 'italic' is not in its list, which has plain, bold"),
        ("sure", "false", "invalid_input_type", "sure must be true or false, got 'false'"),
    ],
)
def test_a_widget_out_of_bounds(
    prompts: Any, registry: Registry, widget: str, value: Any, kind: str, sentence: str
) -> None:
    prompt = prompts.picture()
    prompt["1"]["inputs"][widget] = value
    assert refused(prompt, registry, "1", kind) == sentence


@pytest.mark.parametrize(
    ("options", "value", "says"),
    [
        ({"min": 16, "max": 64, "step": 16}, 40, ["side must be a multiple of 16, got 40; 32 is near"]),
        ({"min": 5, "step": 10}, 26, ["side must be in steps of 10 from 5, got 26; 25 is near"]),
        ({"min": 5, "step": 10}, 25, []),
        ({"step": 2}, -4, []),
    ],
)
def test_a_whole_number_between_two_steps(options: dict[str, Any], value: int, says: list[str]) -> None:
    found = _check_value({"side": value}, "side", "INT", options, exempt=False)
    assert [problem["details"] for problem in found] == says


def test_a_missing_required_input(prompts: Any, registry: Registry) -> None:
    prompt = prompts.picture()
    del prompt["3"]["inputs"]["a"]
    assert refused(prompt, registry, "3", "required_input_missing") == (
        "a is not connected; connect a wire of type NUMBER"
    )
    prompt = prompts.picture()
    del prompt["1"]["inputs"]["scale"]
    assert refused(prompt, registry, "1", "required_input_missing") == "scale has no value; set it"


def test_a_missing_optional_input_is_no_error(prompts: Any, registry: Registry) -> None:
    prompt = prompts.picture()
    del prompt["3"]["inputs"]["b"]
    assert validate(prompt, registry).outputs == ["5"]


@pytest.mark.parametrize(
    ("link", "kind", "sentence"),
    [
        (["99", 0], "bad_linked_input", "a is wired to node 99, which does not exist; connect it again"),
        (["1", 1], "bad_linked_input", "a is wired to output 1 of node 1, which has 1; connect it again"),
        (["1"], "bad_linked_input", "a is no wire of [node, output], got ['1']"),
        (
            ["3", 1],
            "return_type_mismatch",
            "images takes IMAGE, but output 1 of node 3 gives TEXT; connect another",
        ),
        (5, "invalid_input_type", "a must be a wire of type NUMBER, got 5"),
    ],
)
def test_a_wrong_wire(prompts: Any, registry: Registry, link: Any, kind: str, sentence: str) -> None:
    prompt = prompts.picture()
    node, name = ("5", "images") if kind == "return_type_mismatch" else ("3", "a")
    prompt[node]["inputs"][name] = link
    assert refused(prompt, registry, node, kind) == sentence


def test_a_cycle_is_told_on_all_its_nodes(prompts: Any, registry: Registry) -> None:
    prompt = prompts.picture()
    prompt["6"] = {"class_type": "Add", "inputs": {"a": ["3", 0]}}
    prompt["3"]["inputs"]["a"] = ["6", 0]
    with pytest.raises(InvalidPrompt) as caught:
        validate(prompt, registry)
    assert sorted(caught.value.node_errors) == ["3", "6"]
    for node in ("3", "6"):
        (found,) = caught.value.node_errors[node]["errors"]
        assert found["type"] == "dependency_cycle"
        assert found["message"] == "the node feeds itself in a circle; disconnect one of these wires"


def test_a_long_chain_needs_no_recursion(prompts: Any, registry: Registry) -> None:
    prompt = prompts.picture()
    for number in range(100, 3100):
        prompt[str(number)] = {"class_type": "Add", "inputs": {"a": [str(number - 1), 0]}}
    prompt["100"]["inputs"]["a"] = ["1", 0]
    prompt["4"]["inputs"]["number"] = ["3099", 0]
    assert validate(prompt, registry).outputs == ["5"]


def test_an_unknown_node(prompts: Any, registry: Registry) -> None:
    prompt = prompts.picture()
    prompt["3"] = {"class_type": "KSampler", "inputs": {}, "_meta": {"title": "My Sampler"}}
    with pytest.raises(InvalidPrompt) as caught:
        validate(prompt, registry)
    assert caught.value.error["type"] == "missing_node_type"
    assert caught.value.error["extra_info"] == {
        "node_id": "3",
        "class_type": "KSampler",
        "node_title": "My Sampler",
    }
    assert str(caught.value) == "node 3 is a KSampler, which is not installed here; remove the node"


def test_nothing_to_show(prompts: Any, registry: Registry) -> None:
    prompt = prompts.picture()
    del prompt["5"]
    sentence = "the workflow saves and shows nothing; add a Save Image or Preview Image node"
    with pytest.raises(InvalidPrompt, match=sentence) as caught:
        validate(prompt, registry)
    assert caught.value.error["type"] == "prompt_no_outputs"


@pytest.mark.parametrize("prompt", [None, [], {}, {"1": []}, {"1": {"class_type": "Number", "inputs": []}}])
def test_what_is_no_prompt(prompt: Any, registry: Registry) -> None:
    with pytest.raises(InvalidPrompt, match="the workflow is empty|node 1 has no readable form"):
        validate(prompt, registry)


def test_sound_outputs_run_although_another_is_not(prompts: Any, registry: Registry) -> None:
    prompt = prompts.picture()
    prompt["6"] = {"class_type": "PreviewImage", "inputs": {}}
    checked = validate(prompt, registry)
    assert checked.outputs == ["5"]
    assert checked.node_errors["6"]["dependent_outputs"] == ["6"]


def test_targets_choose_the_outputs(prompts: Any, registry: Registry) -> None:
    prompt = prompts.picture()
    prompt["6"] = {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}
    assert validate(prompt, registry).outputs == ["5", "6"]
    assert validate(prompt, registry, ["6"]).outputs == ["6"]
    with pytest.raises(InvalidPrompt, match="saves and shows nothing"):
        validate(prompt, registry, ["4"])


def test_a_node_checks_its_own_values(registry: Registry, folders: Folders) -> None:
    Image.new("RGB", (4, 4)).save(folders.output / "made.png")
    (folders.user / "secret.png").write_bytes(b"x")

    def prompt(name: str) -> dict[str, Any]:
        return {
            "1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "5": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }

    assert validate(prompt("made.png [output]"), registry).outputs == ["5"]
    for name in ("made.png", "../user/secret.png", "../user/secret.png [output]"):
        details = refused(prompt(name), registry, "1", "custom_validation_failed")
        assert details == f"there is no picture {name} in {folders.input}; choose or upload one"
