"""Previews are deleted at the next start, unless an editor that still runs on the folder shows them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from rectiflux.host import previews, unfinished


def preview(temp: Path, name: str) -> Path:
    """A preview saved now; the file system's clock, which may be coarse, goes on before the next."""
    path = temp / f"preview_{name}_00001_.png"
    path.write_bytes(b"image")
    time.sleep(0.05)
    return path


def test_a_second_editor_leaves_the_firsts_previews_alone(tmp_path: Path) -> None:
    old = preview(tmp_path, "old")
    kept = tmp_path / "mine.png"
    kept.touch()
    with previews.owned(tmp_path):
        assert not old.exists() and kept.exists()
        first = preview(tmp_path, "first")
        with previews.owned(tmp_path):
            second = preview(tmp_path, "second")
        with previews.owned(tmp_path):
            assert first.exists() and second.exists(), "they may be the first editor's"
    assert len(list(tmp_path.iterdir())) == 3, "no marker is left"
    with previews.owned(tmp_path):
        assert not first.exists() and not second.exists() and kept.exists()


def test_the_previews_of_a_killed_editor_are_deleted(tmp_path: Path) -> None:
    marker, file = unfinished.create(tmp_path / previews.MARKER)
    shown = preview(tmp_path, "shown")
    with previews.owned(tmp_path):
        assert shown.exists() and marker.exists()
    file.close()  # as the system does when a process ends
    with previews.owned(tmp_path):
        assert not shown.exists() and not marker.exists()


def test_a_read_only_folder_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(unfinished, "create", refuse)
    shown = preview(tmp_path, "shown")
    with previews.owned(tmp_path):
        assert shown.exists()
