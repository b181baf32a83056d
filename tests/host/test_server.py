"""The server over HTTP and WebSocket: what the editor asks for, and what nobody else may."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import struct
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse, FormData, WSMsgType
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.server import Server, main

Client = TestClient[Any, Any]


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A pack's folder with a script, a help page and an example workflow."""
    files = {
        "web/js/a.js": "export {}",
        "web/docs/Add.md": "# Adds",
        "workflows/text_to_image.json": "{}",
        "workflows/text_to_image.jpg": "jpg",
        "secret.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pack" / name).write_text(text)
    return tmp_path / "pack"


@pytest.fixture
def server(registry: Registry, pack: Path, tmp_path: Path) -> Server:
    (tmp_path / "frontend" / "assets").mkdir(parents=True)
    (tmp_path / "frontend" / "index.html").write_text("<title>the editor</title>")
    (tmp_path / "frontend" / "assets" / "app-1234.js").write_text("app")
    return Server(registry, tmp_path / "frontend", pack)


@contextlib.asynccontextmanager
async def serving(server: Server, loopback: bool = True) -> AsyncIterator[Client]:
    async with TestClient(TestServer(server.app(loopback))) as client:
        yield client


async def post_json(client: Client, path: str, body: Any) -> Any:
    async with client.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        return json.loads(await response.text() or "null")


async def get_json(client: Client, path: str) -> Any:
    async with client.get(path) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def finished(client: Client, count: int = 1) -> list[dict[str, Any]]:
    """The ended jobs, as soon as there are `count`."""
    while True:
        jobs = (await get_json(client, "/api/jobs?status=completed,failed,cancelled&limit=64"))["jobs"]
        if len(jobs) >= count:
            return jobs
        await asyncio.sleep(0.02)


def test_what_the_editor_asks_for_at_its_start(server: Server) -> None:
    async def check() -> None:
        async with serving(server) as client:
            assert await get_json(client, "/api/users") == {"storage": "server", "migrated": True}
            assert await get_json(client, "/api/extensions") == ["/extensions/rectiflux/js/a.js"]
            assert await get_json(client, "/api/workflow_templates") == {"rectiflux": ["text_to_image"]}
            stats = await get_json(client, "/api/system_stats")
            assert isinstance(stats["system"]["argv"], list) and stats["devices"]
            info = await get_json(client, "/api/object_info")
            assert info["Add"]["display_name"] == "Add Numbers"
            assert info["Add"]["python_module"] == "custom_nodes.rectiflux"
            assert list(await get_json(client, "/api/object_info/Add")) == ["Add"]
            assert await get_json(client, "/object_info/Unknown") == {}
            assert (await get_json(client, "/api/features"))["supports_preview_metadata"] is True
            empty = ("i18n", "global_subgraphs", "node_replacements", "experiment/models", "embeddings")
            for path in empty:
                await get_json(client, f"/api/{path}")
            for path, text in (
                ("/extensions/rectiflux/js/a.js", "export {}"),
                ("/extensions/rectiflux/docs/Add.md", "# Adds"),
                ("/api/workflow_templates/rectiflux/text_to_image.json", "{}"),
                ("/api/workflow_templates/rectiflux/text_to_image.jpg", "jpg"),
                ("/assets/app-1234.js", "app"),
                ("/api/userdata/user.css", ""),
                ("/api/userdata/workflows%2F.index.json", "{}"),
                ("/user.css", ""),
            ):
                async with client.get(path) as response:
                    assert (response.status, await response.text()) == (200, text)
            for path in ("/api/workflow_templates/rectiflux/..%2Fsecret.json", "/extensions/rectiflux/../x"):
                async with client.get(path) as response:
                    assert response.status == 404

    asyncio.run(check())


def test_the_first_visit_opens_the_demo_and_later_ones_what_was_open(server: Server) -> None:
    async def check() -> None:
        async with serving(server) as client:

            async def visit() -> ClientResponse:
                return await client.get("/", allow_redirects=False)

            first = await visit()
            assert first.status == 302
            assert first.headers["Location"] == "/?template=text_to_image&source=rectiflux"
            assert (await visit()).status == 200
            await post_json(client, "/api/settings", {"Comfy.Workflow.Persist": False})
            assert (await visit()).status == 302, "the editor restores nothing"

    asyncio.run(check())


