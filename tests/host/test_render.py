"""`run.py render` over tiny random models: pictures, what they carry, and a sentence for each bad input."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rectiflux.host import files, render
from safetensors.torch import load_file, save_file

from ..nodes.tiny import NAMES, write_models
from .editor_graph import Graph, node_of, text_to_image


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


class Command:
    """`run.py render` in a place of its own: the workflow in w.json, pictures to out/."""

    def __init__(self, place: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self.models, self.capsys = place, models, capsys
        self.notes = ""

    def __call__(self, workflow: Graph | Path, *arguments: str, code: int = 0) -> list[Path]:
        """The saved pictures; what went to stderr is in `notes`."""
        path = workflow if isinstance(workflow, Path) else self.place / "w.json"
        if not isinstance(workflow, Path):
            path.write_text(json.dumps(workflow), encoding="utf-8")
        options = ["--models", str(self.models), "--out", str(self.place / "out")]
        assert render.main([str(path), *options, *arguments]) == code
        printed = self.capsys.readouterr()
        self.notes = printed.err
        return [Path(line) for line in printed.out.splitlines()]

    def refuses(self, workflow: Graph | Path, *arguments: str) -> str:
        """The one sentence on stderr of a run that ends with exit code 1 and saves nothing."""
        assert self(workflow, *arguments, code=1) == []
        lines = [line for line in self.notes.splitlines() if not line.startswith("FLUX Sampler [")]
        assert len(lines) == 1 and lines[0].startswith("render: ") and "Traceback" not in self.notes, lines
        assert not list((self.place / "out").glob("**/*.p*")), "no picture, whole or in part"
        return lines[0].removeprefix("render: ")


@pytest.fixture
def command(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    monkeypatch.setattr(files, "PACK", tmp_path / "pack")  # data/ goes there
    return Command(tmp_path, models, capsys)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def carried(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(prompt, workflow) inside a picture."""
    with Image.open(path) as image:
        return json.loads(image.text["prompt"]), json.loads(image.text["workflow"])


def test_a_graph_becomes_a_picture_that_renders_to_itself(command: Command) -> None:
    (first,) = command(text_to_image(), "--set", "seed=9", "--set", "prompt=a blue star")
    assert first.name == "picture_00001_.png" and pixels(first).shape == (48, 64, 3)
    assert "FLUX Sampler [##############################] 2/2" in command.notes
    prompt, workflow = carried(first)
    assert prompt["7"]["inputs"]["seed"] == 9 and prompt["4"]["inputs"]["prompt"] == "a blue star"
    assert node_of(workflow, 7)["widgets_values"] == [9, "fixed"]
    assert node_of(workflow, 4)["widgets_values"] == ["a blue star", 3.5, ""]

    (again,) = command(first)
    assert again.name == "picture_00002_.png"
    assert np.array_equal(pixels(again), pixels(first))
    assert carried(again) == (prompt, workflow)
    command.place.joinpath("workflow.json").write_text(json.dumps(workflow))
    (dropped,) = command(command.place / "workflow.json")
    assert np.array_equal(pixels(dropped), pixels(first)), "the graph inside says the same as the prompt"


def test_settings_change_the_picture_also_of_a_png(command: Command) -> None:
    (first,) = command(text_to_image())
    (other,) = command(first, "--set", "seed=8")
    assert not np.array_equal(pixels(other), pixels(first))
    prompt, workflow = carried(other)
    assert prompt["7"]["inputs"]["seed"] == node_of(workflow, 7)["widgets_values"][0] == 8


def test_an_api_prompt_becomes_a_picture_with_a_prompt_inside(command: Command) -> None:
    (first,) = command(text_to_image())
    api = command.place / "api.json"
    api.write_text(json.dumps(carried(first)[0]))
    (second,) = command(api)
    assert np.array_equal(pixels(second), pixels(first))
    with Image.open(second) as image:
        assert image.text.keys() == {"prompt"}


