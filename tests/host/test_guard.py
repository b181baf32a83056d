"""Requests from other sites are refused, and pages may talk to this server only."""

from __future__ import annotations

import pytest
from rectiflux.host.server import Server

from .client import Client


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ({"Host": "evil.example"}, "this editor is available on this machine only, not as evil.example"),
        ({"Host": "127.0.0.1.evil.example:80"}, "this editor is available on this machine only"),
        ({"Origin": "http://evil.example"}, "requests from http://evil.example are refused"),
        ({"Origin": "http://127.0.0.1:1"}, "requests from http://127.0.0.1:1 are refused"),
        ({"Origin": "null"}, "requests from null are refused"),
        ({"Sec-Fetch-Site": "cross-site"}, "requests from other sites are refused"),
    ],
)
def test_other_sites_are_refused(client: Client, headers: dict[str, str], sentence: str) -> None:
    for path in ("/", "/api/object_info", "/ws", "/assets/app-1234.js"):
        response = client.get(path, headers=headers)
        assert response.status == 403 and response.text.startswith(sentence)
    assert client.post("/api/prompt", {}, headers=headers).status == 403


def test_the_editors_own_page_is_accepted(client: Client) -> None:
    port = client.http.port
    for host in (f"localhost:{port}", f"[::1]:{port}", f"127.0.0.2:{port}"):
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert client.get("/api/users", headers=headers).status == 200


def test_an_editor_for_the_network_accepts_any_host_name_but_no_other_origin(server: Server) -> None:
    with Client(server, loopback=False) as client:
        host = {"Host": "studio.local:8188"}
        assert client.get("/api/users", headers=host).status == 200
        assert client.get("/api/users", headers=host | {"Origin": "http://evil.example"}).status == 403


def test_every_response_has_security_headers(client: Client) -> None:
    for path in ("/?x", "/api/users", "/missing", "/assets/app-1234.js"):
        headers = client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "connect-src 'self' data:;" in policy and "default-src 'self';" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        cached = "immutable" if path.startswith("/assets/") else "no-store"
        assert cached in headers["Cache-Control"]
