"""A prompt checked before anything runs, every error on the node and input that it belongs to.

Error types and their extra_info are ComfyUI's (execution.py, 0.33), because the editor knows them; the
sentences are our own. Where ComfyUI converts silently (3.7 to 3, "false" to True) the value is refused here,
and whole numbers must be on their widget's steps.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from ..flux_core.weights.safetensors_file import PICKLES
from . import context
from .graph import WIDGET_TYPES
from .registry import Registry

LISTED = 20  # choices that a sentence names

Prompt = dict[str, dict[str, Any]]
Problem = dict[str, Any]


class InvalidPrompt(ValueError):
    """Nothing of the prompt can run. `error` is about the whole of it, `node_errors` about single nodes."""

    def __init__(self, error: Problem, node_errors: dict[str, dict[str, Any]] | None = None) -> None:
        self.error = error
        self.node_errors = node_errors or {}
        super().__init__("; ".join(self.sentences()))

    def sentences(self) -> list[str]:
        """What is wrong, one sentence each, naming the nodes."""
        found = [
            f"node {number} ({node['class_type']}): {problem['details']}"
            for number, node in self.node_errors.items()
            for problem in node["errors"]
        ]
        return found or [self.error["message"]]


@dataclass(frozen=True)
class Checked:
    """A prompt that can run: its values have their types, its output nodes `outputs` are sound.

    `node_errors` tells of other outputs that were left out because something before them is wrong.
    """

    prompt: Prompt
    outputs: list[str]
    node_errors: dict[str, dict[str, Any]] = field(default_factory=dict)


def problem(kind: str, message: str, details: str = "", **extra: Any) -> Problem:
    """An error in the editor's form; `details` is the whole sentence."""
    return {"type": kind, "message": message, "details": details or message, "extra_info": extra}


