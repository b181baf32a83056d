"""Running prompts: which nodes run, which results are cached, which events are sent, how errors end a run."""

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


def test_an_image_is_saved_with_its_workflow(executor: Executor, prompts: Any, folders: Folders) -> None:
    result = run(executor, prompts.image(), extra_pnginfo={"workflow": {"nodes": []}})
    assert result.status == "success" and result.error is None
    assert result.images() == [{"filename": "sum_00001_.png", "subfolder": "", "type": "output"}]
    with Image.open(folders.output / "sum_00001_.png") as image:
        assert image.size == (8, 4) and image.getpixel((0, 0)) == (127, 127, 127)  # 255 * (2 + 3) / 10
        assert json.loads(image.text["prompt"]) == prompts.image()
        assert json.loads(image.text["workflow"]) == {"nodes": []}


def test_a_rerun_executes_only_changed_nodes_and_those_behind_them(
    executor: Executor, prompts: Any, folders: Folders
) -> None:
    assert sorted(run(executor, prompts.image(2, 3)).executed) == ["1", "2", "3", "4", "5"]
    again = run(executor, prompts.image(2, 3))
    assert again.executed == [] and again.images()[0]["filename"] == "sum_00001_.png"
    (folders.output / "sum_00001_.png").unlink()
    assert run(executor, prompts.image(2, 3)).executed == ["5"], "a deleted image is saved again"
    assert run(executor, prompts.image(2, 4)).executed == ["2", "3", "4", "5"]
    assert "2" in run(executor, prompts.image(2, 3)).executed, "only the last prompt's results are cached"
    executor.clear_cache()
    assert len(run(executor, prompts.image(2, 3)).executed) == 5


def test_equal_nodes_run_once_but_two_save_nodes_save_two_files(executor: Executor, prompts: Any) -> None:
    prompt = prompts.image(4, 4)
    prompt["6"] = prompt["5"]
    result = run(executor, prompt)
    assert len({"1", "2"} & set(result.executed)) == 1
    assert [image["filename"] for image in result.images()] == ["sum_00001_.png", "sum_00002_.png"]


def test_only_the_targets_run_and_the_others_keep_their_results(executor: Executor, prompts: Any) -> None:
    prompt = prompts.image(1, 1)
    prompt["6"] = {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}}
    prompt["7"] = {"class_type": "Gray", "inputs": {"number": ["2", 0]}}
    assert run(executor, prompt, ["6"]).executed == ["2", "7", "6"]
    assert "5" in run(executor, prompt, ["5"]).executed
    assert run(executor, prompt).executed == []


def test_a_long_chain_sends_events_in_proportion_to_its_length(registry: Registry) -> None:
    def sent(count: int) -> int:
        """Bytes of all events of a chain of preview nodes."""
        sources = ["text", *([str(index), 0] for index in range(count - 1))]
        prompt = {
            str(index): {"class_type": "PreviewAny", "inputs": {"source": source}}
            for index, source in enumerate(sources)
        }
        sizes: list[int] = []
        found = run(Executor(registry), prompt, on_event=lambda _, data: sizes.append(len(json.dumps(data))))
        assert found.status == "success" and len(found.outputs) == count
        return sum(sizes)

    assert sent(600) < 2.5 * sent(300)


def test_events_are_sent_in_comfyuis_order(executor: Executor, prompts: Any) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    run(executor, prompts.image(), on_event=lambda *event: events.append(event), prompt_id="p", previews=True)
    assert all(data["prompt_id"] == "p" for _, data in events)
    kinds = [kind for kind, _ in events if kind != "progress_state"]
    add = ["executing", "progress", "preview", "notice", "progress"]
    nodes = ["executing"] * 2 + add + ["executing"] * 2 + ["executed"]
    assert kinds == ["execution_start", "execution_cached", *nodes, "execution_success"]
    assert [data["node"] for kind, data in events if kind == "executing"][2:] == ["3", "4", "5"]
    states = [data["nodes"].get("3") for kind, data in events if kind == "progress_state"]
    seen = [(state["value"], state["max"], state["state"]) for state in states if state]
    assert seen[:4] == [(0, 1, "running"), (1, 2, "running"), (2, 2, "running"), (2, 2, "finished")]
    (preview,) = [data for kind, data in events if kind == "preview"]
    assert preview["node_id"] == "3" and preview["pixels"].shape == (2, 4, 3)
    assert preview["pixels"].dtype == torch.uint8
    events.clear()
    run(executor, prompts.image(), on_event=lambda *event: events.append(event))
    cached = ["execution_start", "execution_cached", "notice", "executed", "execution_success"]
    assert [kind for kind, _ in events] == cached and events[1][1]["nodes"] == ["1", "2", "3", "4", "5"]


