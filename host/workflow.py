"""Workflow files in, prompts out: the editor's format, the API format, or a PNG that carries either.

A picture written by this host or by ComfyUI carries both: `prompt`, exactly what ran, and `workflow`, the
graph as the editor shows it. The prompt is what gets rendered again; `--set` values go into both, so that a
picture always tells the values that made it. host/graph.py turns the one into the other.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .graph import Graph, Info, Placed, WorkflowError, reading, widget_positions, widget_specs, widget_value

__all__ = ["Document", "WorkflowError", "apply_settings", "read_document", "to_prompt"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_JSON = 64 * 2**20  # bytes; the largest workflows met in the wild are below 2 MB
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

Prompt = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Document:
    """A workflow as it was found: the saved graph, the prompt, or both (then they say the same)."""

    graph: dict[str, Any] | None
    prompt: Prompt | None


def read_document(path: str | Path) -> Document:
    """The workflow in a JSON or PNG file. Raises WorkflowError, naming the file, when there is none."""
    path = Path(path)
    try:
        if path.is_dir():
            raise WorkflowError(f"{path} is a folder; name a workflow's .json or a picture's .png")
        with path.open("rb") as file:
            signature = file.read(len(PNG_SIGNATURE))
            data = b"" if signature == PNG_SIGNATURE else signature + file.read(LARGEST_JSON + 1)
    except FileNotFoundError as error:
        raise WorkflowError(f"there is no file {path}") from error
    except OSError as error:
        raise WorkflowError(f"{path} cannot be read: {error.strerror}") from error
    if signature == PNG_SIGNATURE:
        return _read_png(path)
    if len(data) > LARGEST_JSON:
        raise WorkflowError(f"{path} is larger than {LARGEST_JSON >> 20} MB, too large for a workflow")
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
            raise WorkflowError(f"{where} is damaged: a node's inputs are not a table of names and values")
        return Document(None, {str(key): {"inputs": {}, **node} for key, node in found.items()})
    raise WorkflowError(
        f"{where} holds no workflow: neither the editor's format (nodes and links) nor the API format "
        "(class_type and inputs)"
    )


def _parse(data: bytes | str, where: str) -> Any:
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        return json.loads(text, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise WorkflowError(f"{where} is neither JSON nor a PNG") from error
    except json.JSONDecodeError as error:
        if not text.strip():
            raise WorkflowError(f"{where} is empty") from error
        raise WorkflowError(
            f"{where} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "it may have been cut short, save it again"
        ) from error
    except RecursionError as error:
        raise WorkflowError(f"{where} is nested too deeply for a workflow") from error


def _no_constant(name: str) -> None:
    """NaN and Infinity are no JSON; the editor, too, reads them as "no value"."""


def _read_png(path: Path) -> Document:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # every chunk to the last, so that a file cut short is found before anything runs
        with Image.open(path, formats=["PNG"]) as image:
            text = {key: str(value) for key, value in image.text.items()}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise WorkflowError(f"{path} is a damaged PNG, perhaps cut short; take the original file") from error
    found = [
        classify(_parse(text[key], f"{path} ({key})"), f"{path} ({key})")
        for key in ("prompt", "workflow")
        if key in text
    ]
    prompt = next((document.prompt for document in found if document.prompt), None)
    graph = next((document.graph for document in found if document.graph), None)
    if prompt is None and graph is None:
        raise WorkflowError(f"{path} carries no workflow; only pictures as a node editor saved them do")
    return Document(graph, prompt)


def to_prompt(document: Document, info: Info) -> Prompt:
    """The prompt of a document, node ids to classes and inputs. Raises WorkflowError."""
    if document.prompt is not None:
        return copy.deepcopy(document.prompt)
    if document.graph is None:
        raise WorkflowError("the document holds no workflow")
    with reading():
        return Graph(document.graph, info).prompt()


def apply_settings(document: Document, settings: list[str], info: Info) -> Document:
    """A document with NAME=VALUE settings applied in the prompt and, where there is one, in the graph.

    NAME is a widget's name, or NODE_ID.NAME where several nodes have it. The value is read as the widget's
    type. Raises WorkflowError for an unknown or ambiguous name (with the candidates) and for a value of
    another type.
    """
    prompt = to_prompt(document, info)
    if not settings or document.graph is None:
        graph, reader, placed = document.graph, None, {}
    else:
        graph = copy.deepcopy(document.graph)
        with reading():
            reader = Graph(graph, info)
            placed = {node.id: node for node in reader.placed()}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise WorkflowError(f"--set takes NAME=VALUE, got {setting!r}")
        number, widget = _find(prompt, name.strip(), info)
        value = read_value(text, *widget_specs(info[prompt[number]["class_type"]])[widget], name.strip())
        prompt[number]["inputs"][widget] = value
        if reader is not None and number in placed:
            if sum(other.node is placed[number].node for other in placed.values()) > 1:
                raise WorkflowError(
                    f"--set {name}: node {number} is in a subgraph used twice; set it in the editor"
                )
            with reading():
                _store(reader, placed[number], widget, value)
    return Document(graph, prompt)


def _candidates(prompt: Prompt, info: Info) -> dict[str, list[str]]:
    """{widget name: ids of the nodes that have it}; wired widgets are left out, a wire is no value to set."""
    found: dict[str, list[str]] = {}
    for number, node in prompt.items():
        if node["class_type"] not in info:
            raise WorkflowError(f"node {number} is a {node['class_type']}, which is not installed here")
        for widget in widget_specs(info[node["class_type"]]):
            if not isinstance(node["inputs"].get(widget), list):
                found.setdefault(widget, []).append(number)
    return found


def _find(prompt: Prompt, name: str, info: Info) -> tuple[str, str]:
    """(node id, widget name) that NAME or NODE_ID.NAME means. Raises WorkflowError."""
    candidates = _candidates(prompt, info)
    number, dot, widget = name.rpartition(".")
    if not dot:
        owners = candidates.get(name, [])
        if len(owners) > 1:
            choices = ", ".join(f"{owner}.{name} ({_title(prompt, owner, info)})" for owner in owners)
            raise WorkflowError(f"--set {name}: {len(owners)} nodes have it, say which: {choices}")
        if owners:
            return owners[0], name
        raise WorkflowError(f"--set {name}: no such widget here; there are {', '.join(sorted(candidates))}")
    if number in candidates.get(widget, []):
        return number, widget
    if number not in prompt:
        known = ", ".join(f"{key} ({_title(prompt, key, info)})" for key in prompt)
        raise WorkflowError(f"--set {name}: there is no node {number}; there are {known}")
    if isinstance(prompt[number]["inputs"].get(widget), list):
        raise WorkflowError(f"--set {name}: this input is fed by a wire; set the value where the wire starts")
    own = sorted(key for key, owners in candidates.items() if number in owners)
    raise WorkflowError(f"--set {name}: node {number} has no such widget; it has {', '.join(own) or 'none'}")


def _title(prompt: Prompt, number: str, info: Info) -> str:
    node = prompt[number]
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return str(title or info.get(node["class_type"], {}).get("display_name") or node["class_type"])


def read_value(text: str, kind: Any, options: dict[str, Any], name: str) -> Any:
    """Text from the command line as a widget's value; bounds are left to validation. Raises WorkflowError."""
    if isinstance(kind, (list, tuple)) or kind == "COMBO":
        choices = list(kind) if isinstance(kind, (list, tuple)) else list(options.get("options") or ())
        for choice in choices:
            if str(choice) == text:
                return choice
        listed = ", ".join(map(str, choices[:20])) or "nothing to choose from here"
        raise WorkflowError(f"--set {name}: {text!r} is not in its list: {listed}")
    if kind == "BOOLEAN":
        if text.lower() not in (*TRUE, *FALSE):
            raise WorkflowError(f"--set {name}: takes true or false, got {text!r}")
        return text.lower() in TRUE
    if kind in ("INT", "FLOAT"):
        try:
            value = int(text) if kind == "INT" else float(text)
        except ValueError as error:
            wanted = "a whole number" if kind == "INT" else "a number"
            raise WorkflowError(f"--set {name}: takes {wanted}, got {text!r}") from error
        if not math.isfinite(value):
            raise WorkflowError(f"--set {name}: takes a finite number, got {text!r}")
        return value
    return text


def _store(reader: Graph, placed: Placed, widget: str, value: Any) -> None:
    """Write a widget's value into the saved graph (a copy), where the editor will look for it."""
    source = reader.sources(placed).get(widget)
    if source is not None and source.holder is not None:  # a PrimitiveNode or the node of a subgraph keeps it
        source.holder["widgets_values"][source.index] = value
        named = source.holder.get("widgets_values_named")
        if isinstance(named, dict) and len(named) > source.index:
            named[list(named)[source.index]] = value
        return
    node = placed.node
    if isinstance(node.get("widgets_values_named"), dict):
        node["widgets_values_named"][widget] = value
    if node.get("widgets_values") is None:
        node["widgets_values"] = []
    values = node["widgets_values"]
    if isinstance(values, dict):
        values[widget] = value
        return
    positions = widget_positions(placed.info, values)
    for earlier, index in positions.items():
        if len(values) <= min(index, positions[widget]):  # the file is older than these widgets
            values.append(widget_value(placed, earlier))
    values[positions[widget]] = value