def test_the_report_of_a_run_is_told(command: Command) -> None:
    """The sampler's second output, which files of before do not have, in a text preview; on stderr."""
    graph = text_to_image()
    link = graph["last_link_id"] + 1
    graph["links"].append([link, 10, 1, 13, 0, "STRING"])
    inputs = [{"name": "source", "type": "*", "link": link}]
    shown = {"id": 13, "type": "PreviewAny", "mode": 0, "inputs": inputs, "outputs": []}
    graph["nodes"].append({**shown, "widgets_values": [None, None, False], "properties": {}})
    (picture,) = command(graph)
    assert "\nsolver: euler\nsteps: 2\nevaluations of the model: 2\n" in command.notes
    assert carried(picture)[0]["13"] == {
        "class_type": "PreviewAny",
        "inputs": {"source": ["10", 1]},
        "_meta": {"title": "Preview as Text"},
    }
    picture.unlink()
    node_of(graph, 12)["mode"] = 2
    assert "saves no picture, it only previews; add a Save Image node" in command.refuses(graph)


def test_a_batch_gives_as_many_pictures_and_a_prefix_may_name_a_folder(command: Command) -> None:
    found = command(text_to_image(), "--set", "batch_size=2", "--set", "filename_prefix=sub/fox")
    assert [path.relative_to(command.place / "out").as_posix() for path in found] == [
        "sub/fox_00001_.png",
        "sub/fox_00002_.png",
    ]


@pytest.mark.parametrize("prompt", ["", "красный круг 🦊 赤い丸"])
def test_empty_and_non_latin_prompts_are_prompts(command: Command, prompt: str) -> None:
    (picture,) = command(text_to_image(), "--set", f"prompt={prompt}")
    assert carried(picture)[0]["4"]["inputs"]["prompt"] == prompt


def test_a_long_prompt_is_cut_and_the_numbers_are_told(command: Command) -> None:
    assert len(command(text_to_image(), "--set", "prompt=" + "red " * 100)) == 1
    assert command.notes.splitlines()[:2] == [
        "note: the prompt is too long for T5: 101 tokens, of which it reads the first 16",
        "note: the prompt is too long for CLIP: 102 tokens, of which it reads the first 16",
    ]
    assert command.notes.count("too long") == 2, "each is said once"


def test_off_a_terminal_the_bar_is_a_line_and_on_one_it_is_redrawn(command: Command) -> None:
    command(text_to_image())
    assert "\r" not in command.notes and command.notes.count("\n") == 1

    class Terminal:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return True

    stream = Terminal()
    bar = render.ProgressBar(stream, {"1": "Sampler"}.__getitem__)  # type: ignore[arg-type]
    bar("executing", {"node": "1"})
    bar("progress", {"node": "1", "value": 1, "max": 2})
    bar.finish_node()
    lines = [line.strip() for line in stream.text.split("\r") if line.strip()]
    assert lines[:2] == ["Sampler", "Sampler [###############...............] 1/2"]


def test_names_that_cannot_be_printed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", closefd=False) as closed:
        monkeypatch.setattr(render.sys, "stdout", closed)
        path = command.place / "w.json"
        path.write_text(json.dumps(text_to_image()))
        options = ["--models", str(command.models), "--out", str(command.place / "out")]
        assert render.main([str(path), *options]) == 1
        with suppress(BrokenPipeError):
            closed.close()
    monkeypatch.undo()
    says = (
        f"the pictures are in {command.place / 'out'}, but their names cannot be printed: [Errno 32] Broken"
    )
    assert says in command.capsys.readouterr().err
    assert [path.name for path in (command.place / "out").iterdir()] == ["picture_00001_.png"]


# Bad input: what validation says


