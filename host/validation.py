"""Validates a prompt before anything runs; every error names its node and input.

Error types and their extra_info are ComfyUI's (execution.py, 0.33), because the editor knows them; the
sentences are our own. Where ComfyUI converts silently (3.7 to 3, "false" to True) the value is refused here,
and integers must match their widget's step.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError
from typing import Any

from ..flux_core.weights.file_names import PICKLES, has_ending
from . import context
from .json_reader import one_line, quoted
from .prompt_graph import Prompt, dependents, downstream, listed, order, upstream
from .registry import Registry
from .saved_graph import WIDGET_TYPES

log = logging.getLogger(__name__)

MAX_LISTED = 20  # choices listed in a message
MAX_SENTENCES = 50
MAX_NODES = 10_000
MAX_ID = 1000  # characters of a node's id

Problem = dict[str, Any]


class InvalidPrompt(ValueError):
    """No part of the prompt can run. `error` describes the whole, `node_errors` single nodes."""

    def __init__(self, error: Problem, node_errors: dict[str, dict[str, Any]] | None = None) -> None:
        self.error = error
        self.node_errors = node_errors or {}
        super().__init__("; ".join(self.sentences()))

    def sentences(self) -> list[str]:
        """One sentence for each error, with its node; the first MAX_SENTENCES and a count of the others."""
        found = [
            f"node {one_line(node_id, 80)} ({node['class_type']}): {problem['details']}"
            for node_id, node in self.node_errors.items()
            for problem in node["errors"]
        ]
        more = [f"{len(found) - MAX_SENTENCES} more inputs have errors"] if len(found) > MAX_SENTENCES else []
        return [*found[:MAX_SENTENCES], *more] or [self.error["message"]]


@dataclass(frozen=True)
class Checked:
    """A prompt that can run: values are converted to their types, the output nodes `outputs` are valid.

    `node_errors`: errors for which other outputs were left out.
    """

    prompt: Prompt
    outputs: list[str]
    node_errors: dict[str, dict[str, Any]] = field(default_factory=dict)


def problem(kind: str, message: str, details: str = "", **extra: Any) -> Problem:
    """An error as the editor expects it; `details` is the full sentence."""
    return {"type": kind, "message": message, "details": details or message, "extra_info": extra}


def validate(prompt: Any, registry: Registry, targets: Iterable[str] | None = None) -> Checked:
    """The prompt ready to run; with `targets` only for these output nodes. Raises InvalidPrompt."""
    prompt = _with_known_classes(prompt, registry)
    wanted = None if targets is None else {str(target) for target in targets}
    outputs = [
        node_id
        for node_id, node in prompt.items()
        if registry.is_output(node["class_type"]) and (wanted is None or node_id in wanted)
    ]
    if not outputs:
        message = "the workflow has no output node; add a Save Image or Preview Image node"
        raise InvalidPrompt(problem("prompt_no_outputs", message))
    classes = {prompt[node_id]["class_type"] for node_id in upstream(prompt, outputs)}
    specs = {class_type: registry.input_specs(class_type) for class_type in classes}
    errors = {
        node_id: _check_node(prompt, node_id, registry, specs[prompt[node_id]["class_type"]])
        for node_id in upstream(prompt, outputs)
    }
    cycle: list[str] = []
    try:
        order(prompt, outputs)
    except CycleError as error:
        cycle = error.args[1][::-1]
        shown = cycle[:MAX_LISTED]
        path = " -> ".join(f"{one_line(node_id, 80)} ({prompt[node_id]['class_type']})" for node_id in shown)
        more = f" and {len(cycle) - MAX_LISTED} more" if len(cycle) > MAX_LISTED else ""
        message = "the node depends on its own output; disconnect one of these wires"
        found = problem("dependency_cycle", message, f"{message}: {path}{more}", cycle_nodes=shown)
        for node_id in dict.fromkeys(cycle):
            errors[node_id].append(found)
    errors = {node_id: found for node_id, found in errors.items() if found}
    return _split_outputs(prompt, outputs, errors, has_cycle=bool(cycle))


def _split_outputs(
    prompt: Prompt, outputs: list[str], errors: dict[str, list[Problem]], has_cycle: bool
) -> Checked:
    """The outputs that do not depend on a node with errors. Raises InvalidPrompt if there are none.

    With a cycle, every output that cannot run counts as dependent on every error.
    """
    if not errors:
        return Checked(prompt, outputs)
    if has_cycle:
        invalid = downstream(prompt, errors)
        failed = sum(1 << index for index, output in enumerate(outputs) if output in invalid)
        needing = dict.fromkeys(errors, failed)
    else:
        needing = dependents(prompt, outputs)
        failed = 0
        for node_id in errors:
            failed |= needing[node_id]
    node_errors = {
        node_id: {
            "errors": found,
            "dependent_outputs": listed(needing[node_id], outputs),
            "class_type": prompt[node_id]["class_type"],
        }
        for node_id, found in errors.items()
    }
    valid = [output for index, output in enumerate(outputs) if not failed >> index & 1]
    if not valid:
        reasons = [found["details"] for problems in errors.values() for found in problems]
        details = "\n".join(reasons[:MAX_SENTENCES])
        message = "the workflow cannot run"
        raise InvalidPrompt(problem("prompt_outputs_failed_validation", message, details), node_errors)
    return Checked(prompt, valid, node_errors)


def _with_known_classes(prompt: Any, registry: Registry) -> Prompt:
    """A copy of the prompt. Raises InvalidPrompt unless every node has a known class."""
    if not isinstance(prompt, dict) or not prompt:
        raise InvalidPrompt(problem("invalid_prompt", "the workflow is empty; add nodes, or open a template"))
    if len(prompt) > MAX_NODES:
        message = (
            f"the workflow has too many nodes: the limit is {MAX_NODES:,}, got {len(prompt):,}; split it"
        )
        raise InvalidPrompt(problem("invalid_prompt", message))
    for node_id, node in prompt.items():
        if len(str(node_id)) > MAX_ID:
            message = f"a node's id must have at most {MAX_ID} characters, got {quoted(node_id)}; shorten it"
            raise InvalidPrompt(problem("invalid_prompt", message))
        if not isinstance(node, dict) or not isinstance(node.get("inputs", {}), dict):
            message = f"node {one_line(str(node_id), 80)} is not an object with class_type and inputs"
            raise InvalidPrompt(problem("invalid_prompt", message))
        class_type = node.get("class_type")
        if not isinstance(class_type, str) or class_type not in registry:
            meta = node.get("_meta")
            title = (meta.get("title") if isinstance(meta, dict) else None) or class_type
            named = one_line(class_type, 80) if isinstance(class_type, str) else quoted(class_type, 80)
            shown = one_line(str(node_id), 80)
            message = f"node {shown} is a {named}, which is not installed here; remove the node"
            extra = {"node_id": node_id, "class_type": class_type, "node_title": title}
            raise InvalidPrompt(problem("missing_node_type", message, message, **extra))
    return {str(node_id): {"inputs": {}, **copy.deepcopy(node)} for node_id, node in prompt.items()}


def _check_node(
    prompt: Prompt, node_id: str, registry: Registry, specs: dict[str, tuple[Any, dict[str, Any], bool]]
) -> list[Problem]:
    """The errors of one node's inputs; values are converted to their types in place."""
    node = prompt[node_id]
    own_check = getattr(registry[node["class_type"]], "VALIDATE_INPUTS", None)
    exempt = registry.checked_by_node(node["class_type"])
    problems = []
    for name, (kind, options, required) in specs.items():
        if name not in node["inputs"]:
            if required:
                message = "a required input is missing"
                details = f"{name} has no value; enter one"
                if not isinstance(kind, (list, tuple)) and kind not in WIDGET_TYPES:
                    details = f"{name} is not connected; connect a wire of type {kind}"
                problems.append(problem("required_input_missing", message, details, input_name=name))
            continue
        value = node["inputs"][name]
        if isinstance(value, dict) and value.keys() == {"__value__"}:  # how the editor sends a list
            value = value["__value__"]
            if not isinstance(value, list):
                node["inputs"][name] = value
            else:
                wanted = "one of its choices" if isinstance(kind, (list, tuple)) else f"a single {kind}"
                details = f"{name} must be {wanted}, got the list {quoted(value)}; enter one value"
                problems.append(problem("invalid_input_type", "the value has the wrong type", details))
                continue
        if isinstance(value, list):
            found = _check_link(prompt, name, value, kind, registry)
        else:
            found = _check_value(node["inputs"], name, kind, options, name in exempt)
        problems += found
    if own_check and not problems:
        problems += _check_with_node(own_check, node["inputs"], exempt, registry)
    return problems


