"""A disk that fills up under the running editor: each save fails in one sentence, and the editor goes on."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import tempfile
import time
from typing import Any

import pytest
from aiohttp import FormData
from PIL import Image
from rectiflux.host import files
from rectiflux.host.files import Folders

from .client import Client, Response


def full(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def upload(client: Client, route: str = "image", extra: bytes = b"", **fields: str) -> Response:
    """An uploaded image, with bytes behind it."""
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(buffer, "PNG")
    form = FormData(fields)
    form.add_field(
        "image", io.BytesIO(buffer.getvalue() + extra), filename="new.png", content_type="image/png"
    )
    return client.post(f"/api/upload/{route}", data=form)


def ended(client: Client, prompts: Any) -> dict[str, Any]:
    """The history's entry of a workflow that saves an image."""
    job = client.post_json("/api/prompt", {"prompt": prompts.image()})["prompt_id"]
    deadline = time.monotonic() + 60
    while not (entry := client.get_json(f"/api/history/{job}")):
        assert time.monotonic() < deadline
        client.sleep(0.02)
    return entry[job]


def test_every_way_to_save(
    client: Client, folders: Folders, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(folders.input / "old.png")
    client.get("/api/settings")
    assert client.post("/api/userdata/old.json", data=b"1").status == 200
    before = {path for path in folders.input.parent.rglob("*") if path.is_file()}
    monkeypatch.setattr(files.os, "fsync", full)
    reference = json.dumps({"filename": "old.png", "type": "input"})
    for response in (
        upload(client),
        upload(client, "mask", original_ref=reference),
        client.post("/api/userdata/new.json", data=b"{}"),
        client.post("/api/userdata/old.json?overwrite=true", data=b"2"),
        client.post("/api/settings", {"a": 1}),
        client.post("/api/settings/a", 1),
    ):
        sentence = response.json["error"]
        assert response.status == 507 and "the disk is full" in sentence and "\n" not in sentence
    status = ended(client, prompts)["status"]
    (error,) = (data for kind, data in status["messages"] if kind == "execution_error")
    assert error["exception_message"].startswith("the disk is full, sum.png was not saved to ")
    assert "\n" not in error["exception_message"].strip() and error["node_type"] == "SaveImage"
    after = {path for path in folders.input.parent.rglob("*") if path.is_file()}
    assert {path for path in after - before if path.suffix != ".lock"} == set()
    monkeypatch.undo()
    assert client.get_json("/api/userdata/old.json") == 1
    assert ended(client, prompts)["status"]["status_str"] == "success"
    assert upload(client).status == 200 and client.post("/api/settings/a", 1).status == 200


def test_no_space_for_an_uploads_temporary_file(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp keeps the file of a form in the system's temporary folder until it is complete."""
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    response = upload(client, extra=bytes(8 * 2**20))  # small ones stay in memory
    assert response.status == 507 and "the disk is full" in response.json["error"]
    monkeypatch.undo()
    assert upload(client).status == 200
    gc.collect()  # a file that is still open here would be a warning