def links(node: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """{input: (node id, output slot)} of the inputs that are wired."""
    return {
        name: (str(value[0]), value[1])
        for name, value in node["inputs"].items()
        if isinstance(value, list) and len(value) == 2 and type(value[1]) is int
    }


def upstream(prompt: Prompt, outputs: Iterable[str]) -> set[str]:
    """The nodes that the outputs need, themselves included."""
    found: set[str] = set()
    waiting = list(outputs)
    while waiting:
        number = waiting.pop()
        if number in prompt and number not in found:
            found.add(number)
            waiting.extend(source for source, _ in links(prompt[number]).values())
    return found


def order(prompt: Prompt, outputs: Iterable[str]) -> list[str]:
    """The nodes that the outputs need, each after what feeds it. Raises graphlib.CycleError."""
    needed = upstream(prompt, outputs)
    graph = {
        number: [source for source, _ in links(prompt[number]).values() if source in needed]
        for number in prompt
        if number in needed
    }
    return list(TopologicalSorter(graph).static_order())


def validate(prompt: Any, registry: Registry, targets: Iterable[str] | None = None) -> Checked:
    """The prompt as it can run; with `targets` only for these output nodes. Raises InvalidPrompt."""
    prompt = _readable(prompt, registry)
    wanted = None if targets is None else {str(target) for target in targets}
    outputs = [
        number
        for number, node in prompt.items()
        if registry.is_output(node["class_type"]) and (wanted is None or number in wanted)
    ]
    if not outputs:
        message = "the workflow saves and shows nothing; add a Save Image or Preview Image node"
        raise InvalidPrompt(problem("prompt_no_outputs", message))
    errors = {number: _check_node(prompt, number, registry) for number in upstream(prompt, outputs)}
    try:
        order(prompt, outputs)
    except CycleError as error:
        cycle = error.args[1][::-1]
        path = " -> ".join(f"{number} ({prompt[number]['class_type']})" for number in cycle)
        message = "the node feeds itself in a circle; disconnect one of these wires"
        for number in dict.fromkeys(cycle):
            errors[number].append(
                problem("dependency_cycle", message, f"{message}: {path}", cycle_nodes=cycle)
            )
    return _sort_out(prompt, outputs, {number: found for number, found in errors.items() if found})


def _sort_out(prompt: Prompt, outputs: list[str], errors: dict[str, list[Problem]]) -> Checked:
    """The sound outputs, apart from those that need a node with errors. Raises InvalidPrompt if none is."""
    needs = {output: upstream(prompt, [output]) for output in outputs}
    node_errors = {
        number: {
            "errors": found,
            "dependent_outputs": [output for output in outputs if number in needs[output]],
            "class_type": prompt[number]["class_type"],
        }
        for number, found in errors.items()
    }
    good = [output for output in outputs if not needs[output] & errors.keys()]
    if not good:
        details = "\n".join(found["details"] for all_found in errors.values() for found in all_found)
        message = "the workflow cannot run as it is"
        raise InvalidPrompt(problem("prompt_outputs_failed_validation", message, details), node_errors)
    return Checked(prompt, good, node_errors)


def _readable(prompt: Any, registry: Registry) -> Prompt:
    """A copy of a prompt whose every node has a known class. Raises InvalidPrompt."""
    if not isinstance(prompt, dict) or not prompt:
        raise InvalidPrompt(problem("invalid_prompt", "the workflow is empty; add nodes, or open a template"))
    for number, node in prompt.items():
        if not isinstance(node, dict) or not isinstance(node.get("inputs", {}), dict):
            raise InvalidPrompt(problem("invalid_prompt", f"node {number} has no readable form"))
        class_type = node.get("class_type")
        if not isinstance(class_type, str) or class_type not in registry:
            meta = node.get("_meta")
            title = (meta.get("title") if isinstance(meta, dict) else None) or class_type
            message = f"node {number} is a {class_type}, which is not installed here; remove the node"
            extra = {"node_id": number, "class_type": class_type, "node_title": title}
            raise InvalidPrompt(problem("missing_node_type", message, message, **extra))
    return {str(number): {"inputs": {}, **copy.deepcopy(node)} for number, node in prompt.items()}


def _check_node(prompt: Prompt, number: str, registry: Registry) -> list[Problem]:
    """What is wrong with one node's inputs; values are given their types in place."""
    node = prompt[number]
    own_check = getattr(registry[node["class_type"]], "VALIDATE_INPUTS", None)
    exempt = set(inspect.signature(own_check).parameters) if own_check else set()
    problems = []
    for name, (kind, options, required) in registry.input_specs(node["class_type"]).items():
        if name not in node["inputs"]:
            if required:
                message = "a required input is missing"
                details = f"{name} has no value; set it"
                if not isinstance(kind, (list, tuple)) and kind not in WIDGET_TYPES:
                    details = f"{name} is not connected; connect a wire of type {kind}"
                problems.append(problem("required_input_missing", message, details, input_name=name))
            continue
        value = node["inputs"][name]
        if isinstance(value, list):
            found = _check_link(prompt, name, value, kind, registry)
        else:
            found = _check_value(node["inputs"], name, kind, options, name in exempt)
        problems += found
    if own_check and not problems:
        problems += _ask_node(own_check, node["inputs"], exempt, registry)
    return problems


def _check_link(prompt: Prompt, name: str, link: list[Any], kind: Any, registry: Registry) -> list[Problem]:
    """What is wrong with a wire."""
    extra = {"input_name": name, "received_value": link}
    if len(link) != 2 or type(link[1]) is not int:
        return [
            problem(
                "bad_linked_input", "broken wire", f"{name} is no wire of [node, output], got {link}", **extra
            )
        ]
    source, slot = str(link[0]), link[1]
    if source not in prompt:
        details = f"{name} is wired to node {source}, which does not exist; connect it again"
        return [problem("bad_linked_input", "broken wire", details, **extra)]
    types = registry[prompt[source]["class_type"]].RETURN_TYPES
    if not 0 <= slot < len(types):
        details = (
            f"{name} is wired to output {slot} of node {source}, which has {len(types)}; connect it again"
        )
        return [problem("bad_linked_input", "broken wire", details, **extra)]
    wanted = "COMBO" if isinstance(kind, (list, tuple)) else kind
    if "*" in (types[slot], wanted) or set(types[slot].split(",")) <= set(wanted.split(",")):
        return []
    gives = f"output {slot} of node {source} gives {types[slot]}"
    details = f"{name} takes {wanted}, but {gives}; connect another"
    extra = {"input_name": name, "received_type": types[slot], "linked_node": link}
    return [problem("return_type_mismatch", "the wire is of another type", details, **extra)]


def _check_value(
    inputs: dict[str, Any], name: str, kind: Any, options: dict[str, Any], exempt: bool
) -> list[Problem]:
    """What is wrong with a widget's value; in order, it is given its type in place."""
    value = inputs[name]
    extra = {"input_name": name, "received_value": value, "input_config": [kind, options]}
    try:
        value = inputs[name] = _typed(value, kind)
    except (ValueError, TypeError, OverflowError):
        words = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false"}
        details = f"{name} must be {words.get(kind, f'a wire of type {kind}')}, got {value!r}"
        return [problem("invalid_input_type", "the value is of another type", details, **extra)]
    if exempt:
        return []
    if isinstance(kind, (list, tuple)) and value not in kind:
        details = f"{name}: {no_such_choice(value, kind)}"
        extra["input_config"] = [list(kind[:LISTED]), options]
        return [problem("value_not_in_list", "the value is not in the list", details, **extra)]
    if kind in ("INT", "FLOAT") and value < options.get("min", -math.inf):
        details = f"{name} must be at least {options['min']}, got {value}"
        return [problem("value_smaller_than_min", "the value is too small", details, **extra)]
    if kind in ("INT", "FLOAT") and value > options.get("max", math.inf):
        details = f"{name} must be at most {options['max']}, got {value}"
        return [problem("value_bigger_than_max", "the value is too big", details, **extra)]
    step, start = options.get("step", 1), options.get("min", 0)
    if kind == "INT" and (beyond := (value - start) % step):  # ComfyUI leaves this to the node
        rule = f"in steps of {step} from {start}" if start % step else f"a multiple of {step}"
        details = f"{name} must be {rule}, got {value}; {value - beyond} is near"
        return [problem("custom_validation_failed", "the value is between two steps", details, **extra)]
    return []


def no_such_choice(value: Any, choices: Sequence[Any]) -> str:
    """Half a sentence on a value that a combo does not offer."""
    if str(value).lower().endswith(PICKLES):
        return f"{value!r} is a pickle, which could run code; convert it to safetensors"
    listed = ", ".join(map(str, choices[:LISTED])) or "nothing: its folder holds no such file"
    more = f" and {len(choices) - LISTED} more" if len(choices) > LISTED else ""
    return f"{value!r} is not in its list, which has {listed}{more}"


def _typed(value: Any, kind: Any) -> Any:
    """The value as its widget's type. Raises ValueError, TypeError or OverflowError if it is none."""
    if kind == "STRING":
        return str(value)
    if kind == "BOOLEAN":
        if value not in (True, False):
            raise ValueError
        return bool(value)
    if kind == "INT":
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value)
    if kind == "FLOAT":
        if not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    if not isinstance(kind, (list, tuple)) and kind != "*":
        raise ValueError
    return value


def _ask_node(check: Any, inputs: dict[str, Any], names: set[str], registry: Registry) -> list[Problem]:
    """What the node's own VALIDATE_INPUTS says of the values."""
    given = {name: inputs[name] for name in names if name in inputs and not isinstance(inputs[name], list)}
    if not given:
        return []
    with context.using(registry.folders):
        answer = check(**given)
    if answer is True:
        return []
    name = next(iter(given))
    details = answer if isinstance(answer, str) else f"{name} is not valid here"
    return [problem("custom_validation_failed", "the value is refused", details, input_name=name)]
