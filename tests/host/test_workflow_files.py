"""Reading workflow files: the editor's graphs, API prompts, the PNGs that carry both."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
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


@pytest.mark.parametrize("prompt", ["a red fox", '"a fox"', "{}", "null", ""])
def test_a_prompt_that_another_program_wrote_is_no_workflow(tmp_path: Path, prompt: str) -> None:
    """The editor reads `workflow` first, so such a file opens there."""
    assert read_document(png(tmp_path, prompt=prompt, workflow=pair())) == Document(pair(), None)
    with pytest.raises(WorkflowError, match="w.png has no workflow"):
        read_document(png(tmp_path, prompt=prompt))


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


UNICODE, LATIN = "红 fox ü 🦊", "a grün fox"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def texts(kind: str, text: str, encoding: str = "utf-8") -> bytes:
    """The chunks of a prompt and a graph with this text."""
    header = {"tEXt": b"", "iTXt": b"\0\0\0\0", "zTXt": b"\0"}[kind]
    graph = pair(widgets_values=["mul", text])
    prompt = {"2": {"class_type": "Mix", "inputs": {"text": text}}}
    found = b""
    for key, document in (("prompt", prompt), ("workflow", graph)):
        data = json.dumps(document, ensure_ascii=False).encode(encoding)
        data = zlib.compress(data) if kind == "zTXt" else data
        found += chunk(kind.encode(), key.encode() + b"\0" + header + data)
    return found


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (texts("tEXt", UNICODE), b"", UNICODE),
        (b"", texts("tEXt", UNICODE), UNICODE),
        (texts("iTXt", UNICODE), b"", UNICODE),
        (texts("zTXt", UNICODE), b"", UNICODE),
        (texts("tEXt", LATIN) + texts("iTXt", UNICODE), b"", UNICODE),
        (texts("iTXt", UNICODE) + texts("tEXt", LATIN), b"", LATIN),
        (texts("iTXt", UNICODE), texts("zTXt", LATIN), LATIN),
        (texts("tEXt", LATIN, "latin-1"), b"", LATIN),
        (texts("zTXt", LATIN, "latin-1"), b"", LATIN),
    ],
)
def test_metadata_is_read_as_utf8_and_else_as_latin1(
    tmp_path: Path, before: bytes, after: bytes, text: str
) -> None:
    """As the editor reads it. Comfy-Org/ComfyUI_frontend#8150, Comfy-Org/ComfyUI#2822."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    data = b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")
    found = read_document(saved(tmp_path, data, "w.png"))
    assert found.prompt and found.prompt["2"]["inputs"]["text"] == text
    assert found.graph and found.graph["nodes"][1]["widgets_values"][1] == text


@pytest.mark.parametrize(
    "chunks",
    [
        b"",
        chunk(b"IDAT", b"") + chunk(b"IHDR", bytes(13)),
        chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)) + texts("tEXt", LATIN),
        texts("tEXt", LATIN) + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        chunk(b"IHDR", b"") + chunk(b"IDAT", b""),
        struct.pack(">I", 2**31) + b"IHDR",
    ],
)
def test_chunks_that_are_missing_or_out_of_order(tmp_path: Path, chunks: bytes) -> None:
    data = b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")
    with pytest.raises(WorkflowError, match="w.png is damaged"):
        read_document(saved(tmp_path, data, "w.png"))


def test_large_metadata_is_read_up_to_a_limit(tmp_path: Path) -> None:
    large = {**API, "2": {"class_type": "Mix", "inputs": {"text": "fox " * 750_000}}}
    info = PngInfo()
    info.add_text("prompt", json.dumps(large), zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "w.png", pnginfo=info)
    assert read_document(tmp_path / "w.png").prompt == large
    for key, zipped in (("prompt", False), ("prompt", True), ("comment", False)):
        info = PngInfo()
        info.add_text(key, "x" * 70_000_000, zip=zipped)
        Image.new("RGB", (4, 4)).save(tmp_path / "w.png", pnginfo=info)
        tracemalloc.start()
        with pytest.raises(WorkflowError, match="too large"):
            read_document(tmp_path / "w.png")
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
        tracemalloc.stop()


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
