"""`run.py render` over tiny random models: images, their metadata, one sentence for each invalid input."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rectiflux.host import files, render
from rectiflux.host.registry import Registry
from rectiflux.host.workflow import Document, to_prompt
from safetensors.torch import load_file, save_file

from ..nodes.tiny import NAMES, write_models
from .editor_graph import Graph, node_of, text_to_image


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


class Command:
    """`run.py render` in its own folder: the workflow in w.json, images in out/."""

    def __init__(self, folder: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.models, self.capsys = folder, models, capsys
        self.stderr = ""

    def main(self, workflow: Graph | Path, *arguments: str) -> int:
        """The exit code."""
        path = workflow if isinstance(workflow, Path) else self.folder / "w.json"
        if not isinstance(workflow, Path):
            path.write_text(json.dumps(workflow), encoding="utf-8")
        options = ["--models", str(self.models), "--out", str(self.folder / "out")]
        return render.main([str(path), *options, *arguments])

    def __call__(self, workflow: Graph | Path, *arguments: str, code: int = 0) -> list[Path]:
        """The saved images."""
        assert self.main(workflow, *arguments) == code
        printed = self.capsys.readouterr()
        self.stderr = printed.err
        return [Path(line) for line in printed.out.splitlines()]

    def refuses(self, workflow: Graph | Path, *arguments: str) -> str:
        """The one sentence on stderr of a run that ends with exit code 1 and saves nothing."""
        assert self(workflow, *arguments, code=1) == []
        lines = [line for line in self.stderr.splitlines() if not line.startswith("FLUX Sampler [")]
        assert len(lines) == 1 and lines[0].startswith("render: ") and "Traceback" not in self.stderr, lines
        assert not list((self.folder / "out").glob("**/*.p*")), "an image, complete or partial"
        return lines[0].removeprefix("render: ")


@pytest.fixture
def command(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    monkeypatch.setattr(files, "PACK", tmp_path / "pack")  # data/ is created there
    return Command(tmp_path, models, capsys)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def metadata(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(prompt, workflow) in an image."""
    with Image.open(path) as image:
        return json.loads(image.text["prompt"]), json.loads(image.text["workflow"])


def test_an_image_renders_to_itself(command: Command) -> None:
    (first,) = command(text_to_image(), "--set", "seed=9", "--set", "prompt=a blue star")
    assert first.name == "image_00001_.png" and pixels(first).shape == (48, 64, 3)
    assert "FLUX Sampler [##############################] 2/2" in command.stderr
    assert "\r" not in command.stderr and command.stderr.count("\n") == 1, "one line where no terminal is"
    prompt, workflow = metadata(first)
    assert prompt["7"]["inputs"]["seed"] == 9 and prompt["4"]["inputs"]["prompt"] == "a blue star"
    assert node_of(workflow, 7)["widgets_values"] == [9, "fixed"]
    assert node_of(workflow, 4)["widgets_values"] == ["a blue star", 3.5, ""]

    (again,) = command(first)
    assert again.name == "image_00002_.png" and metadata(again) == (prompt, workflow)
    assert np.array_equal(pixels(again), pixels(first))
    (from_graph,) = command(workflow)
    assert np.array_equal(pixels(from_graph), pixels(first))
    api = command.folder / "api.json"
    api.write_text(json.dumps(prompt))
    (from_prompt,) = command(api)
    assert np.array_equal(pixels(from_prompt), pixels(first))
    with Image.open(from_prompt) as image:
        assert image.text.keys() == {"prompt"}

    (other,) = command(first, "--set", "seed=8")
    assert not np.array_equal(pixels(other), pixels(first))
    prompt, workflow = metadata(other)
    assert prompt["7"]["inputs"]["seed"] == node_of(workflow, 7)["widgets_values"][0] == 8


def test_a_text_preview_is_printed(command: Command) -> None:
    """The sampler's second output, which older files do not have, in a text preview."""
    graph = text_to_image()
    link = graph["last_link_id"] + 1
    graph["links"].append([link, 10, 1, 13, 0, "STRING"])
    inputs = [{"name": "source", "type": "*", "link": link}]
    shown = {"id": 13, "type": "PreviewAny", "mode": 0, "inputs": inputs, "outputs": []}
    graph["nodes"].append({**shown, "widgets_values": [None, None, False], "properties": {}})
    (image,) = command(graph)
    assert "\nsolver: euler\nsteps: 2\n" in command.stderr
    assert metadata(image)[0]["13"]["inputs"] == {"source": ["10", 1]}
    image.unlink()
    node_of(graph, 12)["mode"] = 2
    assert "saves no image; add a Save Image node" in command.refuses(graph)


