"""What the editor requests at its start: node definitions, templates, scripts, system, log."""

from __future__ import annotations

from typing import Any

import pytest

from .client import Client


def test_node_definitions_and_the_system(client: Client) -> None:
    info = client.get_json("/api/object_info")
    assert info["Add"]["display_name"] == "Add Numbers"
    assert info["Add"]["python_module"] == "custom_nodes.rectiflux"
    assert list(client.get_json("/api/object_info/Add")) == ["Add"]
    assert client.get_json("/object_info/Unknown") == {}
    stats = client.get_json("/api/system_stats")
    assert isinstance(stats["system"]["argv"], list) and stats["devices"]
    assert client.get_json("/api/users") == {"storage": "server", "migrated": True}
    assert client.get_json("/api/features")["supports_preview_metadata"] is True
    for path in ("i18n", "global_subgraphs", "node_replacements", "experiment/models", "embeddings"):
        client.get_json(f"/api/{path}")


def test_files_of_the_pack_and_of_the_frontend(client: Client) -> None:
    assert client.get_json("/api/extensions") == ["/extensions/rectiflux/js/a.js"]
    assert client.get_json("/api/workflow_templates") == {"rectiflux": ["text_to_image"]}
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
        response = client.get(path)
        assert (response.status, response.text) == (200, text)
    for path in ("/api/workflow_templates/rectiflux/..%2Fsecret.json", "/extensions/rectiflux/../x"):
        assert client.get(path).status == 404


def test_the_console_shows_errors(capsys: pytest.CaptureFixture[str], client: Client, prompts: Any) -> None:
    with client.connect("/ws") as socket:
        assert socket.receive_json()["type"] == "status"
        path = "/internal/logs/subscribe"
        assert client.request("PATCH", path, json={"enabled": True}).status == 200
        assert client.post("/api/prompt", {"prompt": {"1": prompts.number(11)}}).status == 400
        message = socket.receive_json()
    kept = client.get_json("/internal/logs/raw")["entries"]
    assert message["type"] == "logs" and message["data"]["entries"] == kept[-1:]
    assert kept[-1]["m"].startswith("the workflow was refused: ")
    assert "the workflow was refused: " in capsys.readouterr().err
