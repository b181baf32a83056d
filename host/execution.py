"""Runs a validated prompt: each node after its inputs, and only nodes whose inputs have changed since.

The last prompt's results are cached. The events that a run sends are described in run_events.py.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import threading
import traceback
import uuid
from dataclasses import dataclass
from typing import Any

import torch

from . import context, freed_memory
from .files import SaveError
from .prompt_graph import Prompt, links, order
from .registry import Registry
from .run_events import PROGRESS_INTERVAL, NodeError, OnEvent, RunEvents
from .validation import Checked

log = logging.getLogger(__name__)

EXPECTED = (ValueError, TypeError, OSError, SaveError)
"""Errors with which nodes address the user: shown as one sentence, without a traceback."""


@dataclass(frozen=True)
class Result:
    """How a run ended. `status`: "success", "error" or "interrupted"."""

    status: str
    outputs: dict[str, dict[str, Any]]
    """{node id: what it shows}, as {"images": [{"filename", "subfolder", "type"}]}; see Folders.locate"""
    executed: list[str]
    """Ids of the nodes that ran; the others' results came from the cache."""
    error: NodeError | None = None

    def images(self, kind: str = "output") -> list[dict[str, str]]:
        """The images saved in a folder ("output" or "temp"), in the order in which they were saved."""
        shown = [image for output in self.outputs.values() for image in output.get("images", [])]
        return [image for image in shown if image["type"] == kind]


@dataclass(frozen=True)
class _CachedResult:
    """A node's return values, and the node id under which it last stood in a prompt."""

    node_id: str
    values: tuple[Any, ...]
    shown: dict[str, Any] | None
    notices: list[str]


