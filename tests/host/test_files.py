"""Paths that cannot leave their folder, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

import pytest
from rectiflux.host import files
from rectiflux.host.files import Folders, SaveError, contained


@pytest.mark.parametrize(
    "name",
    ["../a", "a/../../b", "/etc/passwd", "..\\..\\a", "", ".", "a/..", "sub/../../output/x", "a\0b", "C:a"],
)
def test_no_path_leaves_its_folder(folders: Folders, name: str) -> None:
    with pytest.raises(ValueError):
        contained(folders.input, name)
    with pytest.raises(ValueError):
        folders.locate(name, kind="input")
    with pytest.raises(ValueError):
        folders.annotated(f"{name} [input]")


def test_names_are_located_and_images_listed(folders: Folders) -> None:
    assert folders.locate("a.png", "sub", "output") == folders.output / "sub" / "a.png"
    assert folders.annotated("sub/a.png [temp]") == folders.temp / "sub" / "a.png"
    assert folders.annotated("a b.png") == folders.input / "a b.png"
    with pytest.raises(ValueError, match="got 'user'"):
        folders.locate("a", kind="user")
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png.part"):
        (folders.input / name).touch()
    (folders.input / "folder.png").mkdir()
    assert folders.images() == ["a.jpg", "b.PNG"]


def full_disk(file: IO[bytes]) -> None:
    file.write(b"half an image")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_reported_and_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(SaveError, match=f"^the disk is full, a.json was not saved to {tmp_path}; "):
        files.write(path, full_disk)
    with pytest.raises(SaveError, match="the disk is full, sum.png was not saved"):
        files.write_numbered(tmp_path, "sum", full_disk)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def test_no_partial_file_has_the_final_name(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def content(file: IO[bytes]) -> None:
        file.write(b"half")
        file.flush()
        seen.append([name for name in os.listdir(tmp_path) if not name.endswith(".part")])

    assert files.write_numbered(tmp_path, "sum", content).name == "sum_00001_.png"
    files.write(tmp_path / "b.json", content)
    assert seen == [[], ["sum_00001_.png"]] and (tmp_path / "b.json").read_bytes() == b"half"
    assert sorted(os.listdir(tmp_path)) == ["b.json", "sum_00001_.png"]


def test_the_index_counts_on_from_the_highest(tmp_path: Path) -> None:
    for name in ("sum_00004_.png", "sum_00002_.png", "summer_00009_.png", "sum_x.png"):
        (tmp_path / name).touch()

    def content(file: IO[bytes]) -> None:
        (tmp_path / "sum_00006_.png").write_bytes(b"theirs")  # another program takes the name meanwhile
        file.write(b"ours")

    names = [files.write_numbered(tmp_path, "sum", lambda file: file.write(b"x")).name]
    names += [files.write_numbered(tmp_path, "sum", content).name]
    assert names == ["sum_00005_.png", "sum_00007_.png"]
    assert (tmp_path / "sum_00006_.png").read_bytes() == b"theirs"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.check_writable(tmp_path)
    assert os.listdir(tmp_path) == []

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SaveError, match="^the disk is full"):
        files.check_writable(tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / "data").touch()
    with pytest.raises(SaveError, match="^cannot write .*data/a.json"):
        files.write(tmp_path / "data" / "a.json", b"")
    with pytest.raises(SaveError, match="^cannot write "):
        Folders.under(tmp_path / "data")
