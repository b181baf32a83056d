"""The queue: order, cancelling, interrupting, history, and a worker that no error ends."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rectiflux.host import jobs
from rectiflux.host.execution import Executor, Result
from rectiflux.host.files import Folders
from rectiflux.host.jobs import Job, Jobs
from rectiflux.host.registry import Registry
from rectiflux.host.validation import validate

TIMEOUT = 60  # seconds, until a test fails

Listener = Callable[[Job, str], None]


class Queue:
    """Jobs whose worker waits at the start of each job until `finish`; `listen` may raise in on_event."""

    def __init__(self, executor: Executor, prompts: Any, listen: Listener, **options: Any) -> None:
        self.prompts = prompts
        self.registry = executor.registry
        self.events: list[tuple[str, str]] = []
        self.gate = threading.Event()
        self.idle = threading.Event()
        self.listen = listen
        self.change_fails = False
        self.jobs = Jobs(executor, self.on_event, self.on_change, **options)

    def on_event(self, job: Job, kind: str, data: dict[str, Any]) -> None:
        self.listen(job, kind)
        self.events.append((job.id, kind))
        if kind == "execution_start":
            assert self.gate.wait(TIMEOUT)

    def on_change(self) -> None:
        if self.jobs.remaining() == 0:
            self.idle.set()
        if self.change_fails:
            raise Panic("the queue's length cannot be sent")

    def submit(self, job_id: str, a: int = 2, extra: Any = None, **options: Any) -> Job:
        checked = validate(self.prompts.image(a), self.registry)
        return self.jobs.submit(checked, {} if extra is None else extra, job_id=job_id, **options)

    def finish(self) -> None:
        """Open the gate and wait until every job has ended."""
        self.gate.set()
        assert self.idle.wait(TIMEOUT)

    def run(self) -> None:
        self.jobs.start()
        self.finish()

    def ids(self, *statuses: str) -> list[str]:
        return [job.id for job in self.jobs.listed(statuses)]


@pytest.fixture
def make_queue(registry: Registry, prompts: Any) -> Iterator[Callable[..., Queue]]:
    queues: list[Queue] = []

    def make(
        executor: Executor | None = None, listen: Listener = lambda job, kind: None, **options: Any
    ) -> Queue:
        queues.append(Queue(executor or Executor(registry), prompts, listen, **options))
        return queues[-1]

    yield make
    for queue in queues:
        queue.gate.set()
        queue.jobs.close()


@pytest.fixture
def queue(make_queue: Callable[..., Queue]) -> Queue:
    return make_queue()


def test_jobs_run_in_order_and_one_may_be_put_first(queue: Queue) -> None:
    for job_id in "abc":
        queue.submit(job_id, front=job_id == "c")
    with pytest.raises(ValueError, match="job a exists already"):
        queue.submit("a")
    assert queue.ids("pending") == ["c", "a", "b"] and queue.jobs.remaining() == 3
    queue.run()
    assert [job_id for job_id, kind in queue.events if kind == "execution_start"] == ["c", "a", "b"]
    assert sorted(queue.ids("completed")) == ["a", "b", "c"] and queue.jobs.remaining() == 0


def test_the_description_of_a_job(queue: Queue) -> None:
    extra = {"extra_pnginfo": {"workflow": {"id": "w"}}}
    job = queue.submit("a", extra=extra)
    assert job.describe()["status"] == "pending" and job.describe()["preview_output"] is None
    queue.run()
    found = job.describe(full=True)
    assert found["status"] == "completed" and found["workflow_id"] == "w"
    assert (found["outputs_count"], found["previewable_outputs_count"]) == (1, 1)
    shown = {"filename": "sum_00001_.png", "subfolder": "", "type": "output"}
    assert found["preview_output"] == {**shown, "nodeId": "5", "mediaType": "images"}
    assert found["create_time"] <= found["execution_start_time"] <= found["execution_end_time"]
    assert found["workflow"] == {"prompt": queue.prompts.image(), "extra_data": extra}
    assert found["execution_status"]["status_str"] == "success"
    assert queue.events[-2:] == [("a", "executing"), ("a", "notice")], "notices are repeated at the end"


def test_cancelling_and_interrupting(queue: Queue) -> None:
    for job_id in "abcd":
        queue.submit(job_id)
    assert queue.jobs.cancel("b") and not queue.jobs.cancel("b") and not queue.jobs.cancel("unknown")
    queue.jobs.interrupt()  # nothing runs yet
    queue.jobs.start()
    while not queue.events:
        threading.Event().wait(0.01)
    queue.jobs.interrupt("d")  # not the running one
    assert queue.jobs.cancel("a")
    queue.finish()
    assert queue.ids("cancelled") == ["a"] and sorted(queue.ids("completed")) == ["c", "d"]
    assert not queue.jobs.cancel("a"), "it has ended already"
    assert ("a", "execution_interrupted") in queue.events


def test_history_is_bounded_and_can_be_cleared(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(history_size=2)
    for job_id in "abcd":
        queue.submit(job_id)
    queue.run()
    left = queue.ids("completed")
    assert len(left) == 2
    queue.jobs.clear_history([left[0]])
    assert queue.ids("completed") == left[1:]
    queue.jobs.clear_history()
    assert queue.ids("completed") == []


def test_history_is_bounded_in_bytes(make_queue: Callable[..., Queue]) -> None:
    """A request is compressed once its job has ended, so incompressible text is needed."""
    queue = make_queue(history_bytes=200_000)
    text = "".join(hashlib.sha256(str(number).encode()).hexdigest() for number in range(4000))
    for job_id in "abc":
        queue.submit(job_id, extra={"text": text})
    queue.run()
    assert len(queue.ids("completed")) == 1 and queue.ids("completed") == ["c"]
    found = queue.jobs.find("c")
    assert found is not None and found.request() == (queue.prompts.image(), {"text": text})


def test_a_prompts_number_is_its_place_in_the_queue(queue: Queue) -> None:
    for job_id, priority in (("a", None), ("b", None), ("c", 1.5), ("d", -3)):
        queue.submit(job_id, priority=priority)
    assert queue.ids("pending") == ["d", "a", "c", "b"]


def test_a_full_queue_refuses_more(make_queue: Callable[..., Queue], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "QUEUE_SIZE", 2)
    queue = make_queue()
    for job_id in "ab":
        queue.submit(job_id)
    with pytest.raises(jobs.QueueFull, match="2 jobs wait already"):
        queue.submit("c")


def test_a_failed_job_is_kept_and_the_next_one_runs(queue: Queue) -> None:
    failed = queue.submit("a", 7)
    queue.submit("b", 6)
    queue.run()
    assert queue.ids("failed") == ["a"] and queue.ids("completed") == ["b"]
    error = failed.describe()["execution_error"]
    assert error["exception_message"] == "seven is refused; choose another number" and error["node_id"] == "3"


class Panic(BaseException):
    """What a native library raises when it panics, as the tokenizers library does."""


FAULTS = [RuntimeError("a bug"), Panic("half an emoji"), SystemExit(1), KeyboardInterrupt(), MemoryError()]


class FirstRunFails(Executor):
    """An executor that fails outside any node."""

    fault: BaseException | None = None

    def run(self, *args: Any, **options: Any) -> Result:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        return super().run(*args, **options)


def raises(error: BaseException, kinds: tuple[str, ...] = ()) -> Listener:
    """A listener that fails in events of job a: all, or those of some kinds."""

    def listen(job: Job, kind: str) -> None:
        if job.id == "a" and (not kinds or kind in kinds):
            raise error

    return listen


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("place", ["run", "events"])
def test_no_error_outside_the_nodes_ends_the_worker(
    make_queue: Callable[..., Queue], registry: Registry, fault: BaseException, place: str
) -> None:
    executor = FirstRunFails(registry)
    executor.fault = fault if place == "run" else None
    queue = make_queue(executor) if place == "run" else make_queue(executor, raises(fault))
    first = queue.submit("a")
    queue.submit("b")
    queue.run()
    assert queue.ids("failed") == ["a"] and queue.ids("completed") == ["b"]
    error = first.describe()["execution_error"]
    assert type(fault).__name__ in error["exception_message"]
    assert first.summary()["messages"][-1][0] == "execution_error"
    assert "execution_error" in [kind for job_id, kind in queue.events if job_id == "a"] or place == "events"


class Panicking:
    """A node in whose library something panics."""

    RETURN_TYPES = ("NUMBER",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def run(self) -> tuple[float]:
        raise Panic("half an emoji: \ud83e")


def test_a_panic_in_a_node_is_shown_on_the_node(
    make_queue: Callable[..., Queue],
    registry: Registry,
    folders: Folders,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "rectiflux")  # parallel runs cannot report half an emoji in a log
    queue = make_queue(Executor(Registry({**registry.classes, "Number": Panicking}, {}, folders)))
    job = queue.submit("a")
    queue.run()
    error = job.describe()["execution_error"]
    assert error["node_id"] in ("1", "2") and "failed with Panic: half an emoji" in error["exception_message"]


EVENTS = (
    "execution_start",
    "execution_cached",
    "executing",
    "progress",
    "progress_state",
    "preview",
    "notice",
)


@pytest.mark.parametrize("kind", [*EVENTS, "executed", "execution_success"])
@pytest.mark.parametrize("fault", FAULTS[:2], ids=repr)
def test_an_error_in_any_event_ends_its_job_alone(
    make_queue: Callable[..., Queue], kind: str, fault: BaseException
) -> None:
    queue = make_queue(listen=raises(fault, (kind,)))
    queue.submit("a", extra={"preview_method": "auto"})
    queue.submit("b")
    queue.run()
    assert queue.ids("pending", "in_progress") == [] and queue.ids("completed")[0] == "b"
    assert queue.ids("failed") == ["a"], kind


def test_an_error_while_the_end_is_reported_changes_nothing(queue: Queue) -> None:
    for job_id in "ab":
        queue.submit(job_id)
    queue.change_fails = True
    queue.run()
    assert sorted(queue.ids("completed")) == ["a", "b"]
    assert queue.jobs.cancel("a") is False


@pytest.mark.parametrize("extra", ["a string", 7, ["a", "list"], {"extra_pnginfo": "a string"}])
def test_malformed_extra_data_does_not_end_the_worker(queue: Queue, extra: Any) -> None:
    queue.submit("a", extra=extra)
    queue.submit("b")
    queue.run()
    assert queue.ids("pending", "in_progress") == [] and "b" in queue.ids("completed")


def test_freeing_memory_clears_the_cache(queue: Queue) -> None:
    queue.submit("a")
    queue.run()
    queue.idle.clear()
    queue.jobs.free_memory()
    queue.submit("b")
    queue.finish()
    executing = [event for event in queue.events if event == ("b", "executing")]
    assert len(executing) == 6, "all five nodes, and the end"