def changed(number: int, values: list[Any] | None = None, **more: Any) -> Graph:
    """The graph with the widgets' values, or other keys, of one node replaced."""
    graph = text_to_image()
    node_of(graph, number).update(more if values is None else {"widgets_values": values, **more})
    return graph


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        (
            changed(8, [0, 1.0, "by size", 1.15]),
            "node 8 (RectifluxSchedule): steps must be at least 1, got 0",
        ),
        (changed(6, [64, 8, 1]), "node 6 (RectifluxEmptyLatent): height must be at least 16, got 8"),
        (changed(10, [1e9]), "node 10 (RectifluxSampler): cfg_scale must be at most"),
        (changed(10, ["big"]), "node 10 (RectifluxSampler): cfg_scale must be a number, got 'big'"),
        (changed(9, ["rk9"]), "node 9 (RectifluxSolver): solver: 'rk9' is not in its list, which has"),
        (changed(1, ["m.safetensors", "auto"]), "model_name: 'm.safetensors' is not in its list, which has"),
        (
            changed(1, ["m.ckpt", "auto"]),
            "model_name: 'm.ckpt' is a pickle, which could run code; convert it to safetensors",
        ),
        (changed(12, ["../fox"]), "filename_prefix must stay in the folder output, got '../fox'; write a"),
        (changed(12, [""]), "filename_prefix is empty; write how the pictures' names begin"),
        (changed(12, ["x" * 300]), "filename_prefix must have at most 200 bytes, got 300; shorten it"),
        (
            changed(12, type="Frobnicate"),
            "nodes that are not installed here: node 12 (Frobnicate); remove or",
        ),
        (changed(12, mode=2), "the workflow saves and shows nothing; add a Save Image or Preview Image node"),
        (
            changed(7, mode=2),
            "node 10 (RectifluxSampler): noise is not connected; connect a wire of type NOISE",
        ),
        (changed(12, [], type="PreviewImage"), "saves no picture, it only previews; add a Save Image node"),
    ],
)
def test_graphs_that_cannot_run(command: Command, graph: Graph, says: str) -> None:
    assert says in command.refuses(graph)


@pytest.mark.parametrize(("side", "near"), [("width=100", 96), ("height=24", 16)])
def test_sides_that_are_no_multiple_of_16(command: Command, side: str, near: int) -> None:
    name, value = side.split("=")
    assert command.refuses(text_to_image(), "--set", side) == (
        f"node 6 (RectifluxEmptyLatent): {name} must be a multiple of 16, got {value}; {near} is near"
    )


def test_a_dangling_link_and_a_wire_from_the_wrong_kind(command: Command) -> None:
    graph = text_to_image()
    del graph["nodes"][0]
    says = "input model of node 10 (RectifluxSampler) is linked to node 1, which does not exist"
    assert command.refuses(graph) == f"{says}; connect it again"
    graph = text_to_image()
    wire = next(link for link in graph["links"] if link[3:5] == [10, 0])
    wire[1] = 3
    assert "model takes MODEL, but output 0 of node 3 gives VAE" in command.refuses(graph)


def test_a_cycle(command: Command) -> None:
    graph = changed(6, [], type="RectifluxVAEEncode")
    sockets = [{"name": "image", "type": "IMAGE", "link": 99}, {"name": "vae", "type": "VAE", "link": 98}]
    node_of(graph, 6)["inputs"] = sockets
    graph["links"] += [[99, 11, 0, 6, 0, "IMAGE"], [98, 3, 0, 6, 1, "VAE"]]
    sentence = command.refuses(graph)
    assert "the node feeds itself in a circle; disconnect one of these wires" in sentence
    assert all(f"{number} (Rectiflux" in sentence for number in (6, 8, 10, 11))


# Bad input: files


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"nodes": [', "is not valid JSON"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is a damaged PNG"),
        (b"", "is empty"),
    ],
)
def test_workflow_files_cut_short(command: Command, content: bytes, says: str) -> None:
    path = command.place / "broken"
    path.write_bytes(content)
    assert says in command.refuses(path)


