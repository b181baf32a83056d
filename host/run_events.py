"""The events of one run: the editor's WebSocket messages, rate-limited progress, and notices.

Events go to `on_event(kind, data)`; kinds and data are those of the editor's WebSocket messages:
execution_start, execution_cached, executing, progress, progress_state, executed, execution_success,
execution_error and execution_interrupted. Two kinds are our own: "preview" {node_id, prompt_id, pixels
[h, w, 3] uint8} and "notice" {node_id, prompt_id, text}. They are sent from the thread that runs the prompt.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import context
from .prompt_graph import Prompt

log = logging.getLogger(__name__)

OnEvent = Callable[[str, dict[str, Any]], None]
MAX_STATES = 64
"""Nodes in one progress_state; each message has them all, so their number is bounded."""
PROGRESS_INTERVAL = 0.1  # seconds; with more messages than this the browser lags behind


@dataclass(frozen=True)
class NodeError:
    """The error that stopped a run. `traceback` is empty for errors that the user can fix."""

    node_id: str
    class_type: str
    message: str
    kind: str
    traceback: list[str] = field(default_factory=list)


@dataclass
class RunEvents:
    """One run: its prompt, and the listener of its events."""

    prompt: Prompt
    prompt_id: str
    extra_pnginfo: dict[str, Any]
    on_event: OnEvent
    previews: bool
    stop: threading.Event
    interval: float = PROGRESS_INTERVAL
    """Seconds at least between two progress messages of a node."""
    notices: dict[str, list[str]] = field(default_factory=dict)
    """{node id: its notices}"""
    _states: dict[str, dict[str, Any]] = field(default_factory=dict)
    _step_is_sent: bool = True
    _next_step: float = 0.0

    def send(self, kind: str, **data: Any) -> None:
        """Send one event."""
        if kind.startswith("execution_"):
            data["timestamp"] = int(time.time() * 1000)
        self.on_event(kind, {"prompt_id": self.prompt_id, **data})

    def context(self, node_id: str) -> context.RunContext:
        """The context a node runs in."""
        on_preview = self.preview if self.previews else None
        return context.RunContext(node_id, self.progress, self.notice, on_preview, self.stop)

    def check_stop(self) -> None:
        """Raise Interrupted when the user has stopped the run."""
        if self.stop.is_set():
            raise context.Interrupted

    def start(self, node_id: str) -> None:
        """Report that a node starts."""
        self._step_is_sent, self._next_step = True, 0.0
        self.send("executing", node=node_id, display_node=node_id)
        self._set_state(node_id, 0, 1, "running")

    def finish(self, node_id: str, state: str) -> None:
        """Report that a node, if it has started, ended as "finished" or "error"."""
        if (last := self._states.get(node_id)) is not None:
            self._set_state(node_id, last["value"], last["max"], state)

    def progress(self, node_id: str, value: float, total: float) -> None:
        """Report a step unless the previous report is less than `interval` old; always report the last."""
        self._step_is_sent = value >= total or time.monotonic() >= self._next_step
        if self._step_is_sent:
            self._next_step = time.monotonic() + self.interval
            self.send("progress", node=node_id, value=value, max=total)
            self._set_state(node_id, value, total, "running")

    def notice(self, node_id: str, text: str) -> None:
        """Report a node's notice."""
        self.notices.setdefault(node_id, []).append(text)
        log.warning("node %s: %s", node_id, text)
        self.send("notice", node_id=node_id, text=text)

    def preview(self, node_id: str, make: Callable[[], Any]) -> None:
        """Send the preview of a step whose progress was sent."""
        if self._step_is_sent:
            self.send("preview", node_id=node_id, pixels=make())

    def interrupted(self, node_id: str, executed: list[str]) -> None:
        """Report that the user stopped the run at this node."""
        self.finish(node_id, "error")
        class_type = self.prompt[node_id]["class_type"]
        self.send("execution_interrupted", node_id=node_id, node_type=class_type, executed=executed)

    def failed(self, error: NodeError, executed: list[str]) -> None:
        """Report that a node failed."""
        self.finish(error.node_id, "error")
        values = {
            name: [value if isinstance(value, (str, int, float, bool)) else str(value)]
            for name, value in self.prompt[error.node_id]["inputs"].items()
            if not isinstance(value, list)
        }
        self.send(
            "execution_error",
            node_id=error.node_id,
            node_type=error.class_type,
            executed=executed,
            exception_message=error.message,
            exception_type=error.kind,
            traceback=error.traceback,
            current_inputs=values,
            current_outputs=executed,
        )

    def _set_state(self, node_id: str, value: float, total: float, state: str) -> None:
        """Send the states of the last MAX_STATES nodes."""
        if node_id not in self._states and len(self._states) >= MAX_STATES:
            del self._states[next(iter(self._states))]
        self._states[node_id] = {
            "value": total if state == "finished" else value,
            "max": total,
            "state": state,
            "node_id": node_id,
            "prompt_id": self.prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }
        self.send("progress_state", nodes={key: dict(value) for key, value in self._states.items()})
