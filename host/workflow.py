"""Reads workflow files and makes prompts of them: the editor's format, the API format, or a PNG with either.

An image saved by this host or by ComfyUI contains both: `prompt`, exactly what ran, and `workflow`, the graph
as the editor shows it. `render` runs the prompt; `--set` values are written into both, so that an image
always has the values it was made with. graph.py converts the graph to a prompt.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .graph import SAVE_NODES, Graph
from .json_reader import MAX_BYTES, JsonError, one_line, quoted, read_json
from .png_file import SIGNATURE, DamagedPng, LargeMetadata, read_png
from .saved_graph import Info, WorkflowError, parse_errors, store_value, widget_specs
from .validation import explain_choice

__all__ = ["Document", "WorkflowError", "apply_settings", "read_document", "to_prompt"]

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

Prompt = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Document:
    """A workflow as read from a file: the saved graph, the prompt, or both (of the same workflow)."""

    graph: dict[str, Any] | None
    prompt: Prompt | None


def read_document(path: str | Path) -> Document:
    """The workflow in a JSON or PNG file. Raises WorkflowError, with the file's name, if it has none."""
    path = Path(path)
    try:
        if path.is_dir():
            raise WorkflowError(f"{path} is a folder; give a workflow (.json) or an image (.png)")
        with path.open("rb") as file:
            signature = file.read(len(SIGNATURE))
            data = b"" if signature == SIGNATURE else signature + file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise WorkflowError(f"the file {path} does not exist") from error
    except OSError as error:
        raise WorkflowError(f"cannot read {path}: {error.strerror}") from error
    if signature == SIGNATURE:
        return _read_png(path)
    if b"\0" in data[:64]:
        raise WorkflowError(f"{path} is neither JSON nor a PNG; give a workflow (.json) or an image (.png)")
    return classify(_parse(data, str(path)), str(path))


def classify(found: Any, where: str) -> Document:
    """The document in parsed JSON of either format. Raises WorkflowError when it is neither."""
    if isinstance(found, dict) and isinstance(found.get("nodes"), list):
        return Document(found, None)
    if isinstance(found, dict) and isinstance(found.get("prompt"), dict):  # the body of POST /prompt
        found = found["prompt"]
    nodes = found.values() if isinstance(found, dict) else ()
    if nodes and all(isinstance(node, dict) and isinstance(node.get("class_type"), str) for node in nodes):
        if not all(isinstance(node.get("inputs", {}), dict) for node in nodes):
            raise WorkflowError(f"{where} is damaged: a node's inputs are not an object of names and values")
        return Document(None, {str(key): {"inputs": {}, **node} for key, node in found.items()})
    raise WorkflowError(
        f"{where} has no workflow: neither the editor's format (nodes and links) nor the API format "
        "(class_type and inputs)"
    )


def _parse(data: bytes | str, where: str) -> Any:
    try:
        return read_json(data, where)
    except JsonError as error:
        raise WorkflowError(str(error)) from error


def _read_png(path: Path) -> Document:
    try:
        with path.open("rb") as file:
            png = read_png(file)
        if not png.has_end:  # what is missing may be the workflow
            raise DamagedPng("it ends before its chunk IEND")
    except LargeMetadata as error:
        raise WorkflowError(f"{path} {error}") from error
    except DamagedPng as error:
        raise WorkflowError(f"{path} is damaged or truncated ({error}); use the original PNG") from error
    except OSError as error:
        raise WorkflowError(f"cannot read {path}: {error.strerror}") from error
    text = png.texts
    if not text.get("prompt", "").strip().startswith("{") or text["prompt"].strip() == "{}":
        text = {key: value for key, value in text.items() if key != "prompt"}  # another program's plain text
    found = [
        classify(_parse(text[key], f"{path} ({key})"), f"{path} ({key})")
        for key in ("prompt", "workflow")
        if key in text
    ]
    prompt = next((document.prompt for document in found if document.prompt), None)
    graph = next((document.graph for document in found if document.graph), None)
    if prompt is None and graph is None:
        raise WorkflowError(f"{path} has no workflow; only unmodified PNGs saved by a node editor have one")
    return Document(graph, prompt)


def to_prompt(document: Document, info: Info) -> Prompt:
    """The document's prompt {node id: {class_type, inputs}}. Raises WorkflowError."""
    if document.prompt is not None:
        return copy.deepcopy(document.prompt)
    if document.graph is None:
        raise WorkflowError("the document has no workflow")
    with parse_errors():
        return Graph(document.graph, info).prompt()


def apply_settings(document: Document, settings: list[str], info: Info) -> Document:
    """The document with NAME=VALUE settings applied to its prompt and, if it has one, its graph.

    NAME is a widget's name, or NODE_ID.NAME if several nodes have it. The value is converted to the widget's
    type. Raises WorkflowError for an unknown or ambiguous name (with the candidates) and for a value of the
    wrong type.
    """
    prompt = to_prompt(document, info)
    graph = copy.deepcopy(document.graph)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise WorkflowError(f"--set must be NAME=VALUE, got {quoted(setting)}")
        node_id, widget = _find(prompt, name.strip(), info)
        described = info[prompt[node_id]["class_type"]]
        kind, options = widget_specs(described)[widget]
        is_name = isinstance(kind, (list, tuple)) and widget in described.get("checked_by_node", ())
        value = text if is_name else read_value(text, kind, options, name.strip())
        prompt[node_id]["inputs"][widget] = value
        if graph is not None:
            with parse_errors():
                _store(graph, info, prompt, (node_id, widget))
    return Document(graph, prompt)


