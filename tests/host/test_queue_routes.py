"""Prompts, queue, history and jobs over HTTP."""

from __future__ import annotations

import time
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


def ended(client: Client, count: int) -> list[str]:
    """The ids in the history, oldest first, once there are so many."""
    deadline = time.monotonic() + 60
    while len(ids := list(client.get_json("/api/history"))) < count:
        assert time.monotonic() < deadline
        client.sleep(0.02)
    return ids


MALFORMED: list[tuple[str, Any]] = [
    *[("prompt", value) for value in (None, 7, "x", [], {}, {"1": None}, {"1": {"class_type": []}})],
    *[
        ("extra_data", value)
        for value in (["x"], "x", 1, True, {"extra_pnginfo": "x"}, {"preview_method": []})
    ],
    ("extra_data", {"extra_pnginfo": {"workflow": ["x"]}}),
    *[("client_id", value) for value in (7, ["x"], {})],
    *[("prompt_id", value) for value in ("../x", 7, ["x"], "{1E0D0B6E-9F0A-4A3B-8C5D-2F6A7B8C9D0E}", "")],
    *[("number", value) for value in ("1", [], True)],
    *[("front", value) for value in ("yes", 1, [])],
    *[("partial_execution_targets", value) for value in (5, "5", [5], [["5"]], {"5": 1})],
]


def test_malformed_fields_are_refused_and_the_next_prompt_runs(client: Client, prompts: Any) -> None:
    """Comfy-Org/ComfyUI#16312 and #11513: one such prompt stopped the queue."""
    for name, value in MALFORMED:
        response = client.post("/api/prompt", {"prompt": prompts.image(), name: value})
        assert response.status == 400, (name, value)
        error = response.json["error"]
        sentence = error["message"] if isinstance(error, dict) else error
        assert len(sentence.split()) > 3 and "\n" not in sentence
        for path in ("/queue", "/history", "/jobs"):
            client.get_json(path)
    job = client.post_json("/api/prompt", {"prompt": prompts.image()})["prompt_id"]
    assert ended(client, 1) == [job]
    assert client.get_json(f"/history/{job}")[job]["status"]["status_str"] == "success"


def test_fields_of_other_requests_are_checked(client: Client) -> None:
    for path, name in (("/queue", "delete"), ("/history", "delete"), ("/jobs/cancel", "job_ids")):
        for value in (5, "x", {"a": 1}, [5], [None], [["x"]]):
            response = client.post(path, {name: value})
            assert response.status == 400 and response.json["error"].startswith(f"{name} must be a list")
    for path, body in (
        ("/queue", {"clear": "yes"}),
        ("/history", {"clear": 1}),
        ("/interrupt", {"prompt_id": 5}),
        ("/free", {"unload_models": "yes"}),
        ("/queue", []),
        ("/free", 7),
    ):
        response = client.post(path, body)
        assert response.status == 400 and " must be " in response.json["error"]
    for query in (
        "offset=x",
        "offset=1.5",
        "limit=" + "9" * 5000,
        "status=done",
        "limit=٣",
        "limit=0",
        "sort_by=x",
        "sort_order=x",
    ):
        response = client.get(f"/api/jobs?{query}")
        assert response.status == 400 and response.json["error"].startswith(
            f"{query.partition('=')[0]} must be "
        )
        assert len(response.json["error"]) < 400


def test_the_history_can_be_read_in_parts(client: Client) -> None:
    """As ComfyUI 0.33 answers these queries; SillyTavern/SillyTavern#5790."""
    show = {"class_type": "PreviewAny", "inputs": {"source": ""}}
    sent = []
    for number in range(151):
        show["inputs"]["source"] = f"text {number}"
        sent.append(client.post_json("/prompt", {"prompt": {"1": show}})["prompt_id"])
    assert ended(client, 151) == sent
    entry = client.get_json(f"/history/{sent[0]}")[sent[0]]
    assert (
        entry["outputs"]["1"]["text"] == ["text 0"]
        and entry["prompt"][2]["1"]["inputs"]["source"] == "text 0"
    )
    for query, expected in (
        ("offset=3", sent[3:]),
        ("offset=99999", []),
        ("max_items=-1", []),
        ("max_items=0", []),
        ("max_items=5", sent[-5:]),
        ("max_items=5&offset=3", sent[3:8]),
        ("max_items=999", sent),
        ("offset=-1", sent),
        ("max_items=5&offset=-1", sent[-5:]),
    ):
        assert list(client.get_json(f"/history?{query}")) == expected, query
    assert client.get("/history?offset=x").status == client.get("/history?max_items=1e3").status == 400
    assert client.get_json("/history/unknown") == {}
    found = client.get_json("/jobs?status=completed&sort_by=created_at&sort_order=asc&limit=2&offset=1")
    assert [job["id"] for job in found["jobs"]] == sent[1:3] and found["pagination"]["total"] == 151
    assert len(client.get_json("/jobs")["jobs"]) == 151
    client.post_json("/history", {"delete": [sent[0], "unknown"]})
    assert ended(client, 150) == sent[1:]


def test_secrets_are_not_kept(client: Client, prompts: Any) -> None:
    extra = {"api_key_comfy_org": "secret", "auth_token_comfy_org": "secret", "other": 1}
    client.post_json("/prompt", {"prompt": prompts.image(), "extra_data": extra})
    (job,) = ended(client, 1)
    assert client.get_json(f"/history/{job}")[job]["prompt"][3] == {"other": 1}


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