def test_a_batch_in_a_subfolder(command: Command) -> None:
    saved = command(text_to_image(), "--set", "batch_size=2", "--set", "filename_prefix=sub/fox")
    names = [path.relative_to(command.folder / "out").as_posix() for path in saved]
    assert names == ["sub/fox_00001_.png", "sub/fox_00002_.png"]


@pytest.mark.parametrize("prompt", ["", "красный круг 🦊 赤い丸"])
def test_empty_and_non_latin_prompts(command: Command, prompt: str) -> None:
    (image,) = command(text_to_image(), "--set", f"prompt={prompt}")
    assert metadata(image)[0]["4"]["inputs"]["prompt"] == prompt


def test_a_truncated_prompt_is_reported_once_for_each_encoder(command: Command) -> None:
    assert len(command(text_to_image(), "--set", "prompt=" + "red " * 100)) == 1
    notes = [line for line in command.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2 and "101 tokens" in notes[0] and "102 tokens" in notes[1]


def test_on_a_terminal_the_progress_bar_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    bar = render.ProgressBar(stream, {"1": "Sampler"}.__getitem__)
    bar("executing", {"node": "1"})
    bar("progress", {"node": "1", "value": 1, "max": 2})
    bar.finish_node()
    lines = [line.strip() for line in stream.getvalue().split("\r") if line.strip()]
    assert lines[:2] == ["Sampler", "Sampler [###############...............] 1/2"]


def test_paths_that_cannot_be_printed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", closefd=False) as closed:
        monkeypatch.setattr(render.sys, "stdout", closed)
        assert command.main(text_to_image()) == 1
        with suppress(BrokenPipeError):
            closed.close()
    monkeypatch.undo()
    assert f"the images are in {command.folder / 'out'}" in command.capsys.readouterr().err
    assert [path.name for path in (command.folder / "out").iterdir()] == ["image_00001_.png"]


# Invalid workflows


def changed(node_id: int, values: list[Any] | None = None, **more: Any) -> Graph:
    """The graph with the widget values, or other keys, of one node replaced."""
    graph = text_to_image()
    node_of(graph, node_id).update(more if values is None else {"widgets_values": values, **more})
    return graph


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            changed(8, [0, 1.0, "by size", 1.15]),
            "node 8 (RectifluxSchedule): steps must be at least 1, got 0",
        ),
        (
            changed(6, [100, 16, 1]),
            "node 6 (RectifluxEmptyLatent): width and height must be positive multiples of 16, got 100x16",
        ),
        (changed(9, ["rk9"]), "node 9 (RectifluxSolver): solver: 'rk9' is not one of"),
        (changed(1, ["m.safetensors", "auto"]), "node 1 (RectifluxModelLoader): model_name: 'm.safetensors'"),
        (changed(1, ["m.ckpt", "auto"]), "node 1 (RectifluxModelLoader): model_name: 'm.ckpt' is a pickle"),
        (changed(12, ["../fox"]), "filename_prefix must stay in the folder output, got '../fox'"),
        (changed(12, ["x" * 300]), "filename_prefix must have at most 200 bytes, got 300"),
        (changed(12, type="Frobnicate"), "nodes that are not installed here: node 12 (Frobnicate)"),
        (changed(12, mode=2), "the workflow has no output node; add a Save Image"),
        (changed(7, mode=2), "node 10 (RectifluxSampler): noise is not connected"),
        (changed(12, [], type="PreviewImage"), "has only preview nodes and saves no image"),
    ],
)
def test_invalid_graphs_are_refused(command: Command, graph: Graph, message: str) -> None:
    assert message in command.refuses(graph)


def test_a_cycle_is_reported_once_with_all_its_nodes(command: Command) -> None:
    graph = changed(6, [], type="RectifluxVAEEncode")
    sockets = [{"name": "image", "type": "IMAGE", "link": 99}, {"name": "vae", "type": "VAE", "link": 98}]
    node_of(graph, 6)["inputs"] = sockets
    graph["links"] += [[99, 11, 0, 6, 0, "IMAGE"], [98, 3, 0, 6, 1, "VAE"]]
    message = command.refuses(graph)
    assert all(f"{node_id} (Rectiflux" in message for node_id in (6, 8, 10, 11))


