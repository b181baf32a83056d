"""Prompts run: what runs, what is kept, what is told, and how a failing node ends a run."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import pytest
import torch
from PIL import Image
from rectiflux.host import context
from rectiflux.host.execution import Executor, Result
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.validation import validate


@pytest.fixture
def executor(registry: Registry) -> Executor:
    return Executor(registry)


def run(executor: Executor, prompt: Any, targets: list[str] | None = None, **options: Any) -> Result:
    return executor.run(validate(prompt, executor.registry, targets), **options)


def test_a_prompt_makes_a_picture_that_carries_it(executor: Executor, prompts: Any, folders: Folders) -> None:
    result = run(executor, prompts.picture(), extra_pnginfo={"workflow": {"nodes": []}})
    assert result.status == "success" and result.error is None
    assert result.images() == [{"filename": "sum_00001_.png", "subfolder": "", "type": "output"}]
    with Image.open(folders.locate(**_named(result.images()[0]))) as image:
        assert image.size == (8, 4) and image.getpixel((0, 0)) == (
            127,
            127,
            127,
        )  # (2 + 3) / 10 of 255, cut off
        assert json.loads(image.text["prompt"]) == prompts.picture()
        assert json.loads(image.text["workflow"]) == {"nodes": []}


def _named(image: dict[str, str]) -> dict[str, str]:
    return {"filename": image["filename"], "subfolder": image["subfolder"], "kind": image["type"]}


def test_a_rerun_executes_only_what_changed_and_what_lies_downstream(
    executor: Executor, prompts: Any
) -> None:
    assert sorted(run(executor, prompts.picture(2, 3)).executed) == ["1", "2", "3", "4", "5"]
    again = run(executor, prompts.picture(2, 3))
    assert again.executed == []
    assert again.images()[0]["filename"] == "sum_00001_.png", "what is kept is still shown"
    assert run(executor, prompts.picture(2, 4)).executed == ["2", "3", "4", "5"]
    prompt = prompts.picture(2, 4)
    prompt["5"]["inputs"]["filename_prefix"] = "other"
    assert run(executor, prompt).executed == ["5"]


def test_a_picture_that_was_deleted_is_saved_again(
    executor: Executor, prompts: Any, folders: Folders
) -> None:
    (image,) = run(executor, prompts.picture()).images()
    folders.locate(**_named(image)).unlink()
    result = run(executor, prompts.picture())
    assert result.executed == ["5"] and folders.locate(**_named(result.images()[0])).is_file()


def test_two_save_nodes_save_two_files(executor: Executor, prompts: Any) -> None:
    prompt = prompts.picture()
    prompt["6"] = prompt["5"]
    names = [image["filename"] for image in run(executor, prompt).images()]
    assert sorted(names) == ["sum_00001_.png", "sum_00002_.png"]


def test_equal_nodes_are_one(executor: Executor, prompts: Any) -> None:
    result = run(executor, prompts.picture(4, 4))
    assert len([number for number in result.executed if number in ("1", "2")]) == 1


def test_targets_run_alone_and_the_others_keep_their_results(executor: Executor, prompts: Any) -> None:
    prompt = prompts.picture(1, 1)
    prompt["6"] = {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}}
    prompt["7"] = {"class_type": "Picture", "inputs": {"number": ["2", 0]}}
    assert run(executor, prompt, ["6"]).executed == ["2", "7", "6"]
    assert "5" in run(executor, prompt, ["5"]).executed
    assert run(executor, prompt).executed == []


def test_forgetting(executor: Executor, prompts: Any) -> None:
    run(executor, prompts.picture())
    executor.forget()
    assert len(run(executor, prompts.picture()).executed) == 5


def test_results_of_another_prompt_are_dropped(executor: Executor, prompts: Any) -> None:
    run(executor, prompts.picture(1, 2))
    run(executor, prompts.picture(3, 4))
    assert "1" in run(executor, prompts.picture(1, 2)).executed


def test_what_is_told_and_in_which_order(executor: Executor, prompts: Any) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    prompt = prompts.picture()
    run(executor, prompt, on_event=lambda *event: events.append(event), prompt_id="p", previews=True)
    assert all(data["prompt_id"] == "p" for _, data in events)
    kinds = [kind for kind, _ in events if kind != "progress_state"]
    told = (
        ["executing"] * 3 + ["progress", "preview", "notice", "progress"] + ["executing"] * 2 + ["executed"]
    )
    assert kinds == ["execution_start", "execution_cached", *told, "execution_success"]
    assert [data["node"] for kind, data in events if kind == "executing"][2:] == ["3", "4", "5"]
    states = [
        data["nodes"]["3"] for kind, data in events if kind == "progress_state" and "3" in data["nodes"]
    ]
    seen = [(state["value"], state["max"], state["state"]) for state in states]
    assert seen[:4] == [(0, 1, "running"), (1, 2, "running"), (2, 2, "running"), (2, 2, "finished")]
    (preview,) = [data for kind, data in events if kind == "preview"]
    assert preview["node_id"] == "3" and preview["pixels"].shape == (2, 4, 3)
    assert preview["pixels"].dtype == torch.uint8
    events.clear()
    run(executor, prompt, on_event=lambda *event: events.append(event))
    assert [kind for kind, _ in events] == [
        "execution_start",
        "execution_cached",
        "notice",  # it still holds
        "executed",
        "execution_success",
    ]
    assert events[1][1]["nodes"] == ["1", "2", "3", "4", "5"]


def test_of_many_quick_steps_few_are_told_and_the_last_always(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Painter:
        RETURN_TYPES = ()
        FUNCTION = "run"
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {}}

        def run(self) -> tuple[()]:
            for step in range(1, 51):
                context.progress(step, 50)
                context.preview(lambda step=step: step)
            return ()

    shown: list[int] = []
    values: list[float] = []

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "preview":
            shown.append(data["pixels"])
        if kind == "progress":
            values.append(data["value"])

    registry.classes["Painter"] = Painter
    monkeypatch.setattr("rectiflux.host.execution.PAUSE", 1000.0)
    run(
        Executor(registry),
        {"1": {"class_type": "Painter", "inputs": {}}},
        on_event=on_event,
        previews=True,
    )
    assert shown == values == [1, 50]


def test_an_error_is_one_sentence_on_its_node(executor: Executor, prompts: Any) -> None:
    events: dict[str, dict[str, Any]] = {}
    result = run(executor, prompts.picture(7), on_event=events.__setitem__)
    assert result.status == "error" and result.error is not None
    assert (result.error.node_id, result.error.class_type) == ("3", "Add")
    assert result.error.message == "seven is refused; choose another number"
    assert result.error.traceback == []
    told = events["execution_error"]
    assert told["exception_message"] == result.error.message and told["exception_type"] == "ValueError"
    assert told["node_id"] == "3" and told["traceback"] == [] and sorted(told["executed"]) == ["1", "2"]
    assert events["progress_state"]["nodes"]["3"]["state"] == "error"
    assert "execution_success" not in events
    assert run(executor, prompts.picture(6)).status == "success", "the executor goes on"
    assert run(executor, prompts.picture(7)).status == "error", "and remembers no failure as a result"


def test_a_bug_comes_with_its_traceback(
    executor: Executor, prompts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        result = run(executor, prompts.picture(8))
    assert result.error is not None and result.error.message == "Add Numbers failed with KeyError: 'a bug'"
    assert any("conftest.py" in frame for frame in result.error.traceback)
    assert caplog.records[-1].exc_info is not None


def test_a_full_memory(executor: Executor, prompts: Any) -> None:
    result = run(executor, prompts.picture(9))
    assert result.error is not None
    assert result.error.message.startswith("the memory is full; lower memory_limit where the model is loaded")
    assert executor._kept == {}, "and all of it is there for the next run"
    assert sorted(run(executor, prompts.picture()).executed) == ["1", "2", "3", "4", "5"]


def test_interrupting_within_a_node_and_between_two(executor: Executor, prompts: Any) -> None:
    stop = threading.Event()
    events: list[str] = []

    def on_event(kind: str, data: dict[str, Any]) -> None:
        events.append(kind)
        if kind == "progress":
            stop.set()

    result = run(executor, prompts.picture(), on_event=on_event, stop=stop)
    assert result.status == "interrupted" and events[-1] == "execution_interrupted"
    assert sorted(result.executed) == ["1", "2"]
    assert run(executor, prompts.picture(), stop=stop).executed == [], "nothing starts when it is stopped"
    assert run(executor, prompts.picture()).executed == ["3", "4", "5"], "what was done is kept"


def test_without_a_run_the_context_does_nothing() -> None:
    assert context.current() is None
    context.progress(1, 2)
    context.preview(lambda: pytest.fail("computed although nobody watches"))
    context.notice("unheard")
    context.check_interrupted()
    assert [folder.name for folder in context.model_folders()] == ["models"]
    with pytest.raises(LookupError, match="no host is running"):
        context.folders()
