"""Paths that cannot leave their folder, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from rectiflux.host import files
from rectiflux.host.files import Folders, SaveError, contained


@pytest.mark.parametrize(
    "name", ["../a", "a/../../b", "/etc/passwd", "..\\..\\a", "", ".", "a/..", "sub/../../output/x", "a\0b"]
)
def test_no_path_leaves_its_folder(folders: Folders, name: str) -> None:
    with pytest.raises(ValueError):
        contained(folders.input, name)
    with pytest.raises(ValueError):
        folders.locate(name, kind="input")
    with pytest.raises(ValueError):
        folders.annotated(f"{name} [input]")


def test_a_link_does_not_lead_out_either(folders: Folders) -> None:
    (folders.input / "out").symlink_to(folders.user)
    with pytest.raises(ValueError, match="'out/secret' is no name of a file in the folder input"):
        contained(folders.input, "out/secret")


def test_where_files_are(folders: Folders) -> None:
    assert folders.locate("a.png", "sub", "output") == folders.output / "sub" / "a.png"
    assert folders.annotated("sub/a.png [temp]") == folders.temp / "sub" / "a.png"
    assert folders.annotated("a b.png") == folders.input / "a b.png"
    with pytest.raises(ValueError, match="the folder must be one of input, output, temp, got 'user'"):
        folders.locate("a", kind="user")


def test_only_pictures_are_listed(folders: Folders) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png.part"):
        (folders.input / name).touch()
    (folders.input / "folder.png").mkdir()
    assert folders.pictures() == ["a.jpg", "b.PNG"]


def full_disk(file: IO[bytes]) -> None:
    file.write(b"half a picture")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(SaveError) as caught:
        files.write(path, full_disk)
    expected = f"the disk is full, a.json was not saved to {tmp_path}; free some space and run again"
    assert str(caught.value) == expected
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(SaveError, match="the disk is full, sum.png was not saved"):
        files.write_numbered(tmp_path, "sum", full_disk)
    assert os.listdir(tmp_path) == ["a.json"]


def test_nothing_half_written_ever_has_the_final_name(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def content(file: IO[bytes]) -> None:
        file.write(b"half")
        file.flush()
        seen.append([name for name in os.listdir(tmp_path) if not name.endswith(".part")])

    path = files.write_numbered(tmp_path, "sum", content)
    files.write(tmp_path / "b.json", content)
    assert seen == [[], ["sum_00001_.png"]]
    assert path.name == "sum_00001_.png" and (tmp_path / "b.json").read_bytes() == b"half"
    assert sorted(os.listdir(tmp_path)) == ["b.json", "sum_00001_.png"]


def test_a_process_killed_during_a_save_leaves_no_picture(tmp_path: Path) -> None:
    code = """
import sys, time
from rectiflux.host.files import write_numbered
def content(file):
    file.write(b"half a picture")
    file.flush()
    print("half", flush=True)
    time.sleep(60)
write_numbered(__import__("pathlib").Path(sys.argv[1]), "sum", content)
"""
    start = Path(__file__).parents[1] / "conftest.py"  # makes the pack importable as rectiflux
    run = f"import runpy; runpy.run_path({str(start)!r}); exec({code!r})"
    command = [sys.executable, "-c", run, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        process.kill()
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".part")] == []
    assert files.write_numbered(tmp_path, "sum", lambda file: file.write(b"whole")).name == "sum_00001_.png"


def test_numbers_go_on_after_the_highest(tmp_path: Path) -> None:
    for name in ("sum_00004_.png", "sum_00002_.png", "summer_00009_.png", "sum_x.png"):
        (tmp_path / name).touch()
    names = [files.write_numbered(tmp_path, "sum", lambda file: file.write(b"x")).name for _ in range(2)]
    assert names == ["sum_00005_.png", "sum_00006_.png"]


def test_a_number_that_another_program_takes_is_stepped_over(tmp_path: Path) -> None:
    def content(file: IO[bytes]) -> None:
        (tmp_path / "sum_00001_.png").write_bytes(b"theirs")
        file.write(b"ours")

    assert files.write_numbered(tmp_path, "sum", content).name == "sum_00002_.png"
    assert (tmp_path / "sum_00001_.png").read_bytes() == b"theirs"


def test_a_folder_that_takes_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.check_writable(tmp_path)
    assert os.listdir(tmp_path) == []

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SaveError, match=f"^the disk is full, picture.png was not saved to {tmp_path}; free"):
        files.check_writable(tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="file/a.json cannot be written: .*; choose another folder or change"):
        files.write(tmp_path / "file" / "a.json", b"")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(SaveError, match="cannot be written: .*; choose another folder or change its rights"):
        Folders.under(tmp_path / "data")
