"""Seeded malformed requests: none is answered with 5xx, hangs, or stops the queue."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from typing import Any

import pytest
from rectiflux.host.files import Folders

from ..fuzzing import fuzz_inputs, fuzz_seed
from .client import Client
from .request_fuzzer import PNG, Input, RequestFuzzer

COUNT, SEED = fuzz_inputs(400), fuzz_seed()
PATIENCE = 5.0  # seconds for a response


async def ask(port: int, request: Input) -> bytes:
    """The head of the response to bytes on a new connection; empty when it is closed without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.data)
        if not request.complete:
            writer.write_eof()
        answer = await asyncio.wait_for(reader.read(4096), PATIENCE)
        while answer and b"\r\n\r\n" not in answer and len(answer) < 2**16:
            if not (more := await asyncio.wait_for(reader.read(4096), PATIENCE)):
                break
            answer += more
        return answer
    except ConnectionError:
        return b""
    finally:
        writer.close()


def fault(request: Input, answer: bytes) -> str | None:
    """What is wrong with a response, None when it is right."""
    if not answer:
        return "no response" if request.complete else None
    found = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
    if found is None:
        return f"not HTTP: {answer[:80]!r}"
    status = int(found[1])
    if status >= 500:
        return f"status {status}"
    head = answer.partition(b"\r\n\r\n")[0].lower()
    missing = [
        name
        for name in ("content-security-policy", "x-content-type-options", "cache-control")
        if status >= 200 and f"\r\n{name}: ".encode() not in head
    ]
    return f"status {status} without {', '.join(missing)}" if missing else None


async def campaign(port: int, fuzzer: RequestFuzzer) -> tuple[Counter[str], list[str]]:
    """(number of responses by first digit, the faults)"""
    seen: Counter[str] = Counter()
    faults = []
    for number in range(COUNT):
        request, start = fuzzer.input(), time.monotonic()
        try:
            answer = await ask(port, request)
            wrong = fault(request, answer)
        except asyncio.TimeoutError:
            answer, wrong = b"", f"no response within {PATIENCE} s" if request.complete else None
        seen[answer[9:10].decode() or "closed"] += 1
        if wrong is None and time.monotonic() - start > PATIENCE:
            wrong = f"took {time.monotonic() - start:.1f} s"
        if wrong is not None:
            faults.append(f"input {number}: {wrong}: {request.data[:300]!r} -> {answer[:300]!r}")
    return seen, faults


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files of broken uploads
def test_malformed_requests_are_refused_and_the_queue_goes_on(
    client: Client, folders: Folders, prompts: Any
) -> None:
    routes = sorted(
        {
            (route.method, resource.canonical)
            for resource in client.app.router.resources()
            for route in resource
            if route.method != "*"
        }
    )
    for name in ("image.png", "é.png"):
        (folders.input / name).write_bytes(PNG)
    seen, faults = client.runner.run(campaign(client.http.port, RequestFuzzer(routes, SEED)))
    assert faults == [], "\n".join(faults[:20])
    assert seen["2"] and seen["4"], seen
    client.post_json("/api/queue", {"clear": True})
    job = client.post_json("/api/prompt", {"prompt": prompts.image()})["prompt_id"]
    deadline = time.monotonic() + 60
    while not (entry := client.get_json(f"/api/history/{job}")):
        assert time.monotonic() < deadline
        client.sleep(0.02)
    assert entry[job]["status"]["status_str"] == "success"