def test_a_damaged_workflow_file_and_an_unknown_setting_are_refused(command: Command) -> None:
    path = command.folder / "broken"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    assert str(path) in command.refuses(path)
    assert "--set sead: unknown widget" in command.refuses(text_to_image(), "--set", "sead=1")


def test_wrong_arguments_are_reported_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, what in (
        ([], "the following arguments are required: workflow"),
        (["w.json", "--frob"], "unrecognized arguments: --frob"),
        (["w.json", "--models", "missing"], "argument --models: the folder missing does not exist"),
    ):
        with pytest.raises(SystemExit) as ended:
            render.main(arguments)
        assert ended.value.code == 1
        assert capsys.readouterr().err == f"render: {what} (see run.py render --help)\n"


# Damaged models, full disks


@pytest.mark.parametrize("kind", ["diffusion_models", "vae", "t5"])
def test_truncated_model_files_and_files_of_another_model(
    command: Command, tmp_path: Path, kind: str
) -> None:
    command.models, intact = write_models(tmp_path / "own"), write_models(tmp_path / "intact")
    path = command.models / ("text_encoders" if kind == "t5" else kind) / NAMES[kind]
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        message = command.refuses(text_to_image())
        assert message.startswith("node ") and path.name in message
    other = "diffusion_models" if kind == "vae" else "vae"
    path.write_bytes((intact / other / NAMES[other]).read_bytes())
    assert f"{path.name} is a " in command.refuses(text_to_image())


@pytest.mark.parametrize(
    ("kind", "loader", "runner"),
    [("diffusion_models", "node 1 (", "node 10 ("), ("vae", "node 3 (", "node 11 (")],
)
def test_weights_with_nan_are_reported(
    command: Command, tmp_path: Path, kind: str, loader: str, runner: str
) -> None:
    """In biases and scales when they are loaded, in a matrix alone when the result is not finite."""
    command.models = write_models(tmp_path / "own")
    path = command.models / kind / NAMES[kind]
    weights = load_file(path)
    for least_dims, node in ((1, loader), (2, runner)):
        damaged = {
            name: torch.full_like(weight, torch.nan) if weight.ndim >= least_dims else weight
            for name, weight in weights.items()
        }
        save_file(damaged, path)
        assert command.refuses(text_to_image()).startswith(node)


@pytest.mark.parametrize(("saves", "file"), [(0, "image"), (1, "fox")])
def test_a_full_disk(command: Command, monkeypatch: pytest.MonkeyPatch, saves: int, file: str) -> None:
    """Found before anything runs if it is full then, else by Save Image."""
    left = [None] * saves

    def fsync(descriptor: int) -> None:
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()

    monkeypatch.setattr(files.os, "fsync", fsync)
    message = command.refuses(text_to_image(), "--set", "filename_prefix=fox")
    reason = f"the disk is full, {file}.png was not saved to {command.folder / 'out'}"
    assert message.startswith(("node 12 (SaveImage): " if saves else "") + reason)
    assert ("FLUX Sampler" in command.stderr) == bool(saves)


