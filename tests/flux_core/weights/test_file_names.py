"""Which names of files are listed, refused and quoted; folders of shards in safetensors' other ending."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core.weights import Checkpoint, read_state_dict, read_weights
from rectiflux.flux_core.weights.file_names import refusal, walk_visible
from rectiflux.flux_core.weights.messages import quoted
from safetensors.torch import save, save_file

OUTSIDE = "must stay in its folder"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, OUTSIDE) for name in ("", "..", "../x", "a/../../x", "a/..", "/x", "//x", "..\\x")),
        *((name, OUTSIDE) for name in ("a\\..\\..\\x", "\\x", "\\\\server\\x", "D:x", "c:\\x", "a/.. /x")),
        *((name, "control characters") for name in ("a\0b", "a\nb", "a\x1b[2Jb", "a\u2028b")),
        ("bad\udcff.safetensors", "Unicode"),
        *((name, "at most 255 bytes") for name in ("x" * 256, "sub/" + "ü" * 128)),
        *((name, "must be text") for name in (5, None, {}, 1.5, ["a"])),
    ],
)
def test_names_that_are_refused(name: object, reason: str) -> None:
    found = refusal(name)
    assert found is not None and reason in found


@pytest.mark.parametrize(
    "name",
    ["a.safetensors", "sub/a", "sub\\a", "./a", "...a", "a..b", "my model (1) é 模型 🦊", "x" * 255, "ab:c"],
)
def test_names_that_are_accepted(name: str) -> None:
    assert refusal(name) is None


@pytest.mark.parametrize("value", ["bad\udcff\n\x1b", "x" * 1000, {"a": ["b" * 300]}, b"\xff", 5, None])
def test_what_is_quoted_fits_on_one_line_of_any_console(value: object) -> None:
    text = quoted(value)
    text.encode()
    assert text.isprintable() and 0 < len(text) <= 200


def test_a_folder_is_walked_without_hidden_broken_and_repeated_entries(tmp_path: Path) -> None:
    root = tmp_path / ".hidden root"
    for name in ("b/2", "b/1", "a", ".a", "._b", ".git/c", "__MACOSX/d", "line\nbreak", "D:e"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if sys.platform == "linux":
        Path(os.fsdecode(os.fsencode(root) + b"/bad\xff")).touch()
    (root / "gone").symlink_to("nowhere")
    (root / "b" / "again").symlink_to(root)
    (root / "elsewhere").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "3").touch()
    (root / "itself").symlink_to("itself")
    found = [(place.name, files) for place, _, files in walk_visible(root)]
    assert found == [(".hidden root", ["a"]), ("b", ["1", "2"]), ("elsewhere", ["3"])]
    assert list(walk_visible(tmp_path / "missing")) == []


STATE = {f"weight{i}": torch.full((2,), float(i)) for i in range(3)}


@pytest.mark.parametrize("ending", [".sft", ".SFT", ".safetensors", ".SafeTensors"])
def test_a_safetensors_file_by_any_of_its_endings(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"flux1-dev{ending}"
    save_file(STATE, path)
    assert read_state_dict(path).keys() == STATE.keys()
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).part().tensors.keys() == STATE.keys()


@pytest.mark.parametrize("listed", [".sft", ".safetensors"])
@pytest.mark.parametrize("ending", [".sft", ".safetensors"])
def test_shards_by_either_ending_in_their_index_and_in_the_folder(
    tmp_path: Path, listed: str, ending: str
) -> None:
    """Also where the files were renamed and their index was not."""
    shards = {name: f"model-{name}" for name in STATE}
    for name, stem in shards.items():
        save_file({name: STATE[name]}, tmp_path / f"{stem}{ending}")
    index = {"weight_map": {name: f"{stem}{listed}" for name, stem in shards.items()}}
    (tmp_path / f"model{listed}.index.json").write_text(json.dumps(index))
    assert read_weights(tmp_path).tensors.keys() == STATE.keys()


def test_hidden_files_and_broken_links_in_a_folder_are_ignored(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    for name in ("._model.safetensors", "._model.safetensors.index.json"):
        (tmp_path / name).write_bytes(bytes.fromhex("00051607") + bytes(4092))
    (tmp_path / "a.safetensors").symlink_to("gone")
    assert read_weights(tmp_path).paths == (tmp_path / "model.safetensors",)


@pytest.mark.parametrize("name", ["../x.safetensors", "D:x.safetensors", "..\\x.sft", "x.bin", "a\nb.sft"])
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.sft.index.json").write_text(json.dumps({"weight_map": {"weight0": name}}))
    with pytest.raises(ValueError, match="not an index of shards") as caught:
        read_weights(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every file name is Unicode")
@pytest.mark.parametrize("name", [b"b\xff.safetensors", b"b\xff.gguf", b"b\xff/a.safetensors", b"b\xff"])
def test_a_name_that_is_not_utf8_is_the_reason(tmp_path: Path, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if name == b"b\xff" else path.write_bytes(save(STATE))
    with pytest.raises(ValueError) as caught:
        read_weights(path)
    message = str(caught.value)
    message.encode()
    assert "name" in message and "rename" in message
    assert "damaged" not in message and "download" not in message