def _candidates(prompt: Prompt, info: Info) -> dict[str, list[str]]:
    """{widget name: ids of the nodes that have it}, without widgets whose value comes from a wire."""
    found: dict[str, list[str]] = {}
    for node_id, node in prompt.items():
        if node["class_type"] not in info:
            raise WorkflowError(f"node {node_id} is a {node['class_type']}, which is not installed here")
        for widget in widget_specs(info[node["class_type"]]):
            if not isinstance(node["inputs"].get(widget), list):
                found.setdefault(widget, []).append(node_id)
    return found


def _find(prompt: Prompt, name: str, info: Info) -> tuple[str, str]:
    """(node id, widget name) of NAME or NODE_ID.NAME. Raises WorkflowError."""
    candidates = _candidates(prompt, info)
    node_id, dot, widget = name.rpartition(".")
    if not dot:
        owners = candidates.get(name, [])
        if len(owners) > 1:
            choices = ", ".join(f"{owner}.{name} ({_title(prompt, owner, info)})" for owner in owners)
            raise WorkflowError(f"--set {name}: {len(owners)} nodes have it; choose one of {choices}")
        if owners:
            return owners[0], name
        raise WorkflowError(f"--set {name}: unknown widget; the workflow has {', '.join(sorted(candidates))}")
    if node_id in candidates.get(widget, []):
        return node_id, widget
    if node_id not in prompt:
        known = ", ".join(f"{key} ({_title(prompt, key, info)})" for key in prompt)
        raise WorkflowError(f"--set {name}: node {node_id} does not exist; the workflow has {known}")
    if isinstance(prompt[node_id]["inputs"].get(widget), list):
        raise WorkflowError(
            f"--set {name}: this input is connected to a wire; set the value at the wire's source"
        )
    own = sorted(key for key, owners in candidates.items() if node_id in owners)
    raise WorkflowError(f"--set {name}: unknown widget; node {node_id} has {', '.join(own) or 'none'}")


def _title(prompt: Prompt, node_id: str, info: Info) -> str:
    node = prompt[node_id]
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return str(title or info.get(node["class_type"], {}).get("display_name") or node["class_type"])


def read_value(text: str, kind: Any, options: dict[str, Any], name: str) -> Any:
    """A widget's value from command-line text; validation checks its bounds. Raises WorkflowError."""
    if isinstance(kind, (list, tuple)) or kind == "COMBO":
        choices = list(kind) if isinstance(kind, (list, tuple)) else list(options.get("options") or ())
        for choice in choices:
            if str(choice) == text:
                return choice
        if options.get("image_upload"):  # may also be an image in another folder; the node checks it
            return text
        raise WorkflowError(f"--set {name}: {explain_choice(text, choices)}")
    if kind == "BOOLEAN":
        if text.lower() not in (*TRUE, *FALSE):
            raise WorkflowError(f"--set {name}: must be true or false, got {quoted(text)}")
        return text.lower() in TRUE
    if kind in ("INT", "FLOAT"):
        try:
            value = int(text) if kind == "INT" else float(text)
        except ValueError as error:
            wanted = "an integer" if kind == "INT" else "a number"
            raise WorkflowError(f"--set {name}: must be {wanted}, got {quoted(text)}") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise WorkflowError(f"--set {name}: must be finite, got {quoted(text)}")
        return value
    return text


def _store(graph: dict[str, Any], info: Info, prompt: Prompt, key: tuple[str, str]) -> None:
    """Write a value of the prompt into the saved graph, where the editor reads it.

    Texts of the prompt that contain the value are written again. Raises WorkflowError if the editor would
    then send another prompt than this one.
    """
    node_id, widget = key
    value = prompt[node_id]["inputs"][widget]
    reader = Graph(graph, info)
    nodes = {node.id: node for node in reader.flat_nodes()}
    if node_id not in nodes:
        return
    node, before = nodes[node_id], reader.prompt()
    source = reader.sources(node).get(widget) or reader.own_values(node.scope, node.node)[widget]
    if source.wire is not None:
        raise WorkflowError(
            f"--set {widget}: in the saved graph it is connected to a wire; set it in the editor"
        )
    if source.store is None:
        store_value(node.node, info[node.node["type"]], widget, value)
    else:
        source.store(value)
    changed = {
        (other, name): (before[other]["inputs"].get(name), new)
        for other, entry in Graph(graph, info).prompt().items()
        for name, new in entry["inputs"].items()
        if new != before[other]["inputs"].get(name)
    }
    for (other, name), (old, new) in changed.items():
        if nodes[other].node["type"] in SAVE_NODES and name == "filename_prefix":
            if (other, name) == key or prompt.get(other, {}).get("inputs", {}).get(name) == old:
                prompt[other]["inputs"][name] = new
        elif (other, name) != key:
            shared = (
                "is in a subgraph used several times"
                if other != node_id and nodes[other].node is node.node
                else f"shares this value with {one_line(name, 80)} of node {one_line(other, 80)}"
            )
            raise WorkflowError(f"--set {widget}: node {node_id} {shared}; set it in the editor")
        elif new != value:
            raise WorkflowError(
                f"--set {widget}: the editor would read {quoted(new)} instead of {quoted(value)}; "
                "set it in the editor"
            )