def test_progress_is_sent_at_intervals_and_for_the_last_step(registry: Registry) -> None:
    class Steps:
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

    events: list[tuple[str, dict[str, Any]]] = []
    registry.classes["Steps"] = Steps
    prompt = {"1": {"class_type": "Steps", "inputs": {}}}
    slow = Executor(registry, progress_interval=1000.0)
    run(slow, prompt, on_event=lambda *event: events.append(event), previews=True)
    assert [data["value"] for kind, data in events if kind == "progress"] == [1, 50]
    assert [data["pixels"] for kind, data in events if kind == "preview"] == [1, 50]


def test_an_error_is_one_sentence_on_its_node(executor: Executor, prompts: Any) -> None:
    events: dict[str, dict[str, Any]] = {}
    result = run(executor, prompts.image(7), on_event=events.__setitem__)
    assert result.status == "error" and result.error is not None
    assert (result.error.node_id, result.error.class_type) == ("3", "Add")
    assert result.error.message == "seven is refused; choose another number"
    sent = events["execution_error"]
    assert (sent["exception_message"], sent["exception_type"]) == (result.error.message, "ValueError")
    assert sent["node_id"] == "3" and sent["traceback"] == [] and sorted(sent["executed"]) == ["1", "2"]
    assert events["progress_state"]["nodes"]["3"]["state"] == "error"
    assert "execution_success" not in events
    assert run(executor, prompts.image(6)).status == "success"
    assert run(executor, prompts.image(7)).status == "error", "a failure is not cached"


def test_a_bug_is_reported_with_its_traceback(
    executor: Executor, prompts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        error = run(executor, prompts.image(8)).error
    assert error is not None and error.message == "Add Numbers failed with KeyError: 'a bug'"
    assert any("conftest.py" in frame for frame in error.traceback)
    assert caplog.records[-1].exc_info is not None


def test_out_of_memory_drops_all_results(executor: Executor, prompts: Any) -> None:
    prompt = prompts.image(9)
    error = run(executor, prompt).error
    assert error is not None and error.message.startswith("out of memory; lower memory_limit")
    prompt["3"]["inputs"]["a"] = ["2", 0]
    assert sorted(run(executor, prompt).executed) == ["2", "3", "4", "5"]


def test_interrupting_within_a_node_and_between_two(executor: Executor, prompts: Any) -> None:
    stop = threading.Event()
    events: list[str] = []

    def on_event(kind: str, data: dict[str, Any]) -> None:
        events.append(kind)
        if kind == "progress":
            stop.set()

    result = run(executor, prompts.image(), on_event=on_event, stop=stop)
    assert result.status == "interrupted" and events[-1] == "execution_interrupted"
    assert sorted(result.executed) == ["1", "2"]
    assert run(executor, prompts.image(), stop=stop).executed == []
    assert run(executor, prompts.image()).executed == ["3", "4", "5"], "finished nodes stay cached"


def test_outside_a_run_the_context_does_nothing() -> None:
    assert context.current() is None
    context.progress(1, 2)
    context.preview(lambda: pytest.fail("a preview was computed although none is shown"))
    context.notice("not shown")
    context.check_interrupted()
    assert [folder.name for folder in context.model_folders()] == ["models"]
    with pytest.raises(LookupError, match="no host is running"):
        context.folders()
