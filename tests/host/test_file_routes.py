"""The server's files over HTTP: images, uploads, saved workflows, settings."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData
from PIL import Image
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.server import Server

from .client import Client


def png(size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


def upload(client: Client, data: bytes, name: str = "a.png", path: str = "image", **fields: str) -> Any:
    """(status, JSON) of an upload."""
    form = FormData(quote_fields=False)
    form.add_field("image", data, filename=name, content_type="image/png")
    for key, value in fields.items():
        form.add_field(key, value)
    response = client.post(f"/api/upload/{path}", data=form)
    return response.status, response.json


def test_uploads_replace_no_other_image(client: Client, folders: Folders) -> None:
    first = {"name": "a.png", "subfolder": "", "type": "input"}
    assert upload(client, png()) == (200, first)
    assert upload(client, png()) == (200, first), "the same image is the same file"
    other = png((2, 2))
    assert upload(client, other)[1]["name"] == "a (1).png"
    assert upload(client, other, overwrite="true")[1]["name"] == "a.png"
    assert (folders.input / "a.png").read_bytes() == other
    assert upload(client, other, subfolder="clips")[1]["subfolder"] == "clips"
    info = client.get_json("/api/object_info/LoadImage")
    assert info["LoadImage"]["input"]["required"]["image"][0] == ["a (1).png", "a.png"]
    listed = client.get_json("/internal/files/input")
    assert sorted(listed) == ["a (1).png [input]", "a.png [input]"]


def test_hostile_uploads_are_refused(client: Client, folders: Folders) -> None:
    for data, options in (
        (b"<script>", {}),
        (png(), {"name": "a.html"}),
        (png(), {"subfolder": "../user"}),
        (png(), {"type": "user"}),
    ):
        status, answer = upload(client, data, **options)
        assert status == 400 and answer["error"]
    assert client.get("/internal/files/user").status == 400
    assert upload(client, png(), "../../up.png")[1]["name"] == "up.png"
    files = [path for path in folders.input.rglob("*") if path.is_file()]
    assert files == [folders.input / "up.png"] and not list(folders.user.iterdir())


def test_the_size_of_a_request_is_limited(registry: Registry, folders: Folders, tmp_path: Path) -> None:
    with Client(Server(registry, tmp_path, upload_limit=1000)) as client:
        form = FormData()
        form.add_field("image", bytes(5000), filename="a.png")
        assert client.post("/api/upload/image", data=form).status == 413
        assert client.post("/api/userdata/a.json", data=bytes(5000)).status == 413
    assert not list(folders.input.iterdir()) and not list(folders.user.iterdir())


def test_a_mask_becomes_the_alpha_channel_of_its_image(client: Client, folders: Folders) -> None:
    upload(client, png())
    mask = Image.new("RGBA", (6, 4), (0, 0, 0, 255))
    mask.putpixel((1, 2), (0, 0, 0, 0))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    reference = json.dumps({"filename": "a.png", "subfolder": "", "type": "input"})
    fields = {"original_ref": reference, "type": "input", "subfolder": "clipspace"}
    answer = upload(client, buffer.getvalue(), "mask.png", "mask", **fields)
    assert answer == (200, {"name": "mask.png", "subfolder": "clipspace", "type": "input"})
    with Image.open(folders.input / "clipspace" / "mask.png") as image:
        assert image.getpixel((1, 2)) == (255, 0, 0, 0) and image.getpixel((0, 0)) == (255, 0, 0, 255)
    assert upload(client, png((2, 2)), "mask.png", "mask", **fields)[0] == 400, "another size"

    def view(options: str) -> Image.Image:
        response = client.get(f"/api/view?filename=mask.png&subfolder=clipspace&type=input&{options}")
        assert response.status == 200
        return Image.open(io.BytesIO(response.body))

    assert view("channel=rgb").mode == "RGB"
    assert view("channel=a").getpixel((1, 2)) == (0, 0, 0, 0)
    assert view("preview=webp;80").format == "WEBP" and view("preview=jpeg;80").format == "JPEG"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("filename=../user/comfy.settings.json&type=input", 400),
        ("filename=secret&subfolder=../user&type=input", 400),
        ("filename=secret&type=user", 400),
        ("filename=missing.png", 404),
        ("filename=..%2F..%2Fetc%2Fpasswd%20[input]", 400),
        ("", 400),
    ],
)
def test_view_serves_only_the_hosts_folders(
    client: Client, folders: Folders, query: str, status: int
) -> None:
    (folders.user / "secret").write_text("secret")
    assert client.get(f"/api/view?{query}").status == status


def test_files_other_than_images_are_never_served_as_a_page(client: Client, folders: Folders) -> None:
    (folders.output / "a.svg").write_text("<svg onload=alert(1) />")
    assert client.post("/api/userdata/page.html", data=b"<script>").status == 200
    svg = client.get("/api/view?filename=a.svg")
    assert svg.headers["Content-Disposition"] == "attachment"
    for response in (svg, client.get("/api/userdata/page.html")):
        assert response.headers["Content-Type"] == "application/octet-stream"


def test_saved_workflows(client: Client) -> None:
    listing = "/api/userdata?dir=workflows&recurse=true&split=false&full_info=true"
    assert client.get_json(listing) == []
    path = "/api/userdata/workflows%2Fmy%20fox.json"
    for overwrite, status in (("false", 200), ("false", 409), ("true", 200)):
        saved = client.post(f"{path}?full_info=true&overwrite={overwrite}", data=b'{"a":1}')
        assert saved.status == status
    (entry,) = client.get_json(listing)
    assert entry["path"] == "my fox.json" and entry["size"] == 7 and entry["modified"] > 10**12
    assert client.get_json(path) == {"a": 1}
    assert client.post("/api/userdata/workflows%2F.index.json", data=b"{}").status == 200
    assert client.get_json(listing) == [entry], "the editor's own index is not a workflow"
    moved = client.post(f"{path}/move/workflows%2Fb%2Fc.json?overwrite=false")
    assert (moved.status, moved.json) == (200, "workflows/b/c.json")
    target = "/api/userdata/workflows%2Fb%2Fc.json"
    assert client.get_json(target) == {"a": 1}
    assert [client.request("DELETE", target).status for _ in range(2)] == [204, 404]


def test_user_files_stay_in_their_folder(client: Client) -> None:
    for name in ("..%2Finput%2Fa.json", "..%2F..%2Fa.json", "%2Ftmp%2Fa.json"):
        assert client.post(f"/api/userdata/{name}", data=b"x").status == 400
        assert client.post("/api/userdata/x.json", data=b"x").status == 200
        assert client.post(f"/api/userdata/x.json/move/{name}").status == 400
    assert client.get("/api/userdata?dir=..").status == 400


def test_settings_are_kept_and_a_damaged_file_is_renamed(client: Client, folders: Folders) -> None:
    defaults = client.get_json("/api/settings")
    assert defaults["Comfy.Notification.ShowVersionUpdates"] is False
    client.post_json("/api/settings", {"a": 1, "Comfy.Minimap.Visible": True})
    client.post_json("/api/settings/b.c", "ü")
    assert client.get_json("/api/settings/b.c") == "ü"
    saved = {"a": 1, "Comfy.Minimap.Visible": True, "b.c": "ü"}
    assert client.get_json("/api/settings") == defaults | saved
    assert client.post("/api/settings", [1]).status == 400
    (folders.user / "comfy.settings.json").write_text('{"a": 1')
    assert client.get_json("/api/settings") == defaults
    assert (folders.user / "comfy.settings.damaged").read_text() == '{"a": 1'


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[" + b"[]," * 300_000 + b"[]]", b"[1]", b"\xff", b'{"a": 1e999']
)
def test_settings_of_any_content_leave_the_editor_usable(
    content: bytes, client: Client, folders: Folders
) -> None:
    assert client.request("POST", "/api/userdata/comfy.settings.json", data=content).status == 200
    assert client.get("/").status in (200, 302)
    defaults = client.get_json("/api/settings")
    client.post_json("/api/settings", {"a": 1})
    assert client.get_json("/api/settings") == defaults | {"a": 1}
    assert (folders.user / "comfy.settings.damaged").read_bytes() == content


def test_no_content_of_the_settings_breaks_the_page(client: Client, folders: Folders) -> None:
    damaged = (b"[" * 100_000, b"\xff\xfe", b"[]", b"", b"9" * 5000, b'{"a": "\\ud83e"')
    for content in damaged:
        assert client.post("/userdata/comfy.settings.json", data=content).status == 200
        assert client.get("/?x").status == client.get("/settings").status == 200
    for _ in range(2):  # a folder in the file's place, also where a damaged file is put aside
        client.post("/userdata/comfy.settings.json%2Fa", data=b"x")
        client.post("/userdata/comfy.settings.damaged%2Fa", data=b"x")
        assert client.get("/", allow_redirects=False).status in (200, 302)
        assert client.get("/settings").status == 200
        assert client.post("/settings", {"a": 1}).status < 500


def test_names_that_cannot_be_used_are_refused_in_a_sentence(client: Client) -> None:
    client.post("/userdata/folder%2Fa.json", data=b"{}")
    client.post("/userdata/b.json", data=b"{}")
    for method, path, status in (
        ("POST", f"/userdata/{'n' * 300}.json", 400),
        ("POST", f"/userdata/{'n/' * 3000}", 400),
        ("POST", "/userdata/folder", 400),
        ("POST", "/userdata/b.json%2Fc", 400),
        ("POST", "/userdata/a%00b", 400),
        ("POST", "/userdata/..%2F..%2Fx", 400),
        ("GET", f"/userdata/{'n' * 300}.json", 400),
        ("GET", "/userdata/folder", 404),
        ("DELETE", "/userdata/folder", 404),
        ("POST", "/userdata/b.json/move/folder?overwrite=true", 400),
        ("POST", f"/userdata/b.json/move/{'n' * 300}", 400),
        ("POST", "/userdata/b.json/move/b.json%2Fc", 400),
        ("POST", "/userdata/b.json/move/folder", 409),
    ):
        response = client.request(method, path, data=b"{}" if method == "POST" else None)
        assert response.status == status, (method, path, response.status, response.text)
        assert 3 <= len(response.text.split()) and len(response.text) < 700 and "\n" not in response.text