def _check_link(prompt: Prompt, name: str, link: list[Any], kind: Any, registry: Registry) -> list[Problem]:
    """The errors of a wire."""
    extra = {"input_name": name, "received_value": link if len(link) <= 2 else quoted(link)}
    if len(link) != 2 or type(link[1]) is not int:
        return [
            problem(
                "bad_linked_input",
                "broken wire",
                f"{name} must be a wire [node, output], got {quoted(link)}; connect it again",
                **extra,
            )
        ]
    source, slot = str(link[0]), link[1]
    if source not in prompt:
        details = (
            f"{name} is connected to node {one_line(source, 80)}, which does not exist; connect it again"
        )
        return [problem("bad_linked_input", "broken wire", details, **extra)]
    types = registry[prompt[source]["class_type"]].RETURN_TYPES
    if not 0 <= slot < len(types):
        details = (
            f"{name} is connected to output {one_line(str(slot), 20)} of node {one_line(source, 80)}, "
            f"which has {len(types)}; connect it again"
        )
        return [problem("bad_linked_input", "broken wire", details, **extra)]
    shown = one_line(source, 80)
    wanted = "COMBO" if isinstance(kind, (list, tuple)) else kind
    if "*" in (types[slot], wanted) or set(types[slot].split(",")) <= set(wanted.split(",")):
        return []
    output = f"output {slot} of node {shown} is {types[slot]}"
    details = f"{name} must be {wanted}, but {output}; connect another output"
    extra = {"input_name": name, "received_type": types[slot], "linked_node": link}
    return [problem("return_type_mismatch", "the wire has the wrong type", details, **extra)]


