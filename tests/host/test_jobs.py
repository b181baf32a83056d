"""The queue: order, cancelling, interrupting, history."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from rectiflux.host import jobs as jobs_module
from rectiflux.host.execution import Executor
from rectiflux.host.jobs import Job, Jobs
from rectiflux.host.registry import Registry
from rectiflux.host.validation import Checked, validate

PATIENCE = 60  # seconds, until a test gives up


class Line:
    """Jobs with a gate that holds the worker at the start of the first job."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.events: list[tuple[str, str]] = []
        self.gate = threading.Event()
        self.idle = threading.Event()
        self.jobs = Jobs(Executor(registry), self._on_event, self._on_change)

    def _on_event(self, job: Job, kind: str, data: dict[str, Any]) -> None:
        self.events.append((job.id, kind))
        if kind == "execution_start":
            assert self.gate.wait(PATIENCE)

    def _on_change(self) -> None:
        if self.jobs.remaining() == 0:
            self.idle.set()

    def checked(self, prompt: Any) -> Checked:
        return validate(prompt, self.registry)

    def finish(self) -> None:
        """Open the gate and wait until every job has ended."""
        self.gate.set()
        assert self.idle.wait(PATIENCE)

    def ids(self, *statuses: str) -> list[str]:
        return [job.id for job in self.jobs.listed(statuses)]


@pytest.fixture
def line(registry: Registry) -> Iterator[Line]:
    line = Line(registry)
    yield line
    line.gate.set()
    line.jobs.close()


def test_jobs_run_in_order_and_one_may_go_to_the_front(line: Line, prompts: Any) -> None:
    for name in "abc":
        line.jobs.submit(line.checked(prompts.picture()), {}, job_id=name, front=name == "c")
    assert line.ids("pending") == ["c", "a", "b"] and line.jobs.remaining() == 3
    line.jobs.start()
    line.finish()
    assert [name for name, kind in line.events if kind == "execution_start"] == ["c", "a", "b"]
    assert sorted(line.ids("completed")) == ["a", "b", "c"] and line.jobs.remaining() == 0


def test_a_job_tells_how_it_went(line: Line, prompts: Any) -> None:
    extra = {"extra_pnginfo": {"workflow": {"id": "w"}}}
    job = line.jobs.submit(line.checked(prompts.picture()), extra, job_id="a")
    assert job.describe()["status"] == "pending" and job.describe()["preview_output"] is None
    line.jobs.start()
    line.finish()
    told = job.describe(full=True)
    assert told["status"] == "completed" and told["workflow_id"] == "w"
    assert (told["outputs_count"], told["previewable_outputs_count"]) == (1, 1)
    assert told["preview_output"] == {
        "filename": "sum_00001_.png",
        "subfolder": "",
        "type": "output",
        "nodeId": "5",
        "mediaType": "images",
    }
    assert told["create_time"] <= told["execution_start_time"] <= told["execution_end_time"]
    assert told["workflow"] == {"prompt": prompts.picture(), "extra_data": extra}
    assert told["execution_status"]["status_str"] == "success"
    assert line.events[-2:] == [("a", "executing"), ("a", "notice")], "a notice outlives its job"


def test_a_failure_is_remembered_and_the_next_job_runs(line: Line, prompts: Any) -> None:
    line.jobs.submit(line.checked(prompts.picture(7)), {}, job_id="bad")
    line.jobs.submit(line.checked(prompts.picture(6)), {}, job_id="good")
    line.jobs.start()
    line.finish()
    assert line.ids("failed") == ["bad"] and line.ids("completed") == ["good"]
    failed = line.jobs.find("bad")
    assert failed is not None
    error = failed.describe()["execution_error"]
    assert error["exception_message"] == "seven is refused; choose another number" and error["node_id"] == "3"


def test_cancelling_and_interrupting(line: Line, prompts: Any) -> None:
    for name in "abcd":
        line.jobs.submit(line.checked(prompts.picture()), {}, job_id=name)
    assert line.jobs.cancel("b") and not line.jobs.cancel("b") and not line.jobs.cancel("unknown")
    line.jobs.interrupt()  # nothing runs yet
    line.jobs.start()
    while not line.events:
        threading.Event().wait(0.01)
    line.jobs.interrupt("d")  # another one than the running
    assert line.jobs.cancel("a")
    line.finish()
    assert line.ids("cancelled") == ["a"] and sorted(line.ids("completed")) == ["c", "d"]
    assert not line.jobs.cancel("a"), "it has ended already"
    assert ("a", "execution_interrupted") in line.events


def test_an_id_is_taken_once(line: Line, prompts: Any) -> None:
    line.jobs.submit(line.checked(prompts.picture()), {}, job_id="a")
    with pytest.raises(ValueError, match="there is already a job a; use another prompt_id"):
        line.jobs.submit(line.checked(prompts.picture()), {}, job_id="a")


def test_history_is_bounded_and_can_be_cleared(
    line: Line, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "REMEMBERED", 2)
    for name in "abcd":
        line.jobs.submit(line.checked(prompts.picture()), {}, job_id=name)
    line.jobs.start()
    line.finish()
    left = line.ids("completed")
    assert len(left) == 2
    line.jobs.forget_history([left[0]])
    assert line.ids("completed") == left[1:]
    line.jobs.forget_history()
    assert line.ids("completed") == []


def test_the_worker_outlives_the_hosts_own_faults(
    line: Line, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Executor.run
    calls: list[int] = []

    def run(self: Executor, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a bug of the host")
        return real(self, *args, **options)

    monkeypatch.setattr(Executor, "run", run)
    for name in "ab":
        line.jobs.submit(line.checked(prompts.picture()), {}, job_id=name)
    line.jobs.start()
    line.finish()
    assert line.ids("failed") == ["a"] and line.ids("completed") == ["b"]


@pytest.mark.parametrize("extra", ["a string", 7, ["a", "list"], {"extra_pnginfo": "no table"}])
def test_a_job_with_malformed_extra_data_does_not_end_the_worker(
    line: Line, prompts: Any, extra: Any
) -> None:
    line.jobs.submit(line.checked(prompts.picture()), extra, job_id="a")
    line.jobs.submit(line.checked(prompts.picture()), {}, job_id="b")
    line.jobs.start()
    line.finish()
    assert line.ids("pending", "in_progress") == [] and "b" in line.ids("completed")


@pytest.mark.parametrize("error", [RuntimeError("a listener's fault"), SystemExit(1)])
def test_the_worker_outlives_its_listeners(
    line: Line, prompts: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    hear = line.jobs._on_event

    def listener(job: Job, kind: str, data: dict[str, Any]) -> None:
        if job.id == "a":
            raise error
        hear(job, kind, data)

    line.jobs._on_event = listener
    for name in "ab":
        line.jobs.submit(line.checked(prompts.picture()), {}, job_id=name)
    line.jobs.start()
    line.finish()
    assert line.ids("failed") == ["a"] and line.ids("completed") == ["b"]


def test_freeing_memory(line: Line, prompts: Any) -> None:
    line.jobs.submit(line.checked(prompts.picture()), {}, job_id="a")
    line.jobs.start()
    line.finish()
    line.idle.clear()
    line.jobs.free_memory()
    line.jobs.submit(line.checked(prompts.picture()), {}, job_id="b")
    line.finish()
    assert len([event for event in line.events if event == ("b", "executing")]) == 6, "all five, and the end"