def test_a_prompt_runs_and_the_editor_hears_of_it(server: Server, prompts: Any) -> None:
    async def check() -> None:
        async with serving(server) as client:
            heard: list[dict[str, Any]] = []
            frames: list[bytes] = []
            async with client.ws_connect("/ws?clientId=me") as socket, client.ws_connect("/ws") as other:
                await socket.send_json({"type": "feature_flags", "data": {}})
                job_id = str(uuid.uuid4())
                body = {
                    "prompt": prompts.picture(),
                    "client_id": "me",
                    "prompt_id": job_id,
                    "extra_data": {"extra_pnginfo": {"workflow": {"id": "w"}}},
                }
                answer = await post_json(client, "/api/prompt", body)
                assert answer == {"prompt_id": job_id, "number": 1, "node_errors": {}}
                done = {"exec_info": {"queue_remaining": 0}}
                while not heard or not (heard[-1]["data"].get("status") == done and len(heard) > 5):
                    message = await socket.receive(60)
                    if message.type == WSMsgType.BINARY:
                        frames.append(message.data)
                    else:
                        heard.append(json.loads(message.data))
                assert (await other.receive_json())["type"] == "status"
            assert heard[0]["data"]["sid"] == "me"
            kinds = [message["type"] for message in heard]
            assert "feature_flags" in kinds and "progress" in kinds and "progress_state" in kinds
            assert kinds.index("execution_start") < kinds.index("executed") < kinds.index("execution_success")
            end = [message["data"]["node"] for message in heard if message["type"] == "executing"][-1]
            assert end is None
            check_frames(frames, job_id)
            (job,) = await finished(client)
            shown = job["preview_output"]
            assert (shown["filename"], shown["nodeId"], job["workflow_id"]) == ("sum_00001_.png", "5", "w")
            full = await get_json(client, f"/api/jobs/{job_id}")
            assert full["outputs"]["5"]["images"][0]["filename"] == "sum_00001_.png"
            assert full["workflow"]["extra_data"]["extra_pnginfo"]["workflow"] == {"id": "w"}
            history = await get_json(client, f"/api/history/{job_id}")
            assert history[job_id]["status"]["status_str"] == "success"
            async with client.get("/api/view?filename=sum_00001_.png&type=output") as response:
                assert response.content_type == "image/png"
                assert Image.open(io.BytesIO(await response.read())).size == (8, 4)

    asyncio.run(check())


def check_frames(frames: list[bytes], job_id: str) -> None:
    """One preview (type 4), and the notice (type 3) once during the run and once after it."""
    kinds = [struct.unpack(">I", frame[:4])[0] for frame in frames]
    assert sorted(kinds) == [3, 3, 4]
    preview = frames[kinds.index(4)]
    (length,) = struct.unpack(">I", preview[4:8])
    told = json.loads(preview[8 : 8 + length])
    assert told["node_id"] == told["display_node_id"] == "3" and told["prompt_id"] == job_id
    with Image.open(io.BytesIO(preview[8 + length :])) as image:
        assert (image.format, image.size) == ("JPEG", (32, 16))
    notice = frames[kinds.index(3)]
    assert notice[4:] == struct.pack(">I", 1) + b"3half way"


def test_a_wrong_prompt_is_refused_on_its_node(server: Server, prompts: Any) -> None:
    async def check() -> None:
        async with serving(server) as client:
            prompt = prompts.picture(value := 99)
            async with client.post("/api/prompt", json={"prompt": prompt}) as response:
                assert response.status == 400
                body = await response.json()
            assert body["error"]["type"] == "prompt_outputs_failed_validation"
            (error,) = body["node_errors"]["1"]["errors"]
            assert error["type"] == "value_bigger_than_max"
            assert error["extra_info"]["received_value"] == value
            assert await get_json(client, "/api/prompt") == {"exec_info": {"queue_remaining": 0}}
            for text, status in (("[]", 400), ("{", 400), ("{}", 400)):
                async with client.post("/api/prompt", data=text) as response:
                    assert response.status == status and (await response.json())["error"]
            body = {"prompt": prompts.picture(), "prompt_id": "../x"}
            async with client.post("/api/prompt", json=body) as response:
                assert response.status == 400

    asyncio.run(check())


