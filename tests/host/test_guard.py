"""Requests from other sites are refused, and pages may talk to this server only."""

from __future__ import annotations

import socket

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


LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


def test_a_link_on_another_site_opens_the_editor(client: Client) -> None:
    """Comfy-Org/ComfyUI#13450 and #15557: a link changes nothing."""
    assert client.get("/", headers=LINK, allow_redirects=False).status == 302
    for site in ("cross-site", "same-site"):
        for path in ("/?template=text_to_image&source=rectiflux", "/api/users"):
            assert client.get(path, headers=LINK | {"Sec-Fetch-Site": site}).status == 200
    assert client.get("/", headers=LINK, allow_redirects=False).status == 200, "the tabs are restored"


REFUSED = [
    ("POST", "/api/prompt", {}),
    ("POST", "/api/prompt", {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "empty"}),
    ("DELETE", "/api/userdata/a", {}),
    ("GET", "/", {"Sec-Fetch-Dest": "iframe"}),
    ("GET", "/", {"Sec-Fetch-Dest": "object"}),
    ("GET", "/view?filename=a.png", {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}),
    ("GET", "/api/history", {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}),
    ("GET", "/ws", {"Sec-Fetch-Mode": "websocket", "Sec-Fetch-Dest": "empty"}),
    ("GET", "/", {"Host": "evil.example", "Sec-Fetch-Site": "none"}),
    ("GET", "/ws", {"Origin": "http://evil.example", "Sec-Fetch-Site": "none"}),
]


def test_another_site_can_neither_change_nor_read_anything(client: Client) -> None:
    for site in ("cross-site", "same-site", "unknown"):
        for method, path, headers in REFUSED:
            response = client.request(method, path, headers=LINK | {"Sec-Fetch-Site": site} | headers)
            assert response.status == 403 and response.text, (site, method, path, headers)


