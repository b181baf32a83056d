"""A checked prompt run: each node after what feeds it, and only those whose inputs changed since.

What happens is told to `on_event(kind, data)`; kinds and data are those of the editor's WebSocket messages:
execution_start, execution_cached, executing, progress, progress_state, executed, execution_success,
execution_error and execution_interrupted, and two of our own, "preview" {node_id, prompt_id, pixels [h, w, 3]
uint8} and "notice" {node_id, prompt_id, text}. They come from the thread that calls `run`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import context
from .files import SaveError
from .registry import Registry
from .validation import Checked, Prompt, links, order

log = logging.getLogger(__name__)

OnEvent = Callable[[str, dict[str, Any]], None]
EXPECTED = (ValueError, TypeError, OSError, SaveError)
"""What nodes raise to tell the user something: one sentence, no traceback."""
PAUSE = 0.1  # seconds at least between two steps that are told; a browser that is sent more falls behind


@dataclass(frozen=True)
class NodeError:
    """What stopped a run: the node, one sentence, and a traceback (empty for what a user can mend)."""

    node_id: str
    class_type: str
    message: str
    kind: str
    traceback: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """How a run ended. `status`: "success", "error" or "interrupted"."""

    status: str
    outputs: dict[str, dict[str, Any]]
    """{node id: what it shows}, as {"images": [{"filename", "subfolder", "type"}]}; see Folders.locate"""
    executed: list[str]
    """Ids of the nodes that ran; the others' results were there already."""
    error: NodeError | None = None

    def images(self, kind: str = "output") -> list[dict[str, str]]:
        """The pictures saved in a folder ("output" or "temp"), in the order in which they were saved."""
        shown = [image for output in self.outputs.values() for image in output.get("images", [])]
        return [image for image in shown if image["type"] == kind]


@dataclass(frozen=True)
class _Kept:
    """What a node gave, and under which id it last stood in a prompt."""

    node_id: str
    values: tuple[Any, ...]
    shown: dict[str, Any] | None
    notices: list[str]


