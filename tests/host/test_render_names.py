"""`run.py render`: names of models and images in any form, and consoles that cannot print them."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rectiflux.host import files, render
from rectiflux.host.registry import Registry
from rectiflux.host.workflow import Document, to_prompt

from ..nodes.tiny import NAMES, write_models
from .editor_graph import node_of, text_to_image
from .render_command import Command, changed, metadata, pixels


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