def test_no_such_workflow_and_no_such_folder(command: Command) -> None:
    path = command.place / "nowhere.json"
    assert command.refuses(path) == f"there is no file {path}"
    assert command.refuses(command.place / "out").startswith(f"{command.place / 'out'} is a folder; name a")


def test_unknown_and_ambiguous_settings(command: Command) -> None:
    assert command.refuses(text_to_image(), "--set", "sead=1").startswith(
        "--set sead: no such widget here; there are"
    )
    graph = text_to_image()
    graph["nodes"].append({**node_of(graph, 4), "id": 14, "title": "Another"})
    sentence = command.refuses(graph, "--set", "prompt=x")
    assert sentence == "--set prompt: 2 nodes have it, say which: 4.prompt (FLUX Prompt), 14.prompt (Another)"


def test_wrong_arguments(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        ([], "the following arguments are required: workflow"),
        (["w.json", "--frob"], "unrecognized arguments: --frob"),
        (["w.json", "--models", "nowhere"], "argument --models: there is no folder nowhere"),
    ):
        with pytest.raises(SystemExit) as ended:
            render.main(arguments)
        assert ended.value.code == 1
        assert capsys.readouterr().err == f"render: {says} (see run.py render --help)\n"


@pytest.mark.parametrize("kind", ["diffusion_models", "vae", "t5"])
def test_model_files_cut_short_or_of_another_model(command: Command, tmp_path: Path, kind: str) -> None:
    own, _ = write_models(tmp_path / "own"), write_models(tmp_path / "intact")
    command.models = own
    folder = own / ("text_encoders" if kind == "t5" else kind)
    path = folder / NAMES[kind]
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:5], b""):
        path.write_bytes(part)
        sentence = command.refuses(text_to_image())
        assert sentence.startswith("node ") and path.name in sentence
    other, name = ("diffusion_models", "FLUX.1 transformer") if kind == "vae" else ("vae", "VAE")
    path.write_bytes((own.parent / "intact" / other / NAMES[other]).read_bytes())
    assert f"{path.name} is a {name}, not a " in command.refuses(text_to_image())


def test_a_pickle_under_a_safe_name(command: Command, tmp_path: Path) -> None:
    command.models = write_models(tmp_path / "own")
    path = command.models / "diffusion_models" / NAMES["diffusion_models"]
    path.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    assert path.name in command.refuses(text_to_image())


@pytest.mark.parametrize(("saves", "file"), [(0, "picture"), (1, "fox")])
def test_a_full_disk(command: Command, monkeypatch: pytest.MonkeyPatch, saves: int, file: str) -> None:
    """Found before anything runs when it is full then, or else by Save Image."""
    left = [None] * saves

    def fsync(descriptor: int) -> None:
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()

    monkeypatch.setattr(files.os, "fsync", fsync)
    sentence = command.refuses(text_to_image(), "--set", "filename_prefix=fox")
    says = f"the disk is full, {file}.png was not saved to {command.place / 'out'}; free some space and run"
    assert sentence == ("node 12 (SaveImage): " if saves else "") + f"{says} again"
    assert ("FLUX Sampler" in command.notes) == bool(saves)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("diffusion_models", "node 10 (RectifluxSampler): the sampled values contain NaN or inf"),
        ("vae", "node 11 (RectifluxVAEDecode): the image's values contain NaN or inf"),
    ],
)
def test_weights_that_are_no_numbers(command: Command, tmp_path: Path, kind: str, says: str) -> None:
    command.models = write_models(tmp_path / "own")
    path = command.models / kind / NAMES[kind]
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(path).items()}, path)
    sentence = command.refuses(text_to_image())
    remedy = "load another VAE" if kind == "vae" else "choose bf16 or fp32 as weight_dtype"
    assert sentence == f"{says}: the weights are damaged or too large; {remedy}"


def test_an_output_folder_that_cannot_be(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in command.refuses(text_to_image(), "--out", str(tmp_path / "file" / "deeper"))
