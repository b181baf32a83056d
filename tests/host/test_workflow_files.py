"""Reading workflow files: the editor's graphs, API prompts, the PNGs that carry both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rectiflux.host.workflow import Document, WorkflowError, read_document, to_prompt

from .graphs import API, INFO, pair


def saved(tmp_path: Path, content: str | bytes, name: str = "w.json") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def png(tmp_path: Path, **texts: Any) -> Path:
    info = PngInfo()
    for name, value in texts.items():
        info.add_text(name, value if isinstance(value, str) else json.dumps(value))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "w.png", pnginfo=info)
    return tmp_path / "w.png"


def test_reads_the_editors_and_the_api_format(tmp_path: Path) -> None:
    assert read_document(saved(tmp_path, json.dumps(pair()))) == Document(pair(), None)
    assert read_document(saved(tmp_path, json.dumps(API))) == Document(None, API)
    body = json.dumps({"prompt": API, "client_id": "x"})
    assert read_document(saved(tmp_path, body)) == Document(None, API)
    assert read_document(saved(tmp_path, b"\xef\xbb\xbf" + json.dumps(API).encode())) == Document(None, API)


def test_a_png_gives_the_prompt_that_made_it_and_the_graph(tmp_path: Path) -> None:
    found = read_document(png(tmp_path, prompt=API, workflow=pair()))
    assert found == Document(pair(), API)
    assert to_prompt(found, INFO) == API
    assert read_document(png(tmp_path, workflow=pair())) == Document(pair(), None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00junk", "is neither JSON nor a PNG"),
        (json.dumps(pair())[:-40].encode(), "is not valid JSON (line 1, column"),
        (b"[1, 2]", "has no workflow: neither the editor's format"),
        (b"{}", "has no workflow"),
        (b'{"1": {"class_type": "Number", "inputs": []}}', "is damaged: a node's inputs"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(WorkflowError) as caught:
        read_document(path)
    assert str(caught.value).startswith(f"{path} ") and says in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match="nowhere.json does not exist$"):
        read_document(tmp_path / "nowhere.json")
    with pytest.raises(WorkflowError, match="is a folder; give a workflow"):
        read_document(tmp_path)


def test_truncated_or_damaged_pngs_and_pngs_without_a_workflow(tmp_path: Path) -> None:
    path = png(tmp_path, prompt=API)
    whole = path.read_bytes()
    for part in (whole[:20], whole[: len(whole) // 2], whole[:-15], whole[:60] + b"XX" + whole[62:]):
        path.write_bytes(part)
        with pytest.raises(WorkflowError, match="is damaged or truncated"):
            read_document(path)
    with pytest.raises(WorkflowError, match="w.png has no workflow"):
        read_document(png(tmp_path))
    with pytest.raises(WorkflowError, match=r"w.png \(workflow\) is not valid JSON"):
        read_document(png(tmp_path, workflow='{"nodes": ['))