def test_an_editor_for_the_network_is_known_by_its_names_and_addresses(server: Server) -> None:
    """A foreign name with its own Origin is what DNS rebinding sends."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    with Client(server, loopback=False, allowed_hosts=["Proxy.example"]) as client:
        accepted = ("proxy.example", "PROXY.example:80", "10.0.0.5:8188", "[fe80::1]:8188", "localhost", name)
        for host in (*accepted, f"{short}.local:8188", f"{name}."):
            headers = {"Host": host, "Origin": f"http://{host}"}
            assert client.get("/api/users", headers=headers).status == 200, host
            headers["Origin"] = "http://evil.example"
            assert client.get("/api/users", headers=headers).status == 403
        for host in (
            "evil.example",
            f"{short}.evil.example",
            "proxy.example.evil.example",
            "10.0.0.5.evil.example",
        ):
            response = client.get("/api/users", headers={"Host": host, "Origin": f"http://{host}"})
            assert response.status == 403 and f"--allow-host {host}" in response.text


def test_an_editor_for_this_machine_may_have_a_proxys_name(server: Server) -> None:
    with Client(server, allowed_hosts=["proxy.example"]) as client:
        assert client.get("/api/users", headers={"Host": "proxy.example"}).status == 200
        for host in ("other.example", "10.0.0.5", socket.gethostname()):
            assert client.get("/api/users", headers={"Host": host}).status == 403


HOSTS = ("[", "[::1", "]", "a b", "a@127.0.0.1", "127.0.0.1:99999", "127.0.0.1:x", "127.0.0.1/x", "", "\xff")


@pytest.mark.parametrize("loopback", [True, False])
def test_malformed_hosts_and_origins_are_refused_in_a_sentence(server: Server, loopback: bool) -> None:
    start = "GET /api/users HTTP/1.1\r\nConnection: close\r\n"
    with Client(server, loopback) as client:
        for host in HOSTS:
            answer = client.raw(f"{start}Host: {host}\r\n\r\n".encode("latin-1"))
            assert answer.startswith(b"HTTP/1.1 400 ") and b"Host header must be a host name" in answer, host
        for origin in ("http://[", "http://[::1", "\xff\xfe", "//", "null"):
            answer = client.raw(f"{start}Host: 127.0.0.1\r\nOrigin: {origin}\r\n\r\n".encode("latin-1"))
            assert answer.startswith(b"HTTP/1.1 403 "), origin
            assert b" are refused; the editor is at 127.0.0.1" in answer


HEAD = "HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"


RESPONSES = [
    (f"GET /?x {HEAD}", 200),
    (f"GET /api/users {HEAD}", 200),
    (f"GET /assets/app-1234.js {HEAD}", 200),
    (f"GET /jobs/missing {HEAD}", 404),
    (f"GET /view?filename=missing.png {HEAD}", 404),
    (f"GET /assets/missing.js {HEAD}", 404),
    (f"GET /extensions/rectiflux/js/missing.js {HEAD}", 404),
    (f"GET /missing.html {HEAD}", 404),
    (f"GET /assets/app-1234.js/inner {HEAD}", 404),
    (f"GET /assets/{'n' * 300}.js {HEAD}", 404),
    (f"GET /assets/a%00b.js {HEAD}", 404),
    (f"GET /assets/%2e%2e/%2e%2e/pack/secret.json {HEAD}", 404),
    (f"GET /%2e%2e/pack/secret.json {HEAD}", 404),
    (f"GET /..%5cpack%5csecret.json {HEAD}", 404),
    (f"GET //etc/passwd {HEAD}", 404),
    (f"GET /extensions/rectiflux/../secret.json {HEAD}", 404),
    (f"GET /extensions/rectiflux/js/a.js {HEAD}", 200),
    (f"GET /assets {HEAD}", 404),
    (f"PUT /api/prompt {HEAD}", 405),
    (f"POST /api/prompt {HEAD}Content-Length: 1\r\n", 400),
    (f"POST /api/prompt {HEAD}Content-Length: 999999999999\r\n", 413),
    (f"POST /api/prompt {HEAD}Content-Length: 1\r\nContent-Encoding: rot13\r\n", 415),
    (f"POST /api/prompt {HEAD}Content-Length: 1\r\nContent-Encoding: gzip\r\n", 400),
    (f"POST /api/prompt {HEAD}Content-Length: 1\r\nContent-Type: a/b; charset=none\r\n", 415),
    (f"GET /?x {HEAD}If-Unmodified-Since: Thu, 01 Jan 9999999999 00:00:00 GMT\r\n", 400),
    (f"GET / {HEAD}Expect: something\r\n", 417),
    (f"GET /ws {HEAD}Sec-WebSocket-Version: 13\r\n", 400),
    (f"GET / {HEAD}Origin: http://evil.example\r\n", 403),
    (f"GET / {HEAD}X: {'y' * 9000}\r\n", 400),
    ("GET / HTTP/9\r\n", 400),
    ("\x16\x03\x01 TLS\r\n", 400),
]


def test_every_response_has_security_headers_and_every_refusal_a_sentence(client: Client) -> None:
    for request_head, status in RESPONSES:
        body = "{" if "Content-Length" in request_head else ""
        answer = client.raw(f"{request_head}\r\n{body}".encode("latin-1"))
        head, _, text = answer.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        assert first.split()[1] == str(status), answer
        policy = headers["Content-Security-Policy"]
        assert "connect-src 'self' data:;" in policy and "default-src 'self';" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        is_asset = status == 200 and "/assets/" in request_head
        assert ("immutable" if is_asset else "no-store") in headers["Cache-Control"]
        assert status < 400 or (len(text.split()) >= 3 and len(text) < 600 and b"\n" not in text)


def test_a_missing_asset_is_not_cached(client: Client) -> None:
    response = client.get("/assets/missing.js")
    assert response.status == 404 and response.headers["Cache-Control"] == "no-store"


def test_a_failing_handler_is_answered_with_the_headers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> dict[str, object]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(server.registry, "object_info", fail)
    with Client(server) as client:
        response = client.get("/api/object_info")
    assert response.status == 500 and response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.text == "the server failed; its log says more"