def test_queue_history_and_cancelling(server: Server, prompts: Any) -> None:
    async def check() -> None:
        async with serving(server) as client:
            await post_json(client, "/api/prompt", {"prompt": prompts.picture(7)})
            (failed,) = await finished(client)
            assert failed["status"] == "failed"
            assert failed["execution_error"]["exception_message"].startswith("seven is refused")
            assert await post_json(client, f"/api/jobs/{failed['id']}/cancel", {}) == {"cancelled": False}
            assert await post_json(client, "/api/jobs/cancel", {"job_ids": ["x"]}) == {"cancelled": False}
            assert await post_json(client, "/api/interrupt", {}) is None
            await post_json(client, "/api/queue", {"clear": True})
            empty = {"queue_running": [], "queue_pending": []}
            assert await get_json(client, "/api/queue") == empty
            page = await get_json(client, "/api/jobs?offset=1&limit=5")
            assert page == {
                "jobs": [],
                "pagination": {"offset": 1, "limit": 5, "total": 1, "has_more": False},
            }
            await post_json(client, "/api/history", {"delete": [failed["id"]]})
            assert await get_json(client, "/api/history") == {}
            await post_json(client, "/api/free", {"unload_models": True})
            async with client.get("/api/jobs/unknown") as response:
                assert response.status == 404

    asyncio.run(check())


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ({"Host": "evil.example"}, "this editor answers on this machine only, not as evil.example"),
        ({"Host": "127.0.0.1.evil.example:80"}, "this editor answers on this machine only"),
        ({"Origin": "http://evil.example"}, "requests from http://evil.example are refused"),
        ({"Origin": "http://127.0.0.1:1"}, "requests from http://127.0.0.1:1 are refused"),
        ({"Origin": "null"}, "requests from null are refused"),
        ({"Sec-Fetch-Site": "cross-site"}, "requests from other sites are refused"),
    ],
)
def test_strangers_are_refused(server: Server, headers: dict[str, str], sentence: str) -> None:
    async def check() -> None:
        async with serving(server) as client:
            for path in ("/", "/api/object_info", "/ws", "/assets/app-1234.js"):
                async with client.get(path, headers=headers) as response:
                    assert response.status == 403 and (await response.text()).startswith(sentence)
            async with client.post("/api/prompt", headers=headers, json={}) as response:
                assert response.status == 403

    asyncio.run(check())


def test_the_editors_own_page_is_let_in(server: Server) -> None:
    async def check() -> None:
        async with serving(server) as client:
            port = client.port
            for host in (f"localhost:{port}", f"[::1]:{port}", f"127.0.0.2:{port}"):
                headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
                async with client.get("/api/users", headers=headers) as response:
                    assert response.status == 200

    asyncio.run(check())


def test_an_editor_for_the_whole_network_has_any_name(server: Server) -> None:
    async def check() -> None:
        async with serving(server, loopback=False) as client:
            async with client.get("/api/users", headers={"Host": "studio.local:8188"}) as response:
                assert response.status == 200
            strangers = {"Host": "studio.local:8188", "Origin": "http://evil.example"}
            async with client.get("/api/users", headers=strangers) as response:
                assert response.status == 403

    asyncio.run(check())


def test_the_page_may_talk_to_this_server_only(server: Server) -> None:
    async def check() -> None:
        async with serving(server) as client:
            for path in ("/?x", "/api/users", "/nothing", "/assets/app-1234.js"):
                async with client.get(path) as response:
                    policy = response.headers["Content-Security-Policy"]
                    assert "connect-src 'self' data:;" in policy and "default-src 'self';" in policy
                    assert response.headers["X-Content-Type-Options"] == "nosniff"
                    cached = "immutable" if path.startswith("/assets/") else "no-store"
                    assert cached in response.headers["Cache-Control"]

    asyncio.run(check())


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


def test_a_taken_port_and_wrong_options_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def occupied() -> tuple[int, asyncio.Server]:
        taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        return taken.sockets[0].getsockname()[1], taken

    with asyncio.Runner() as runner:
        port, taken = runner.run(occupied())
        code = main(["--no-browser", "--port", str(port), "--data", str(tmp_path / "data")])
        taken.close()
        runner.run(taken.wait_closed())
    assert code == 1
    sentence = f"port {port} is taken; close what runs there, or choose another with --port\n"
    assert capsys.readouterr().err == sentence
    none = str(tmp_path / "none")
    for arguments, says in (
        (["--port", "70000"], "argument --port: takes a number from 0 to 65535, got '70000'"),
        (["--port", "many"], "argument --port: takes a number from 0 to 65535, got 'many'"),
        (["--models", none], f"argument --models: there is no folder {none}"),
        (["--frob"], "unrecognized arguments: --frob"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 1
        assert capsys.readouterr().err == f"serve: {says} (see run.py serve --help)\n"
    (tmp_path / "file").touch()
    assert main(["--data", str(tmp_path / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err
