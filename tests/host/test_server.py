"""The editor's page and its WebSocket: a prompt from submission to the image."""

from __future__ import annotations

import io
import json
import struct
import uuid
from typing import Any

from aiohttp import WSMsgType
from PIL import Image

from .client import Client, Response, Socket

JOB = str(uuid.uuid4())


def test_the_first_visit_opens_the_demo_and_later_ones_the_last_tabs(client: Client) -> None:
    def visit() -> Response:
        return client.get("/", allow_redirects=False)

    first = visit()
    assert first.status == 302
    assert first.headers["Location"] == "/?template=text_to_image&source=rectiflux"
    assert visit().status == 200
    client.post_json("/api/settings", {"Comfy.Workflow.Persist": False})
    assert visit().status == 302, "the editor restores nothing"


def receive_until_done(socket: Socket) -> tuple[list[dict[str, Any]], list[bytes]]:
    """(JSON messages, binary frames) until the queue is empty again."""
    messages: list[dict[str, Any]] = []
    frames: list[bytes] = []
    done = {"exec_info": {"queue_remaining": 0}}
    while len(messages) < 6 or messages[-1]["data"].get("status") != done:
        message = socket.receive()
        if message.type == WSMsgType.BINARY:
            frames.append(message.data)
        else:
            messages.append(json.loads(message.data))
    return messages, frames


def test_a_prompt_runs_and_its_editor_receives_the_events(client: Client, prompts: Any) -> None:
    with client.connect("/ws?clientId=me") as socket, client.connect("/ws") as other:
        socket.send_json({"type": "feature_flags", "data": {}})
        extra = {"extra_pnginfo": {"workflow": {"id": "w"}}}
        body = {"prompt": prompts.image(), "client_id": "me", "prompt_id": JOB, "extra_data": extra}
        answer = client.post_json("/api/prompt", body)
        assert answer == {"prompt_id": JOB, "number": 1, "node_errors": {}}
        messages, frames = receive_until_done(socket)
        assert other.receive_json()["type"] == "status"
    assert messages[0]["data"]["sid"] == "me"
    kinds = [message["type"] for message in messages]
    assert {"feature_flags", "progress", "progress_state"} <= set(kinds)
    assert kinds.index("execution_start") < kinds.index("executed") < kinds.index("execution_success")
    assert [m["data"]["node"] for m in messages if m["type"] == "executing"][-1] is None
    check_frames(frames)
    check_job(client)


def check_frames(frames: list[bytes]) -> None:
    """One preview (type 4), and the notice (type 3) once during the run and once after it."""
    kinds = [struct.unpack(">I", frame[:4])[0] for frame in frames]
    assert sorted(kinds) == [3, 3, 4]
    preview = frames[kinds.index(4)]
    (length,) = struct.unpack(">I", preview[4:8])
    metadata = json.loads(preview[8 : 8 + length])
    assert metadata["node_id"] == metadata["display_node_id"] == "3" and metadata["prompt_id"] == JOB
    with Image.open(io.BytesIO(preview[8 + length :])) as image:
        assert (image.format, image.size) == ("JPEG", (32, 16))
    assert frames[kinds.index(3)][4:] == struct.pack(">I", 1) + b"3half way"


def check_job(client: Client) -> None:
    """The job in the lists, and its image."""
    (job,) = client.get_json("/api/jobs?status=completed,failed,cancelled&limit=64")["jobs"]
    shown = job["preview_output"]
    assert (shown["filename"], shown["nodeId"], job["workflow_id"]) == ("sum_00001_.png", "5", "w")
    full = client.get_json(f"/api/jobs/{JOB}")
    assert full["outputs"]["5"]["images"][0]["filename"] == "sum_00001_.png"
    assert full["workflow"]["extra_data"]["extra_pnginfo"]["workflow"] == {"id": "w"}
    assert client.get_json(f"/api/history/{JOB}")[JOB]["status"]["status_str"] == "success"
    image = client.get("/api/view?filename=sum_00001_.png&type=output")
    assert image.headers["Content-Type"] == "image/png"
    assert Image.open(io.BytesIO(image.body)).size == (8, 4)