class Executor:
    """Runs prompts, one at a time, and caches the last one's results.

    `progress_interval`: seconds at least between two progress events of a node.
    """

    def __init__(self, registry: Registry, progress_interval: float = PROGRESS_INTERVAL) -> None:
        self.registry = registry
        self.progress_interval = progress_interval
        self._cache: dict[str, _CachedResult] = {}

    def clear_cache(self) -> None:
        """Drop all results, and with them the models they hold."""
        self._cache.clear()
        freed_memory.return_to_system()

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
        """Run what `validate` returned. A node's error is part of the result and is not raised.

        `extra_pnginfo` ({"workflow": the saved graph}) is written into the images; set `stop` to interrupt.
        """
        events = RunEvents(
            checked.prompt,
            prompt_id or str(uuid.uuid4()),
            extra_pnginfo or {},
            on_event or (lambda kind, data: None),
            previews,
            stop or threading.Event(),
            self.progress_interval,
        )
        with context.using(self.registry.folders), torch.no_grad():
            result = self._run(events, order(checked.prompt, checked.outputs))
        if result.executed:
            freed_memory.return_to_system()
        return result

    def _run(self, events: RunEvents, needed: list[str]) -> Result:
        events.send("execution_start")
        keys: dict[str, str] = {}
        for node_id in needed:
            keys[node_id] = self._key(events.prompt, node_id, keys)
        cached = [node_id for node_id in needed if self._is_cached(keys[node_id])]
        events.send("execution_cached", nodes=sorted(cached))
        executed: list[str] = []
        outputs: dict[str, dict[str, Any]] = {}
        node_id = ""
        try:
            for node_id in needed:
                shown = self._run_node(events, node_id, keys, executed)
                if shown is not None:
                    outputs[node_id] = shown
                    events.send("executed", node=node_id, display_node=node_id, output=shown)
        except context.Interrupted:
            events.interrupted(node_id, executed)
            return Result("interrupted", outputs, executed)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # also what no Exception is: a panic of the tokenizers library
            failure, is_full = self._describe(events, node_id, error), is_out_of_memory(error)
            events.failed(failure, executed)
        else:
            events.send("execution_success")
            return Result("success", outputs, executed)
        finally:
            self._prune(events.prompt, keys)
        if is_full:  # outside the except block: the error's frames hold the node's tensors until it ends
            self._free_memory()
        return Result("error", outputs, executed, failure)

    def _run_node(
        self, events: RunEvents, node_id: str, keys: dict[str, str], executed: list[str]
    ) -> dict[str, Any] | None:
        """What a node shows, from the cache or by running it. Raises what the node raises."""
        key = keys[node_id]
        if self._is_cached(key):
            for text in self._cache[key].notices:  # they still apply
                events.notice(node_id, text)
        else:
            events.check_stop()
            self._cache[key] = self._execute(events, node_id, keys)
            executed.append(node_id)
        return self._cache[key].shown

    def _execute(self, events: RunEvents, node_id: str, keys: dict[str, str]) -> _CachedResult:
        """Call one node. Raises what it raises."""
        node = self.registry[events.prompt[node_id]["class_type"]]
        events.start(node_id)
        with context.running(events.context(node_id)):
            returned = getattr(node(), node.FUNCTION)(**self._arguments(events, node_id, keys))
        shown = returned.get("ui") if isinstance(returned, dict) else None
        values = returned.get("result", ()) if isinstance(returned, dict) else returned
        if not isinstance(values, tuple) or len(values) < len(node.RETURN_TYPES):
            raise RuntimeError(
                f"the node must return {len(node.RETURN_TYPES)} values, got {type(values).__name__}"
            )
        events.finish(node_id, "finished")
        return _CachedResult(node_id, values, shown, events.notices.get(node_id, []))

    def _arguments(self, events: RunEvents, node_id: str, keys: dict[str, str]) -> dict[str, Any]:
        """A node's arguments: widget values, values of its wires, and hidden inputs."""
        node = events.prompt[node_id]
        inputs = self.registry.inputs(node["class_type"])
        known = inputs.get("required", {}).keys() | inputs.get("optional", {}).keys()
        arguments = {name: value for name, value in node["inputs"].items() if name in known}
        for name, (source, slot) in links(node).items():
            if name in known:
                arguments[name] = self._cache[keys[source]].values[slot]
        hidden = {"PROMPT": events.prompt, "EXTRA_PNGINFO": events.extra_pnginfo, "UNIQUE_ID": node_id}
        return arguments | {name: hidden.get(kind) for name, kind in inputs.get("hidden", {}).items()}

    def _key(self, prompt: Prompt, node_id: str, keys: dict[str, str]) -> str:
        """A digest of all that a result depends on: the class, the values, and the keys of its inputs."""
        node = prompt[node_id]
        wired = links(node)
        inputs = {
            name: ["wire", keys.get(wired[name][0]), wired[name][1]] if name in wired else ["value", value]
            for name, value in node["inputs"].items()
        }
        node_class = self.registry[node["class_type"]]
        hidden = self.registry.inputs(node["class_type"]).get("hidden", {})
        parts = [node["class_type"], inputs]
        if self.registry.is_output(node["class_type"]) or "UNIQUE_ID" in hidden.values():
            parts.append(node_id)  # two Save Image nodes save two files
        if hasattr(node_class, "IS_CHANGED"):
            values = {name: value for name, value in node["inputs"].items() if name not in wired}
            parts.append(_change_token(node_class, values))
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()

    def _is_cached(self, key: str) -> bool:
        """Whether the result is cached and the files that it shows still exist."""
        cached = self._cache.get(key)
        if cached is None:
            return False
        shown = (cached.shown or {}).get("images", [])
        locate = self.registry.folders.locate
        return all(locate(image["filename"], image["subfolder"], image["type"]).is_file() for image in shown)

    def _free_memory(self) -> None:
        """Drop all results, so that the next run has all the memory."""
        self.clear_cache()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _prune(self, prompt: Prompt, keys: dict[str, str]) -> None:
        """Drop results that this prompt does not use; keep those of nodes outside the requested targets."""
        current = set(keys.values())
        idle = prompt.keys() - keys.keys()
        self._cache = {
            key: cached for key, cached in self._cache.items() if key in current or cached.node_id in idle
        }

    def _describe(self, events: RunEvents, node_id: str, error: BaseException) -> NodeError:
        """The error as one sentence; an unexpected one is logged with its traceback."""
        class_type = events.prompt[node_id]["class_type"]
        kind = type(error).__qualname__
        title = self.registry.title(class_type)
        if is_out_of_memory(error):
            message = (
                "out of memory; lower memory_limit where the model is loaded, "
                "or choose a smaller image or batch"
            )
        elif isinstance(error, EXPECTED) and str(error):
            message = str(error)
        else:
            log.error("node %s (%s) failed", node_id, title, exc_info=error)
            frames = traceback.format_tb(error.__traceback__)
            return NodeError(node_id, class_type, f"{title} failed with {kind}: {error}", kind, frames)
        log.error("node %s (%s): %s", node_id, title, message)
        log.debug("traceback of the error above", exc_info=error)
        return NodeError(node_id, class_type, message, kind)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation on a device or in main memory failed."""
    failed = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return failed or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _change_token(node: type[Any], values: dict[str, Any]) -> str:
    """IS_CHANGED's answer; a unique token if it is NaN ("always changed") or fails (the run reports it)."""
    try:
        answer = node.IS_CHANGED(**values)
    except Exception:
        answer = float("nan")
    return uuid.uuid4().hex if answer != answer else repr(answer)
