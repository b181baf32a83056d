"""What killed writes leave is deleted at the next start; programs that share a folder lose nothing."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest
from rectiflux.host import file_routes, files, unfinished
from rectiflux.host.file_routes import FileRoutes
from rectiflux.host.files import Folders

from .client import Client


def test_the_next_start_deletes_unfinished_files(tmp_path: Path) -> None:
    """Below every folder, also a linked one; what a running program still writes stays, as does all else."""
    folders = Folders.under(tmp_path / "data")
    (folders.output / "disk").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk").mkdir()
    (folders.output / "disk" / "loop").symlink_to(folders.output)
    left = [folders.user / ".a.json.0123abcd.part", folders.input / "sub" / ".ü.png.ffffffff.part"]
    left += [folders.output / ".fox.png.deadbeef.part", tmp_path / "disk" / ".x.png.00000000.part"]
    kept = [
        folders.output / name for name in ("a.part", ".part", ".b.png.part", "c.0123abcd.part", "fox.png")
    ]
    for path in (*left, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    seen: list[list[Path]] = []

    def content(file: IO[bytes]) -> None:
        Folders.under(tmp_path / "data")  # another host starts now
        seen.append(list(folders.temp.iterdir()))
        file.write(b"whole")

    files.write(folders.temp / "new.png", content)
    assert len(seen[0]) == 1 and (folders.temp / "new.png").read_bytes() == b"whole"
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        files.write(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    with pytest.raises(files.SaveError, match="too long .* choose a shorter name"):
        files.write(tmp_path / ("x" * 256), b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(files.SaveError, match="is a folder; choose another name"):
        files.write(tmp_path / "folder", b"")
    assert len(list(tmp_path.iterdir())) == 3


def test_two_hosts_lose_no_setting(tmp_path: Path) -> None:
    """Each setting is written by one of two hosts on the same folder, at the same time."""
    hosts = [FileRoutes(Folders.under(tmp_path / "data")) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: hosts[i % 2].merge_settings({f"s{i}": i}), range(50)))
    assert hosts[0].settings() == {f"s{i}": i for i in range(50)}


def test_a_lock_that_is_never_released_ends_in_a_sentence(
    client: Client, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "MAX_WAIT", 0.05)
    with unfinished.locked(folders.user / "comfy.settings.lock"):
        answer = client.post("/api/settings", {"a": 1})
    assert "another program is writing it" in answer.json["error"]
    assert client.post("/api/settings", {"a": 1}).status == 200


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_user_files_on_a_read_only_disk(
    client: Client, folders: Folders, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Moved, deleted, replaced: one sentence with the reason, and the file stays."""
    assert client.post("/api/userdata/a.json", data=b"1").status == 200
    (folders.user / "comfy.settings.json").write_text("damaged")

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_routes.os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    for method, path in (
        ("POST", "/api/userdata/a.json/move/b.json"),
        ("DELETE", "/api/userdata/a.json"),
        ("POST", "/api/userdata/a.json"),
    ):
        answer = client.request(method, path)
        assert answer.status != 500
        assert os.strerror(number) in answer.json["error"] and "permissions" in answer.json["error"]
    assert client.get("/api/settings").status == 200
    monkeypatch.undo()
    assert client.get_json("/api/userdata/a.json") == 1


def test_a_file_is_not_moved_onto_a_folder(client: Client, folders: Folders) -> None:
    assert client.post("/api/userdata/a.json", data=b"1").status == 200
    (folders.user / "workflows").mkdir()
    for query in ("", "?overwrite=true"):
        answer = client.post(f"/api/userdata/a.json/move/workflows{query}")
        assert answer.status != 500 and answer.text
    assert client.get_json("/api/userdata/a.json") == 1
