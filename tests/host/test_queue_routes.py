"""Prompts, queue, history and jobs over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from .client import Client


def test_an_invalid_prompt_is_refused_with_the_error_on_its_node(client: Client, prompts: Any) -> None:
    response = client.post("/api/prompt", {"prompt": prompts.image(99)})
    assert response.status == 400
    assert response.json["error"]["type"] == "prompt_outputs_failed_validation"
    (error,) = response.json["node_errors"]["1"]["errors"]
    assert error["type"] == "value_bigger_than_max" and error["extra_info"]["received_value"] == 99
    assert client.get_json("/api/prompt") == {"exec_info": {"queue_remaining": 0}}


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"prompt": 7}'])
def test_a_malformed_request_is_refused(client: Client, text: str) -> None:
    response = client.post("/api/prompt", data=text)
    assert response.status == 400 and response.json["error"]


@pytest.mark.parametrize("fields", [{"prompt_id": "../x"}, {"extra_data": "text"}, {"extra_data": [1]}])
def test_a_prompt_with_malformed_fields_is_refused(
    client: Client, prompts: Any, fields: dict[str, Any]
) -> None:
    assert client.post("/api/prompt", {"prompt": prompts.image(), **fields}).status == 400


def test_queue_history_and_cancelling(client: Client, prompts: Any) -> None:
    client.post_json("/api/prompt", {"prompt": prompts.image(7)})
    while not (jobs := client.get_json("/api/jobs?status=failed&limit=64")["jobs"]):
        client.sleep(0.02)
    (failed,) = jobs
    assert failed["status"] == "failed"
    assert failed["execution_error"]["exception_message"].startswith("seven is refused")
    assert client.post_json(f"/api/jobs/{failed['id']}/cancel", {}) == {"cancelled": False}
    assert client.post_json("/api/jobs/cancel", {"job_ids": ["x"]}) == {"cancelled": False}
    assert client.post_json("/api/interrupt", {}) is None
    assert client.post_json("/api/queue", {"clear": True}) is None
    assert client.get_json("/api/queue") == {"queue_running": [], "queue_pending": []}
    pagination = {"offset": 1, "limit": 5, "total": 1, "has_more": False}
    assert client.get_json("/api/jobs?offset=1&limit=5") == {"jobs": [], "pagination": pagination}
    assert list(client.get_json("/api/history?max_items=1")) == [failed["id"]]
    client.post_json("/api/history", {"delete": [failed["id"]]})
    assert client.get_json("/api/history") == {}
    client.post_json("/api/free", {"unload_models": True})
    assert client.get("/api/jobs/unknown").status == 404
