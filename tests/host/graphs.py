"""Saved workflows for the tests, and the node classes (`object_info`) they refer to."""

from __future__ import annotations

from typing import Any

from rectiflux.host.workflow import Document, to_prompt

SEED = ["INT", {"default": 0, "control_after_generate": True}]
MIX = {"a": ["NUM", {}], "mode": [["add", "mul"], {}], "text": ["STRING", {"default": "-"}]}
MIX_OPTIONAL = {"b": ["NUM", {}], "flag": ["BOOLEAN", {"default": False}], "n": ["INT", {"default": 4}]}
LOAD = {"image": [["x.png"], {"image_upload": True}]}


def _info(name: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"input": {"required": required, "optional": optional or {}}, "display_name": name}


INFO: dict[str, dict[str, Any]] = {
    "Number": _info("A Number", {"seed": SEED, "scale": ["FLOAT", {"default": 1.5}]}),
    "Mix": _info("Mix", MIX, MIX_OPTIONAL),
    "Load": _info("Load", LOAD),
}


def graph(nodes: list[dict[str, Any]], links: list[Any], **more: Any) -> dict[str, Any]:
    return {"nodes": nodes, "links": links, "version": 0.4, **more}


def node(number: int, kind: str, values: Any = (), wires: dict[str, int] | None = None, **more: Any) -> Any:
    """A saved node; `wires` {input: link id} in the order of its inputs. All inputs are NUM."""
    inputs = [{"name": name, "type": "NUM", "link": link} for name, link in (wires or {}).items()]
    values = values if isinstance(values, dict) else list(values)
    outputs = [{"name": "out", "type": "NUM", "links": []}]
    saved = {"id": number, "type": kind, "inputs": inputs, "outputs": outputs}
    return {**saved, "widgets_values": values, **more}


def prompt_of(document: dict[str, Any]) -> dict[str, Any]:
    """The prompt without titles."""
    prompt = to_prompt(Document(document, None), INFO)
    return {key: {"class_type": n["class_type"], "inputs": n["inputs"]} for key, n in prompt.items()}


def pair(**second: Any) -> dict[str, Any]:
    """Number (1) wired into Mix (2)."""
    mix = {**node(2, "Mix", ["mul", "hi", True, 9], {"a": 1}), **second}
    return graph([node(1, "Number", [7, "fixed", 2.5]), mix], [[1, 1, 0, 2, 0, "NUM"]])


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


def subgraph(instance_values: list[Any] | None = None, **properties: Any) -> dict[str, Any]:
    """Number (1) -> subgraph (5): Mix (3), its text promoted -> Mix (2)."""
    inner = node(3, "Mix", ["mul", "inner", False, 1], {"a": 1, "text": 2})
    inner["inputs"][1]["widget"] = {"name": "text"}
    definition = {
        "id": "uuid",
        "name": "Group",
        "inputs": [{"name": "a", "linkIds": [1]}, {"name": "words", "linkIds": [2]}],
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


API = {"1": {"class_type": "Number", "inputs": {"seed": 7, "scale": 2.5}}}