class Executor:
    """Runs prompts and keeps the last one's results. One run at a time."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._kept: dict[str, _Kept] = {}

    def forget(self) -> None:
        """Drop all results, and with them the models that they hold."""
        self._kept.clear()

    def run(
        self,
        checked: Checked,
        *,
        on_event: OnEvent | None = None,
        prompt_id: str | None = None,
        extra_pnginfo: dict[str, Any] | None = None,
        previews: bool = False,
        stop: threading.Event | None = None,
    ) -> Result:
        """Run what `validate` returned. Errors of nodes are in the result; nothing is raised for them.

        `extra_pnginfo` ({"workflow": the saved graph}) goes into the pictures; set `stop` to interrupt.
        """
        run = _Run(
            checked.prompt,
            prompt_id or str(uuid.uuid4()),
            extra_pnginfo or {},
            on_event or (lambda kind, data: None),
            previews,
            stop or threading.Event(),
        )
        with context.using(self.registry.folders), torch.no_grad():
            needed = order(checked.prompt, checked.outputs)
            return self._run(run, needed)

    def _run(self, run: _Run, needed: list[str]) -> Result:
        run.tell("execution_start")
        keys: dict[str, str] = {}
        for number in needed:
            keys[number] = self._key(run.prompt, number, keys)
        cached = {number for number in needed if self._is_kept(keys[number])}
        run.tell("execution_cached", nodes=sorted(cached))
        executed: list[str] = []
        outputs: dict[str, dict[str, Any]] = {}
        number, full = "", False
        failed: Result | None = None
        try:
            for number in needed:
                if not self._is_kept(keys[number]):
                    context_check(run.stop)
                    self._kept[keys[number]] = self._execute(run, number, keys)
                    executed.append(number)
                else:  # what it had to say still holds
                    for text in self._kept[keys[number]].notices:
                        run.notice(number, text)
                shown = self._kept[keys[number]].shown
                if shown is not None:
                    outputs[number] = shown
                    run.tell("executed", node=number, display_node=number, output=shown)
        except context.Interrupted:
            run.finish(number, "error")
            ended = {"node_id": number, "node_type": run.prompt[number]["class_type"], "executed": executed}
            run.tell("execution_interrupted", **ended)
            return Result("interrupted", outputs, executed)
        except Exception as error:  # a node of any author may raise anything; the host goes on
            found = self._explain(run, number, error)
            run.finish(number, "error")
            failed, full = Result("error", outputs, executed, found), memory_is_full(error)
            run.tell("execution_error", **_error_event(run, found, executed))
        finally:
            self._prune(run.prompt, keys)
        if failed is not None:
            if full:  # only now that the error is gone, whose frames hold what the node had
                self._make_room()
            return failed
        run.tell("execution_success")
        return Result("success", outputs, executed)

    def _execute(self, run: _Run, number: str, keys: dict[str, str]) -> _Kept:
        """Call one node. Raises what it raises."""
        node = self.registry[run.prompt[number]["class_type"]]
        run.start(number)
        with context.running(run.context(number)):
            returned = getattr(node(), node.FUNCTION)(**self._arguments(run, number, keys))
        shown = returned.get("ui") if isinstance(returned, dict) else None
        values = returned.get("result", ()) if isinstance(returned, dict) else returned
        if not isinstance(values, tuple) or len(values) < len(node.RETURN_TYPES):
            raise RuntimeError(
                f"the node returned {type(values).__name__} in place of {len(node.RETURN_TYPES)} values"
            )
        run.finish(number, "finished")
        return _Kept(number, values, shown, run.notices.get(number, []))

    def _arguments(self, run: _Run, number: str, keys: dict[str, str]) -> dict[str, Any]:
        """A node's arguments: its widgets' values, what came over its wires, and what it asks of the host."""
        node = run.prompt[number]
        inputs = self.registry.inputs(node["class_type"])
        known = inputs.get("required", {}).keys() | inputs.get("optional", {}).keys()
        arguments = {name: value for name, value in node["inputs"].items() if name in known}
        for name, (source, slot) in links(node).items():
            if name in known:
                arguments[name] = self._kept[keys[source]].values[slot]
        hidden = {"PROMPT": run.prompt, "EXTRA_PNGINFO": run.extra_pnginfo, "UNIQUE_ID": number}
        return arguments | {name: hidden.get(kind) for name, kind in inputs.get("hidden", {}).items()}

    def _key(self, prompt: Prompt, number: str, keys: dict[str, str]) -> str:
        """A digest of all that a result depends on: the class, the values, and the keys of what feeds it."""
        node = prompt[number]
        wired = links(node)
        inputs = {
            name: ["wire", keys.get(wired[name][0]), wired[name][1]] if name in wired else ["value", value]
            for name, value in node["inputs"].items()
        }
        kind = self.registry[node["class_type"]]
        hidden = self.registry.inputs(node["class_type"]).get("hidden", {})
        parts = [node["class_type"], inputs]
        if self.registry.is_output(node["class_type"]) or "UNIQUE_ID" in hidden.values():
            parts.append(number)  # two Save Image nodes save two files
        if hasattr(kind, "IS_CHANGED"):
            values = {name: value for name, value in node["inputs"].items() if name not in wired}
            parts.append(_changed(kind, values))
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()

    def _is_kept(self, key: str) -> bool:
        """Whether a result is there and the files that it shows still are, too."""
        kept = self._kept.get(key)
        if kept is None:
            return False
        shown = (kept.shown or {}).get("images", [])
        locate = self.registry.folders.locate
        return all(locate(image["filename"], image["subfolder"], image["type"]).is_file() for image in shown)

    def _make_room(self) -> None:
        """Drop all results, so that the next run has all the memory there is."""
        self.forget()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _prune(self, prompt: Prompt, keys: dict[str, str]) -> None:
        """Drop results that this prompt has no use for; nodes that were not asked for now keep theirs."""
        current = set(keys.values())
        idle = prompt.keys() - keys.keys()
        self._kept = {key: kept for key, kept in self._kept.items() if key in current or kept.node_id in idle}

    def _explain(self, run: _Run, number: str, error: Exception) -> NodeError:
        """The error as a sentence; one that no user can mend goes into the log with its traceback."""
        class_type = run.prompt[number]["class_type"]
        kind = type(error).__qualname__
        title = self.registry.title(class_type)
        if memory_is_full(error):
            message = (
                "the memory is full; lower memory_limit where the model is loaded, or choose a smaller "
                "picture or batch"
            )
            log.error("node %s (%s): %s", number, title, message)
            return NodeError(number, class_type, message, kind)
        if isinstance(error, EXPECTED) and str(error):
            log.error("node %s (%s): %s", number, title, error)
            log.debug("it was raised here", exc_info=error)
            return NodeError(number, class_type, str(error), kind)
        log.error("node %s (%s) failed", number, title, exc_info=error)
        frames = traceback.format_tb(error.__traceback__)
        return NodeError(number, class_type, f"{title} failed with {kind}: {error}", kind, frames)


@dataclass
class _Run:
    """One run: its prompt, and what of it is told to whom."""

    prompt: Prompt
    prompt_id: str
    extra_pnginfo: dict[str, Any]
    on_event: OnEvent
    previews: bool
    stop: threading.Event
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    notices: dict[str, list[str]] = field(default_factory=dict)
    telling: bool = True
    next_step: float = 0.0

    def tell(self, kind: str, **data: Any) -> None:
        if kind.startswith("execution_"):
            data["timestamp"] = int(time.time() * 1000)
        self.on_event(kind, {"prompt_id": self.prompt_id, **data})

    def context(self, number: str) -> context.RunContext:
        """What the node may call."""
        return context.RunContext(
            number,
            self.progress,
            self.notice,
            self.preview if self.previews else None,
            self.stop,
        )

    def start(self, number: str) -> None:
        self.telling, self.next_step = True, 0.0
        self.tell("executing", node=number, display_node=number)
        self._state(number, 0, 1, "running")

    def finish(self, number: str, state: str) -> None:
        if number in self.states:
            self._state(number, *(self.states[number][part] for part in ("value", "max")), state)

    def progress(self, number: str, value: float, total: float) -> None:
        """Tell of a step, its preview too, unless another was told just now; of the last one always."""
        self.telling = value >= total or time.monotonic() >= self.next_step
        if self.telling:
            self.next_step = time.monotonic() + PAUSE
            self.tell("progress", node=number, value=value, max=total)
            self._state(number, value, total, "running")

    def notice(self, number: str, text: str) -> None:
        self.notices.setdefault(number, []).append(text)
        log.warning("node %s: %s", number, text)
        self.tell("notice", node_id=number, text=text)

    def preview(self, number: str, make: Callable[[], Any]) -> None:
        if self.telling:
            self.tell("preview", node_id=number, pixels=make())

    def _state(self, number: str, value: float, total: float, state: str) -> None:
        self.states[number] = {
            "value": total if state == "finished" else value,
            "max": total,
            "state": state,
            "node_id": number,
            "prompt_id": self.prompt_id,
            "display_node_id": number,
            "parent_node_id": None,
            "real_node_id": number,
        }
        self.tell("progress_state", nodes={key: dict(value) for key, value in self.states.items()})


def memory_is_full(error: Exception) -> bool:
    """Whether an error means that memory, a device's or the machine's, could not be had."""
    full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return full or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def context_check(stop: threading.Event) -> None:
    """Raise Interrupted between two nodes."""
    if stop.is_set():
        raise context.Interrupted


def _changed(node: type[Any], values: dict[str, Any]) -> str:
    """What IS_CHANGED says; something new when it says NaN ("always") or fails (the run tells why)."""
    try:
        answer = node.IS_CHANGED(**values)
    except Exception:
        answer = float("nan")
    return uuid.uuid4().hex if answer != answer else repr(answer)


def _error_event(run: _Run, error: NodeError, executed: list[str]) -> dict[str, Any]:
    """execution_error's data."""
    values = {
        name: [value if isinstance(value, (str, int, float, bool)) else str(value)]
        for name, value in run.prompt[error.node_id]["inputs"].items()
        if not isinstance(value, list)
    }
    return {
        "node_id": error.node_id,
        "node_type": error.class_type,
        "executed": executed,
        "exception_message": error.message,
        "exception_type": error.kind,
        "traceback": error.traceback,
        "current_inputs": values,
        "current_outputs": executed,
    }