def test_an_output_folder_that_cannot_be_created(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot write " in command.refuses(text_to_image(), "--out", str(tmp_path / "file" / "deeper"))


# Names and consoles


def console(folder: Path, encoding: str) -> Any:
    return (folder / "console").open("w", encoding=encoding)


@pytest.mark.parametrize(("encoding", "name"), [("ascii", "ü"), ("cp1252", "赤🦊"), ("utf-8", "bad\udcff")])
def test_a_console_that_lacks_characters(
    command: Command, monkeypatch: pytest.MonkeyPatch, encoding: str, name: str
) -> None:
    """The run succeeds and the path is printed escaped, on stdout and in notes."""
    out = command.folder / name
    with console(command.folder, encoding) as stream:
        monkeypatch.setattr(render.sys, "stdout", stream)
        monkeypatch.setattr(render.sys, "stderr", stream)
        many = "prompt=" + "красный " * 100
        assert command.main(text_to_image(), "--out", str(out), "--set", many) == 0
        monkeypatch.undo()
    printed = (command.folder / "console").read_text(encoding).splitlines()
    escaped = str(out / "image_00001_.png").encode(encoding, "backslashreplace").decode(encoding)
    assert escaped in printed and "\\" in escaped
    assert (out / "image_00001_.png").is_file()


def test_no_console_at_all(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed streams, and a pipe for messages that nobody reads."""
    monkeypatch.setattr(render.sys, "stdout", None)
    monkeypatch.setattr(render.sys, "stderr", None)
    assert command.main(text_to_image()) == 0
    assert command.main(changed(12, ["../fox"])) == 1
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", closefd=False) as closed:
        monkeypatch.setattr(render.sys, "stderr", closed)
        assert command.main(text_to_image()) == 0
        with suppress(BrokenPipeError):
            closed.close()
    assert len(list((command.folder / "out").iterdir())) == 2


@pytest.mark.parametrize("name", ["clip.sft", "sub\\mini.safetensors"])
def test_a_models_name_by_setting_and_in_the_file(command: Command, tmp_path: Path, name: str) -> None:
    """By --set, in a saved graph and in a prompt: stored as given, with the same image."""
    command.models = write_models(tmp_path / "own")
    folder = command.models / "text_encoders"
    path = folder / name.replace("\\", "/")
    path.parent.mkdir(exist_ok=True)
    (folder / NAMES["clip"]).rename(path)
    shutil.copy(folder / "tiny-clip.tokenizer.json", path.with_suffix(".tokenizer.json"))
    (first,) = command(text_to_image(), "--set", f"2.clip_name={name}")
    (again,) = command(changed(2, [name, NAMES["t5"]]))
    prompt, workflow = metadata(first)
    assert prompt["2"]["inputs"]["clip_name"] == name == node_of(workflow, 2)["widgets_values"][0]
    api = command.folder / "api.json"
    api.write_text(json.dumps(prompt))
    (third,) = command(api)
    assert np.array_equal(pixels(first), pixels(again)) and np.array_equal(pixels(first), pixels(third))


@pytest.mark.parametrize("name", ["..\\..\\x.safetensors", "sub\\..\\..\\x.safetensors", "D:x.safetensors"])
def test_a_models_name_that_leaves_its_folder(command: Command, name: str) -> None:
    for message in (
        command.refuses(text_to_image(), "--set", f"1.model_name={name}"),
        command.refuses(changed(1, [name, "auto"])),
    ):
        assert message.startswith("node 1 (RectifluxModelLoader): model_name: ")
        assert "must stay in its folder" in message


@pytest.mark.parametrize("value", [5, None, {"a": 1}, True])
def test_a_models_name_that_is_no_text(command: Command, models: Path, value: Any) -> None:
    registry = Registry.of_pack(files.Folders.under(command.folder / "data", models=(models,)))
    prompt = to_prompt(Document(text_to_image(), None), registry.object_info())
    prompt["1"]["inputs"]["model_name"] = value
    path = command.folder / "api.json"
    path.write_text(json.dumps(prompt))
    message = command.refuses(path)
    assert message.startswith("node 1 (RectifluxModelLoader): model_name") and f"got {value!r}" in message


def test_placeholders_in_the_prefix(command: Command) -> None:
    """Comfy-Org/ComfyUI#7996: what Run in the editor saves; the API form of a workflow keeps them."""
    prefix = "%date:yyyy-MM-dd%/fox_%RectifluxNoise.seed%_%RectifluxTextEncode.prompt%_%width%_%Nope.x%"
    settings = ("--set", "seed=9", "--set", f"filename_prefix={prefix}")
    (image,) = command(text_to_image(), *settings, "--set", "4.prompt=a red/blue: heart")
    assert image.name == "fox_9_a red_blue_ heart_64_%Nope.x%_00001_.png"
    assert image.parent.name == time.strftime("%Y-%m-%d")
    prompt, workflow = metadata(image)
    assert node_of(workflow, 12)["widgets_values"] == [prefix]
    (again,) = command({"nodes": workflow["nodes"], "links": workflow["links"]})
    assert again.name == "fox_9_a red_blue_ heart_64_%Nope.x%_00002_.png"
    prompt["12"]["inputs"]["filename_prefix"] = "%RectifluxNoise.seed%"
    (plain,) = command(prompt)
    assert plain.name.startswith("%RectifluxNoise.seed%_")


@pytest.mark.parametrize("kind", ["LoadImage", "SaveImage"])
@pytest.mark.parametrize("name", [5, None, {"a": 1}, "x" * 300])
def test_an_argument_of_any_kind_is_refused(command: Command, name: Any, kind: str) -> None:
    """One sentence, never a traceback; a number is text for a prefix."""
    inputs = command.folder / "pack" / "data" / "input"
    inputs.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(inputs / "x.png")
    is_load = kind == "LoadImage"
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name if is_load else "x.png"}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    if not is_load:
        prompt["3"]["inputs"]["filename_prefix"] = [] if name == 5 else name
    assert command.refuses(prompt).startswith(f"node {'1' if is_load else '3'} ({kind}): ")
