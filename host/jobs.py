"""The queue: one worker thread runs prompts in order; ended ones are kept as history.

Whatever ends a job, a BaseException of a native library included, the job records what happened and the next
one runs.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .execution import Executor
from .json_reader import quoted
from .json_writer import to_json
from .validation import Checked, Prompt

log = logging.getLogger(__name__)

HISTORY_SIZE = 10_000
"""Ended jobs that are kept, as in ComfyUI."""
HISTORY_BYTES = 64 * 2**20
"""Bytes of the ended jobs that are kept; with larger workflows the history is shorter."""
QUEUE_SIZE = 10_000
ACTIVE = ("in_progress", "pending")
ENDED = {"success": "completed", "error": "failed", "interrupted": "cancelled"}


class QueueFull(RuntimeError):
    """No job can be added; the message is one sentence for the user."""


def now() -> int:
    """Milliseconds since 1970, as the editor counts time."""
    return int(time.time() * 1000)


@dataclass
class Job:
    """One submitted prompt. `status`: pending, in_progress, completed, failed or cancelled."""

    checked: Checked
    extra_data: dict[str, Any]
    client_id: str | None
    priority: float
    """Pending jobs run in ascending order of this."""
    id: str
    status: str = "pending"
    created: int = field(default_factory=now)
    started: int | None = None
    ended: int | None = None
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    notices: dict[str, list[str]] = field(default_factory=dict)
    node: str | None = None
    """Id of the node that runs."""
    stop: threading.Event = field(default_factory=threading.Event)
    workflow_id: str | None = None
    _archive: bytes | None = None

    def __post_init__(self) -> None:
        found = self.workflow.get("id")
        self.workflow_id = found if isinstance(found, str) else None

    @property
    def workflow(self) -> dict[str, Any]:
        """The saved graph; empty when the prompt was submitted without one."""
        found = self.pnginfo.get("workflow")
        return found if isinstance(found, dict) else {}

    @property
    def pnginfo(self) -> dict[str, Any]:
        """What SaveImage writes into the image file: {"workflow": the saved graph}; empty without it."""
        found = self.extra_data.get("extra_pnginfo") if isinstance(self.extra_data, dict) else None
        return found if isinstance(found, dict) else {}

    def describe(self, full: bool = False) -> dict[str, Any]:
        """The job as GET /jobs lists it; `full` adds what GET /jobs/{id} returns beyond that."""
        shown = [
            {**image, "nodeId": node, "mediaType": "images"}
            for node, output in dict(self.outputs).items()
            for image in output.get("images", [])
        ]
        saved = [image for image in shown if image["type"] == "output"]
        described: dict[str, Any] = {
            "id": self.id,
            "status": self.status,
            "priority": self.priority,
            "create_time": self.created,
            "execution_start_time": self.started,
            "execution_end_time": self.ended,
            "outputs_count": len(shown),
            "previewable_outputs_count": len(shown),
            "preview_output": (saved or shown or [None])[0],
            "workflow_id": self.workflow_id,
            "execution_error": self.error(),
        }
        described = {
            name: value for name, value in described.items() if value is not None or name == "preview_output"
        }
        if full:
            described["outputs"] = self.outputs
            described["execution_status"] = self.summary()
            prompt, extra_data = self.request()
            described["workflow"] = {"prompt": prompt, "extra_data": extra_data}
        return described

    def error(self) -> dict[str, Any] | None:
        """The data of the message that the job failed with."""
        return next((data for kind, data in self.messages if kind == "execution_error"), None)

    def request(self) -> tuple[Prompt, dict[str, Any]]:
        """The prompt and the extra data, also of an archived job."""
        prompt, extra_data = self.checked.prompt, self.extra_data
        if self._archive is not None:  # set before the fields are cleared
            prompt, extra_data = json.loads(zlib.decompress(self._archive))
        return prompt, extra_data

    def archive(self) -> int:
        """Compress what an ended job only shows; returns the bytes that the job still takes, about."""
        request = to_json([self.checked.prompt, self.extra_data]).encode()
        self._archive = zlib.compress(request, 1)
        self.checked, self.extra_data = replace(self.checked, prompt={}, node_errors={}), {}
        return len(self._archive) + len(to_json([self.outputs, self.messages]))

    def summary(self) -> dict[str, Any]:
        """The status as /history reports it."""
        done = self.status == "completed"
        return {"status_str": "success" if done else "error", "completed": done, "messages": self.messages}

    def as_tuple(self) -> list[Any]:
        """The prompt as /queue and /history list it."""
        return [self.priority, self.id, *self.request(), self.checked.outputs]


class Jobs:
    """The queue and its worker thread.

    `on_event(job, kind, data)` is called from the worker thread; `on_change()` (the queue's length changed)
    also from the thread that submits or cancels. `history_size`: how many ended jobs are kept, unless they
    exceed `history_bytes`.
    """

    def __init__(
        self,
        executor: Executor,
        on_event: Callable[[Job, str, dict[str, Any]], None],
        on_change: Callable[[], None],
        history_size: int = HISTORY_SIZE,
        history_bytes: int = HISTORY_BYTES,
    ) -> None:
        self._executor = executor
        self._on_event = on_event
        self._on_change = on_change
        self._history_size = history_size
        self._history_bytes = history_bytes
        self._changed = threading.Condition()
        self._active: dict[str, Job] = {}
        self._ended: dict[str, Job] = {}  # oldest first
        self._sizes: dict[str, int] = {}  # bytes of the ended jobs
        self._count = 0
        self._closing = False
        self._clear_cache = False
        self._thread = threading.Thread(target=self._work, name="rectiflux-worker", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._thread.start()

    def close(self) -> None:
        """Interrupt the running job and end the worker; waits up to five seconds for the running node."""
        with self._changed:
            self._closing = True
            for job in self._active.values():
                job.stop.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def submit(
        self,
        checked: Checked,
        extra_data: dict[str, Any],
        client_id: str | None = None,
        job_id: str | None = None,
        priority: float | None = None,
        front: bool = False,
    ) -> Job:
        """Append a job to the queue, put it first, or where `priority` says.

        Raises ValueError for an id that is in use, QueueFull.
        """
        with self._changed:
            if job_id in self._active or job_id in self._ended:
                raise ValueError(f"job {job_id} exists already; use another prompt_id")
            if len(self._active) >= QUEUE_SIZE:
                raise QueueFull(f"{QUEUE_SIZE:,} jobs wait already, which is the limit; wait, or cancel some")
            self._count += 1
            if priority is None:
                priority = -self._count if front else self._count
            job = Job(checked, extra_data, client_id, priority, job_id or str(uuid.uuid4()))
            self._active[job.id] = job
            self._changed.notify_all()
        self._on_change()
        return job

    def find(self, job_id: str) -> Job | None:
        """The job with this id, None when it is unknown."""
        with self._changed:
            return self._active.get(job_id) or self._ended.get(job_id)

    def listed(self, statuses: tuple[str, ...]) -> list[Job]:
        """Jobs with these statuses: active ones in the order they run, then ended ones, newest first."""
        with self._changed:
            active, ended = list(self._active.values()), list(reversed(self._ended.values()))
        active.sort(key=lambda job: (job.status == "pending", job.priority))
        return [job for job in active + ended if job.status in statuses]

    def remaining(self) -> int:
        """How many jobs are running or pending."""
        return len(self._active)

    def interrupt(self, job_id: str | None = None) -> None:
        """Stop the running job, or only if it has this id."""
        for job in self.listed(("in_progress",)):
            if job_id in (None, job.id):
                job.stop.set()

    def cancel(self, job_id: str) -> bool:
        """Stop a running job or remove a pending one; False when it is neither."""
        with self._changed:
            job = self._active.get(job_id)
            if job is None:
                return False
            job.stop.set()
            if job.status == "pending":
                del self._active[job_id]
        self._on_change()
        return True

    def clear_history(self, job_ids: list[str] | None = None) -> None:
        """Remove ended jobs, these or all. Their images stay on disk."""
        with self._changed:
            for job_id in list(self._ended) if job_ids is None else job_ids:
                self._forget(job_id)

    def _forget(self, job_id: str) -> None:
        self._ended.pop(job_id, None)
        self._sizes.pop(job_id, None)

    def free_memory(self) -> None:
        """Drop cached results and models before the next run, or now if nothing runs."""
        with self._changed:
            self._clear_cache = True
            self._changed.notify_all()

    def _next(self) -> Job | None:
        """Wait for a job; None when the worker must end."""
        with self._changed:
            while not self._closing:
                if self._clear_cache:
                    self._clear_cache = False
                    self._executor.clear_cache()
                pending = [job for job in self._active.values() if job.status == "pending"]
                if pending:
                    job = min(pending, key=lambda job: job.priority)
                    job.status, job.started = "in_progress", now()
                    return job
                self._changed.wait()
        return None

    def _work(self) -> None:
        """Run jobs until `close`. Nothing that a job or a listener raises ends the worker."""
        while not self._closing:
            try:
                if (job := self._next()) is not None:
                    self._run(job)
            except BaseException:  # SystemExit included: this thread is the only one that runs jobs
                log.exception("the queue's worker failed between two jobs; it continues")

    def _run(self, job: Job) -> None:
        status = "failed"
        try:
            status = self._execute(job)
        except BaseException as error:  # also of native libraries, whose panics are no Exception
            self._guarded(self._record_failure, job, error)
        finally:
            self._end(job, status)
        self._guarded(self._on_event, job, "executing", {"node": None, "prompt_id": job.id})
        for node, texts in job.notices.items():  # again: the editor clears them when a job ends
            data = {"node_id": node, "prompt_id": job.id, "text": "\n".join(texts)}
            self._guarded(self._on_event, job, "notice", data)
        self._guarded(self._on_change)

    def _execute(self, job: Job) -> str:
        """Run a job; returns its status at the end."""

        def on_event(kind: str, data: dict[str, Any]) -> None:
            if kind == "executing":
                job.node = data["node"]
            if kind.startswith("execution_"):
                job.messages.append((kind, data))
            if kind == "executed":
                job.outputs[data["node"]] = data["output"]
            if kind == "notice":
                job.notices.setdefault(data["node_id"], []).append(data["text"])
            self._on_event(job, kind, data)

        result = self._executor.run(
            job.checked,
            on_event=on_event,
            prompt_id=job.id,
            extra_pnginfo=job.pnginfo,
            previews=job.extra_data.get("preview_method") != "none",
            stop=job.stop,
        )
        return ENDED[result.status]

    def _record_failure(self, job: Job, error: BaseException) -> None:
        """Record and report a failure outside any node, unless the node's error was recorded before."""
        log.error("job %s failed outside any node", job.id, exc_info=error)
        if job.error() is not None:
            return
        kind = type(error).__name__
        node = job.checked.prompt.get(job.node or "", {})
        data = {
            "prompt_id": job.id,
            "node_id": job.node or "",
            "node_type": node.get("class_type", ""),
            "executed": [],
            "exception_message": f"the run failed outside any node with {kind}: {quoted(str(error))}",
            "exception_type": kind,
            "traceback": [],
            "current_inputs": {},
            "current_outputs": [],
            "timestamp": now(),
        }
        job.messages.append(("execution_error", data))
        self._on_event(job, "execution_error", data)

    @staticmethod
    def _guarded(call: Callable[..., None], *arguments: Any) -> None:
        """Call a function whose failure must not disturb the queue."""
        try:
            call(*arguments)
        except BaseException:
            log.exception("a message about the queue could not be sent; the queue continues")

    def _end(self, job: Job, status: str) -> None:
        """Record how a job ended, and remove the oldest ended jobs beyond the history's size."""
        job.node, job.status, job.ended = None, status, now()
        size = job.archive()
        with self._changed:
            self._active.pop(job.id, None)
            self._ended[job.id], self._sizes[job.id] = job, size
            while len(self._ended) > self._history_size or sum(self._sizes.values()) > self._history_bytes:
                self._forget(next(iter(self._ended)))
