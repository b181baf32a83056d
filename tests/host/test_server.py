"""The server over HTTP and WebSocket: what the editor asks for, and what nobody else may."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import uuid
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse, WSMsgType
from PIL import Image
from rectiflux.host.server import Server, main

from .client import Client, get_json, post_json, serving


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
                ("/extensions/rectiflux/docs/Add/en.md", "# Adds"),
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
            for wrong in ({"prompt_id": "../x"}, {"extra_data": "text"}, {"extra_data": [1]}):
                body = {"prompt": prompts.picture(), **wrong}
                async with client.post("/api/prompt", json=body) as response:
                    assert response.status == 400

    asyncio.run(check())


def test_the_console_tells_what_went_wrong(
    capsys: pytest.CaptureFixture[str], server: Server, prompts: Any
) -> None:
    async def check() -> None:
        async with serving(server) as client, client.ws_connect("/ws") as socket:
            assert (await socket.receive_json())["type"] == "status"
            async with client.patch("/internal/logs/subscribe", json={"enabled": True}) as response:
                assert response.status == 200
            async with client.post("/api/prompt", json={"prompt": {"1": prompts.number(11)}}) as response:
                assert response.status == 400
            told = await socket.receive_json(timeout=60)
            kept = (await get_json(client, "/internal/logs/raw"))["entries"]
            assert told["type"] == "logs" and told["data"]["entries"] == kept[-1:]
            assert kept[-1]["m"].startswith("the workflow was refused: ")

    asyncio.run(check())
    assert "the workflow was refused: " in capsys.readouterr().err


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
