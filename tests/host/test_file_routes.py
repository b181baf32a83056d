"""The server's files over HTTP: pictures, uploads, saved workflows, settings."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest
from aiohttp import FormData
from PIL import Image
from rectiflux.host.files import Folders
from rectiflux.host.server import Server

from .client import Client, get_json, post_json, serving


def picture(size: tuple[int, int] = (6, 4), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG", **options)
    return buffer.getvalue()


async def upload(client: Client, data: bytes, name: str = "a.png", path: str = "image", **fields: str) -> Any:
    form = FormData(quote_fields=False)
    form.add_field("image", data, filename=name, content_type="image/png")
    for key, value in fields.items():
        form.add_field(key, value)
    async with client.post(f"/api/upload/{path}", data=form) as response:
        return response.status, await response.json()


def test_uploading(server: Server, folders: Folders) -> None:
    async def check() -> None:
        async with serving(server) as client:
            first = {"name": "a.png", "subfolder": "", "type": "input"}
            assert await upload(client, picture()) == (200, first)
            assert await upload(client, picture()) == (200, first), "the same picture is the same file"
            other = picture((2, 2))
            assert (await upload(client, other))[1]["name"] == "a (1).png"
            assert (await upload(client, other, overwrite="true"))[1]["name"] == "a.png"
            assert (folders.input / "a.png").read_bytes() == other
            assert (await upload(client, other, subfolder="clips"))[1]["subfolder"] == "clips"
            info = await get_json(client, "/api/object_info/LoadImage")
            assert info["LoadImage"]["input"]["required"]["image"][0] == ["a (1).png", "a.png"]
            assert sorted(await get_json(client, "/internal/files/input")) == [
                "a (1).png [input]",
                "a.png [input]",
            ]
            async with client.get("/internal/files/user") as response:
                assert response.status == 400
            status, told = await upload(client, b"<script>", "a.png")
            assert status == 400 and told["error"].startswith("a.png is no readable picture")
            assert (await upload(client, picture(), "a.html"))[0] == 400
            assert (await upload(client, picture(), subfolder="../user"))[0] == 400
            assert (await upload(client, picture(), type="user"))[0] == 400
            assert (await upload(client, picture(), "../../up.png"))[1]["name"] == "up.png"
        found = sorted(path.name for path in folders.input.rglob("*") if path.is_file())
        assert found == ["a (1).png", "a.png", "a.png", "up.png"] and not list(folders.user.iterdir())

    asyncio.run(check())


def test_an_upload_is_bounded(server: Server, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rectiflux.host.server.UPLOAD_LIMIT", 1000)

    async def check() -> None:
        async with serving(server) as client:
            form = FormData()
            form.add_field("image", bytes(5000), filename="a.png")
            async with client.post("/api/upload/image", data=form) as response:
                assert response.status == 413
            async with client.post("/api/userdata/a.json", data=bytes(5000)) as response:
                assert response.status == 413
        assert not list(folders.input.iterdir()) and not list(folders.user.iterdir())

    asyncio.run(check())


def test_a_mask_becomes_the_alpha_of_the_picture(server: Server, folders: Folders) -> None:
    async def check() -> None:
        async with serving(server) as client:
            await upload(client, picture())
            mask = Image.new("RGBA", (6, 4), (0, 0, 0, 255))
            mask.putpixel((1, 2), (0, 0, 0, 0))
            buffer = io.BytesIO()
            mask.save(buffer, "PNG")
            reference = json.dumps({"filename": "a.png", "subfolder": "", "type": "input"})
            fields = {"original_ref": reference, "type": "input", "subfolder": "clipspace"}
            told = await upload(client, buffer.getvalue(), "mask.png", "mask", **fields)
            assert told == (200, {"name": "mask.png", "subfolder": "clipspace", "type": "input"})
            with Image.open(folders.input / "clipspace" / "mask.png") as image:
                assert image.getpixel((1, 2)) == (255, 0, 0, 0) and image.getpixel((0, 0)) == (255, 0, 0, 255)
            wrong = await upload(client, picture((2, 2)), "mask.png", "mask", **fields)
            assert wrong[0] == 400 and wrong[1]["error"].startswith("the mask must have the picture's size")

            async def view(more: str) -> Image.Image:
                named = "filename=mask.png&subfolder=clipspace&type=input"
                async with client.get(f"/api/view?{named}&{more}") as response:
                    assert response.status == 200
                    return Image.open(io.BytesIO(await response.read()))

            assert (await view("channel=rgb")).mode == "RGB"
            assert (await view("channel=a")).getpixel((1, 2)) == (0, 0, 0, 0)
            assert (await view("preview=webp;80")).format == "WEBP"
            assert (await view("preview=jpeg;80")).format == "JPEG"

    asyncio.run(check())


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
def test_viewing_stays_in_its_folders(server: Server, folders: Folders, query: str, status: int) -> None:
    (folders.user / "secret").write_text("secret")

    async def check() -> None:
        async with serving(server) as client, client.get(f"/api/view?{query}") as response:
            assert response.status == status

    asyncio.run(check())


def test_what_is_no_picture_is_never_shown_as_a_page(server: Server, folders: Folders) -> None:
    (folders.output / "a.svg").write_text("<svg onload=alert(1) />")

    async def check() -> None:
        async with serving(server) as client, client.get("/api/view?filename=a.svg") as response:
            assert response.content_type == "application/octet-stream"
            assert response.headers["Content-Disposition"] == "attachment"

    asyncio.run(check())


def test_saved_workflows(server: Server, folders: Folders) -> None:
    async def check() -> None:
        async with serving(server) as client:
            listing = "/api/userdata?dir=workflows&recurse=true&split=false&full_info=true"
            assert await get_json(client, listing) == []
            path = "/api/userdata/workflows%2Fmy%20fox.json"
            for query, status in (
                ("overwrite=false", 200),
                ("overwrite=false", 409),
                ("overwrite=true", 200),
            ):
                async with client.post(f"{path}?full_info=true&{query}", data=b'{"a":1}') as response:
                    assert response.status == status
            (entry,) = await get_json(client, listing)
            assert entry["path"] == "my fox.json" and entry["size"] == 7 and entry["modified"] > 10**12
            assert await get_json(client, path) == {"a": 1}
            async with client.post("/api/userdata/workflows%2F.index.json", data=b"{}") as response:
                assert response.status == 200
            assert await get_json(client, listing) == [entry], "the editor's own file is no workflow"
            moved = "/api/userdata/workflows%2Fb%2Fc.json"
            async with client.post(f"{path}/move/workflows%2Fb%2Fc.json?overwrite=false") as response:
                assert (response.status, await response.json()) == (200, "workflows/b/c.json")
            assert await get_json(client, moved) == {"a": 1}
            async with client.delete(moved) as response:
                assert response.status == 204
            async with client.delete(moved) as response:
                assert response.status == 404
            for name in ("..%2Finput%2Fa.json", "..%2F..%2Fa.json", "%2Ftmp%2Fa.json"):
                async with client.post(f"/api/userdata/{name}", data=b"x") as response:
                    assert response.status == 400
                async with client.post(f"/api/userdata/x.json/move/{name}", data=b"x") as response:
                    assert response.status in (400, 404)
            async with client.get("/api/userdata?dir=..") as response:
                assert response.status == 400
            async with client.post("/api/userdata/page.html", data=b"<script>") as response:
                assert response.status == 200
            async with client.get("/api/userdata/page.html") as response:
                assert response.content_type == "application/octet-stream"

    asyncio.run(check())


def test_settings_survive_and_a_damaged_file_is_put_aside(server: Server, folders: Folders) -> None:
    async def check() -> None:
        async with serving(server) as client:
            defaults = await get_json(client, "/api/settings")
            assert defaults["Comfy.Notification.ShowVersionUpdates"] is False
            await post_json(client, "/api/settings", {"a": 1, "Comfy.Minimap.Visible": True})
            await post_json(client, "/api/settings/b.c", "ü")
            assert await get_json(client, "/api/settings/b.c") == "ü"
            saved = {"a": 1, "Comfy.Minimap.Visible": True, "b.c": "ü"}
            assert await get_json(client, "/api/settings") == defaults | saved
            async with client.post("/api/settings", json=[1]) as response:
                assert response.status == 400
            (folders.user / "comfy.settings.json").write_text('{"a": 1')
            assert await get_json(client, "/api/settings") == defaults
            assert (folders.user / "comfy.settings.damaged").read_text() == '{"a": 1'

    asyncio.run(check())
