"""Links that the owner made inside the folders are followed; names that lead outside are refused."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image
from rectiflux.host import context
from rectiflux.host.execution import Executor
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.stock_nodes import LoadImage
from rectiflux.host.validation import InvalidPrompt, validate

from .client import Client
from .test_file_routes import png, upload

LEAVING = ["../x.png", "extra/../../x.png", "/tmp/x.png", "C:x.png"]
LEAVING += [name.replace("/", "\\") for name in LEAVING]


@pytest.fixture
def elsewhere(folders: Folders, tmp_path: Path) -> Path:
    """A folder on another disk, linked from each of the host's folders; links to images, and broken ones."""
    disk = tmp_path / "elsewhere"
    disk.mkdir()
    for path, color in ((folders.output / "red.png", "red"), (disk / "blue.png", "blue")):
        Image.new("RGB", (6, 4), color).save(path)
    for root in (folders.output, folders.input, folders.user):
        (root / "extra").symlink_to(disk, target_is_directory=True)
    (folders.input / "link-inside.png").symlink_to("../output/red.png")
    (folders.input / "link-outside.png").symlink_to(disk / "blue.png")
    (folders.input / "dangling.png").symlink_to("gone.png")
    (folders.input / "loop.png").symlink_to("loop.png")
    return disk


IMAGES = {"link-inside.png": (255, 0, 0), "link-outside.png": (0, 0, 255), "extra/blue.png": (0, 0, 255)}


def test_linked_images_are_listed_loaded_and_shown(client: Client, folders: Folders, elsewhere: Path) -> None:
    listed = ["link-inside.png", "link-outside.png"]
    assert folders.images() == listed
    assert sorted(client.get_json("/internal/files/input")) == [f"{name} [input]" for name in listed]
    for name, color in IMAGES.items():
        with context.using(folders):
            assert LoadImage.VALIDATE_INPUTS(name) is True
            loaded = LoadImage().load_image(name)[0]
        assert tuple((loaded[0, 0, 0] * 255).int().tolist()) == color
        assert client.get(f"/api/view?filename={quote(name)}&type=input").body[:4] == b"\x89PNG"
        assert client.get(f"/api/view?filename={quote(name)}&type=input&channel=rgb").status == 200


def test_a_linked_subfolder_of_the_output_is_saved_into(
    client: Client, registry: Registry, elsewhere: Path, prompts: Any
) -> None:
    prompt = prompts.image()
    prompt["5"]["inputs"]["filename_prefix"] = "extra/fox"
    (image,) = Executor(registry).run(validate(prompt, registry)).images()
    assert image == {"filename": "fox_00001_.png", "subfolder": "extra", "type": "output"}
    assert (elsewhere / "fox_00001_.png").is_file()
    assert client.get("/api/view?filename=fox_00001_.png&subfolder=extra").status == 200


def test_linked_workflows_are_listed_and_read(client: Client, folders: Folders, elsewhere: Path) -> None:
    (elsewhere / "fox.json").write_text("{}")
    (folders.user / "gone.json").symlink_to("nowhere.json")
    assert client.get_json("/api/userdata?dir=.%2Fextra&recurse=true") == ["blue.png", "fox.json"]
    assert client.get_json("/api/userdata/extra%2Ffox.json") == {}


def test_replacing_a_linked_file_leaves_its_target(client: Client, folders: Folders, elsewhere: Path) -> None:
    before = (elsewhere / "blue.png").read_bytes()
    assert upload(client, png((2, 2)), "link-outside.png", overwrite="true")[0] == 200
    assert (elsewhere / "blue.png").read_bytes() == before
    assert not (folders.input / "link-outside.png").is_symlink()


@pytest.mark.parametrize("name", LEAVING)
def test_names_that_lead_outside_are_refused(
    client: Client, registry: Registry, elsewhere: Path, prompts: Any, name: str
) -> None:
    """As a file, a subfolder, a prefix, the image of a mask, an input; links change nothing of it."""
    (elsewhere.parent / "x.png").write_bytes(png())
    for query in (f"filename={quote(name)}", f"filename=x.png&subfolder={quote(name)}"):
        for kind in ("input", "output", "temp"):
            assert client.get(f"/api/view?{query}&type={kind}").status == 400
    assert upload(client, png(), subfolder=name)[0] == 400
    for reference in ({"filename": name}, {"filename": "x.png", "subfolder": name}):
        fields = {"original_ref": json.dumps({**reference, "type": "input"})}
        assert upload(client, png(), path="mask", **fields)[0] == 400
    assert client.post(f"/api/userdata/{quote(name, safe='')}", data=b"x").status == 400
    prompt = prompts.image()
    prompt["5"]["inputs"]["filename_prefix"] = name
    with pytest.raises(InvalidPrompt, match="filename_prefix must stay in the folder output"):
        validate(prompt, registry)
    with context.using(registry.folders):
        assert LoadImage.VALIDATE_INPUTS(name) is not True
        assert LoadImage.VALIDATE_INPUTS(f"{name} [output]") is not True


def test_images_that_are_listed_are_found_and_hidden_ones_are_not_listed(folders: Folders) -> None:
    accents = unicodedata.normalize("NFD", "é.png")
    names = ["a b (1).png", "模型🦊.PNG", accents, "back\\slash.png", "dots..png"]
    for name in (*names, "._photo.png", ".hidden.png", "C:drive.png", "line\nbreak.png", "note.txt"):
        (folders.input / name).touch()
    with open(os.fsencode(folders.input) + b"/bad\xff.png", "wb"):
        pass
    (folders.input / "__MACOSX").mkdir()
    (folders.input / "folder.png").mkdir()
    assert folders.images() == sorted(names)
    assert all(folders.annotated(name).is_file() for name in names)
    with context.using(folders):
        assert all(LoadImage.VALIDATE_INPUTS(name) is True for name in names)


def test_a_backslash_separates_where_no_file_has_it(folders: Folders) -> None:
    (folders.input / "sub").mkdir()
    (folders.input / "sub" / "p.png").touch()
    assert folders.annotated("sub\\p.png") == folders.input / "sub" / "p.png"
    (folders.input / "sub\\p.png").touch()
    assert folders.annotated("sub\\p.png") == folders.input / "sub\\p.png"


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".png", "ü" * 130, "/".join(["long"] * 2000), "half\ud83d", "a\tb"]
)
def test_names_that_no_file_can_have_are_refused_in_a_sentence(folders: Folders, name: str) -> None:
    with pytest.raises(ValueError) as refused:
        folders.locate(name)
    sentence = str(refused.value)
    assert sentence.isprintable() and len(sentence) < 400