def _check_value(
    inputs: dict[str, Any], name: str, kind: Any, options: dict[str, Any], exempt: bool
) -> list[Problem]:
    """The errors of a widget's value; a valid one is converted to its type in place."""
    value = inputs[name]
    is_long = isinstance(value, (str, list, dict)) and len(value) > MAX_ID
    received = quoted(value) if is_long else value
    config = list(kind[:MAX_LISTED]) if isinstance(kind, (list, tuple)) else kind
    extra = {"input_name": name, "received_value": received, "input_config": [config, options]}
    try:
        value = inputs[name] = _typed(value, kind)
    except (ValueError, TypeError, OverflowError):
        words = {"INT": "an integer", "FLOAT": "a number", "BOOLEAN": "true or false", "STRING": "text"}
        wanted = "one of its choices" if isinstance(kind, (list, tuple)) else words.get(kind)
        details = f"{name} must be {wanted or f'a wire of type {kind}'}, got {quoted(value)}"
        return [problem("invalid_input_type", "the value has the wrong type", details, **extra)]
    if exempt:
        return []
    if isinstance(kind, (list, tuple)) and value not in kind:
        details = f"{name}: {explain_choice(value, kind)}"
        return [problem("value_not_in_list", "the value is not in the list", details, **extra)]
    if kind in ("INT", "FLOAT") and value < options.get("min", -math.inf):
        details = f"{name} must be at least {options['min']}, got {quoted(value)}"
        return [problem("value_smaller_than_min", "the value is too small", details, **extra)]
    if kind in ("INT", "FLOAT") and value > options.get("max", math.inf):
        details = f"{name} must be at most {options['max']}, got {quoted(value)}"
        return [problem("value_bigger_than_max", "the value is too big", details, **extra)]
    step, start = options.get("step", 1), options.get("min", 0)
    if kind == "INT" and (beyond := (value - start) % step):  # ComfyUI leaves this to the node
        rule = f"{start} plus a multiple of {step}" if start % step else f"a multiple of {step}"
        details = f"{name} must be {rule}, got {value}; {_near(value - beyond, step, options)}"
        return [problem("custom_validation_failed", "the value does not match the step", details, **extra)]
    return []


def _near(below: int, step: int, options: dict[str, Any]) -> str:
    """The values of a widget below and above one that does not match its step."""
    if below + step > options.get("max", math.inf):
        return f"{below} is near"
    return f"{below} and {below + step} are near"


def explain_choice(value: Any, choices: Sequence[Any]) -> str:
    """Why a combo does not accept a value, as the second half of a sentence."""
    if has_ending(str(value), PICKLES):
        return f"{quoted(value)} is a pickle file, which can execute code; convert it to safetensors"
    if not choices:
        return f"{quoted(value)} is not available; its folder has no such files"
    listed = ", ".join(map(str, choices[:MAX_LISTED]))
    more = f" and {len(choices) - MAX_LISTED} more" if len(choices) > MAX_LISTED else ""
    return f"{quoted(value)} is not one of {listed}{more}"


def _typed(value: Any, kind: Any) -> Any:
    """The value converted to its widget's type. Raises ValueError, TypeError or OverflowError."""
    is_list = isinstance(kind, (list, tuple))
    if (value is None or isinstance(value, (dict, list))) and (is_list or kind == "STRING"):
        raise ValueError
    if kind == "STRING":
        return str(value)
    if kind == "BOOLEAN":
        if value not in (True, False):
            raise ValueError
        return bool(value)
    if kind == "INT":
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        if isinstance(value, str) and len(value) > 100:
            raise ValueError
        return int(value)
    if kind == "FLOAT":
        if not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    if not is_list and kind != "*":
        raise ValueError
    return value


def _check_with_node(
    check: Any, inputs: dict[str, Any], names: set[str], registry: Registry
) -> list[Problem]:
    """The errors that the node's own VALIDATE_INPUTS reports."""
    values = {name: inputs[name] for name in names if name in inputs and not isinstance(inputs[name], list)}
    if not values:
        return []
    name = next(iter(values))
    try:
        with context.using(registry.folders):
            answer = check(**values)
    except Exception as error:  # a check meets values of any kind; the prompt is refused in a sentence
        log.debug("VALIDATE_INPUTS failed", exc_info=error)
        answer = f"{name} cannot be used, got {quoted(values[name])}; enter another value"
    if answer is True:
        return []
    details = one_line(answer, 1000) if isinstance(answer, str) else f"{name} has an invalid value"
    return [problem("custom_validation_failed", "the value is refused", details, input_name=name)]
