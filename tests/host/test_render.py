"""`run.py render` over tiny random models: images, their metadata, one sentence for each invalid input."""

from __future__ import annotations

import errno
import io
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rectiflux.host import files, render
from safetensors.torch import load_file, save_file

from ..nodes.tiny import NAMES, write_models
from .editor_graph import Graph, node_of, text_to_image
from .render_command import Command, changed, metadata, pixels


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
