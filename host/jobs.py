"""The queue: one worker thread runs prompts in order; the last hundred are kept as history."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .execution import Executor, Result
from .run_events import NodeError
from .validation import Checked

log = logging.getLogger(__name__)

HISTORY_SIZE = 100
ACTIVE = ("in_progress", "pending")
ENDED = {"success": "completed", "error": "failed", "interrupted": "cancelled"}


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
            for node, output in self.outputs.items()
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
            "workflow_id": self.workflow.get("id"),
            "execution_error": next(
                (data for kind, data in self.messages if kind == "execution_error"), None
            ),
        }
        described = {
            name: value for name, value in described.items() if value is not None or name == "preview_output"
        }
        if full:
            described["outputs"] = self.outputs
            described["execution_status"] = self.summary()
            described["workflow"] = {"prompt": self.checked.prompt, "extra_data": self.extra_data}
        return described

    def summary(self) -> dict[str, Any]:
        """The status as /history reports it."""
        done = self.status == "completed"
        return {"status_str": "success" if done else "error", "completed": done, "messages": self.messages}

    def as_tuple(self) -> list[Any]:
        """The prompt as /queue and /history list it."""
        return [self.priority, self.id, self.checked.prompt, self.extra_data, self.checked.outputs]


class Jobs:
    """The queue and its worker thread.

    `on_event(job, kind, data)` is called from the worker thread; `on_change()` (the queue's length changed)
    also from the thread that submits or cancels. `history_size`: how many ended jobs are kept.
    """

    def __init__(
        self,
        executor: Executor,
        on_event: Callable[[Job, str, dict[str, Any]], None],
        on_change: Callable[[], None],
        history_size: int = HISTORY_SIZE,
    ) -> None:
        self._executor = executor
        self._on_event = on_event
        self._on_change = on_change
        self._history_size = history_size
        self._changed = threading.Condition()
        self._jobs: dict[str, Job] = {}
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
            for job in self._jobs.values():
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
        front: bool = False,
    ) -> Job:
        """Append a job to the queue, or put it first. Raises ValueError for an id that is in use."""
        with self._changed:
            if job_id in self._jobs:
                raise ValueError(f"job {job_id} exists already; use another prompt_id")
            self._count += 1
            priority = -self._count if front else self._count
            job = Job(checked, extra_data, client_id, priority, job_id or str(uuid.uuid4()))
            self._jobs[job.id] = job
            self._changed.notify_all()
        self._on_change()
        return job

    def find(self, job_id: str) -> Job | None:
        """The job with this id, None when it is unknown."""
        return self._jobs.get(job_id)

    def listed(self, statuses: tuple[str, ...]) -> list[Job]:
        """Jobs with these statuses: active ones in the order they run, then ended ones, newest first."""
        with self._changed:
            jobs = [job for job in self._jobs.values() if job.status in statuses]
        active = sorted((job for job in jobs if job.status in ACTIVE), key=lambda job: job.priority)
        active.sort(key=lambda job: ACTIVE.index(job.status))
        return active + sorted(
            (job for job in jobs if job.status not in ACTIVE), key=lambda job: job.ended or 0, reverse=True
        )

    def remaining(self) -> int:
        """How many jobs are running or pending."""
        return len(self.listed(ACTIVE))

    def interrupt(self, job_id: str | None = None) -> None:
        """Stop the running job, or only if it has this id."""
        for job in self.listed(("in_progress",)):
            if job_id in (None, job.id):
                job.stop.set()

    def cancel(self, job_id: str) -> bool:
        """Stop a running job or remove a pending one; False when it is neither."""
        with self._changed:
            job = self._jobs.get(job_id)
            if job is None or job.status not in ACTIVE:
                return False
            job.stop.set()
            if job.status == "pending":
                del self._jobs[job_id]
        self._on_change()
        return True

    def clear_history(self, job_ids: list[str] | None = None) -> None:
        """Remove ended jobs, these or all. Their images stay on disk."""
        with self._changed:
            for job in [job for job in self._jobs.values() if job.status not in ACTIVE]:
                if job_ids is None or job.id in job_ids:
                    del self._jobs[job.id]

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
                pending = [job for job in self._jobs.values() if job.status == "pending"]
                if pending:
                    job = min(pending, key=lambda job: job.priority)
                    job.status, job.started = "in_progress", now()
                    return job
                self._changed.wait()
        return None

    def _work(self) -> None:
        """Run jobs until `close`. No error of a job or a listener ends the worker."""
        while not self._closing:
            try:
                if (job := self._next()) is not None:
                    self._supervise(job)
            except Exception:
                log.exception("the queue's worker failed between two jobs; it continues")

    def _supervise(self, job: Job) -> None:
        try:
            self._run(job)
        except BaseException:  # SystemExit included: the next job still runs
            log.exception("job %s failed outside any node; the queue continues", job.id)
            if job.status == "in_progress":
                self._end(job, "failed")
            self._on_change()

    def _run(self, job: Job) -> None:
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

        try:
            result = self._executor.run(
                job.checked,
                on_event=on_event,
                prompt_id=job.id,
                extra_pnginfo=job.pnginfo,
                previews=job.extra_data.get("preview_method") != "none",
                stop=job.stop,
            )
        except Exception as error:  # a fault of the host itself; the worker continues with the next job
            message = f"the run failed outside any node with {type(error).__name__}: {error}"
            found = NodeError("", "", message, type(error).__name__)
            result = Result("error", job.outputs, [], found)
            on_event("execution_error", {"prompt_id": job.id, "node_id": "", "exception_message": message})
        self._end(job, ENDED[result.status])
        self._on_event(job, "executing", {"node": None, "prompt_id": job.id})
        for node, texts in job.notices.items():  # again: the editor clears them when a job ends
            self._on_event(job, "notice", {"node_id": node, "prompt_id": job.id, "text": "\n".join(texts)})
        self._on_change()

    def _end(self, job: Job, status: str) -> None:
        """Record how a job ended, and remove the oldest ended jobs beyond the history's size."""
        with self._changed:
            job.node, job.status, job.ended = None, status, now()
            ended = [other for other in self._jobs.values() if other.status not in ACTIVE]
            for old in sorted(ended, key=lambda other: other.ended or 0)[: -self._history_size]:
                del self._jobs[old.id]
