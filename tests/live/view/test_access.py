"""Who may ask the viewer for anything: only the browser that was given this start's secret, and no other page in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from live.view.access import MAX_BODY_BYTES
from live.view.app import Material
from tests.live.view.material import COOKIE, HOST, SECRET, client, material, write_case

ADDRESSES = [
    "/",
    "/page/main.js",
    "/api/state",
    "/api/videos/0",
    "/api/videos/0/frames/0",
    "/api/videos/0/media",
    "/api/videos/0/rows/0",
    "/api/videos/0/labels",
    "/api/videos/0/history",
    "/api/export?format=csv",
    "/api/live",
    "/nothing",
]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("case"), count=30)


@pytest.fixture
def allowed(case: Path, tmp_path: Path) -> TestClient:
    return client(material(case, labels=tmp_path / "labels"))


@pytest.fixture
def stranger(case: Path, tmp_path: Path) -> TestClient:
    return client(material(case, labels=tmp_path / "labels"), secret=None)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "HEAD", "OPTIONS", "DELETE"])
def test_nothing_is_answered_without_the_secret(stranger: TestClient, address: str, method: str) -> None:
    for more in ({}, {"cookies": {COOKIE: "wrong"}}, {"params": {"key": "wrong"}}, {"cookies": {"other": SECRET}}):
        assert stranger.request(method, address, **more).status_code == 403


def test_the_key_opens_the_page_alone_and_gives_a_cookie_that_scripts_cannot_read(stranger: TestClient) -> None:
    assert stranger.get(f"/api/state?key={SECRET}").status_code == 403
    assert stranger.put(f"/?key={SECRET}").status_code == 403
    assert stranger.get(f"/?key={SECRET}&key={SECRET}").status_code == 403
    page = stranger.get(f"/?key={SECRET}")
    assert page.status_code == 200
    assert page.headers["set-cookie"] == f"{COOKIE}={SECRET}; HttpOnly; SameSite=Strict; Path=/"
    assert stranger.get("/api/state").status_code == 200  # the client has kept the cookie


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "", "0.0.0.0", "[::2]",
     "127.0.0.1@evil.example", "evil@127.0.0.1", "127.0.0.1/", "127.0.0.1:port", "127.0.0.1 ", "[", "\xe9"],
)  # fmt: skip
def test_other_host_names_are_refused_even_with_the_secret(allowed: TestClient, host: str) -> None:
    headers = {"host": host.encode("latin-1")}
    assert allowed.get("/api/state", headers=headers).status_code == 403
    assert allowed.get(f"/?key={SECRET}", headers=headers).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9000", "localhost:1", "LOCALHOST", "[::1]:80"])
def test_this_machines_names_are_accepted_at_any_port(allowed: TestClient, host: str) -> None:
    assert allowed.get("/api/state", headers={"host": host}).status_code == 200  # such as through an SSH tunnel


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},  # another port of this machine
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
    ],
)
def test_requests_of_other_pages_are_refused_even_with_the_cookie(allowed: TestClient, headers: dict[str, str]) -> None:
    assert allowed.get("/api/state", headers=headers).status_code == 403
    assert allowed.put("/api/videos/0/labels", headers=headers, json={}).status_code == 403
    own = {"sec-fetch-site": "same-origin", "origin": HOST}
    assert allowed.get("/api/state", headers=own).status_code == 200


def test_web_sockets_are_closed(allowed: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect) as closed, allowed.websocket_connect("/api/live"):
        pass
    assert closed.value.code == 1008


def test_pages_may_load_nothing_from_elsewhere_and_are_not_stored(allowed: TestClient) -> None:
    for address in ("/", "/api/state", "/nothing"):
        headers = allowed.get(address).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_the_page_names_no_address_outside_the_package() -> None:
    page = Path(__file__).resolve().parents[3] / "live/view/page"
    texts = {one.name: one.read_text() for one in page.iterdir()}
    for name, text in texts.items():
        kept = text.replace("http://www.w3.org/2000/svg", "")
        assert "//" not in "".join(part for part in kept.split() if "http" in part), name
        assert "eval(" not in text, name
        assert "innerHTML" not in text, name


def test_a_body_that_is_too_large_is_not_read(allowed: TestClient) -> None:
    answer = allowed.put("/api/videos/0/labels", content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413


NOTHING_OPEN = client(Material([]), secret=None)


@settings(max_examples=40)
@given(st.text(max_size=40), st.binary(max_size=40))
def test_no_key_and_no_cookie_but_the_secret_opens(value: str, raw: bytes) -> None:
    guard = NOTHING_OPEN
    query = guard.get("/", params={"key": value})
    assert query.status_code == (200 if value == SECRET else 403)
    header = guard.get(
        "/api/state", headers={"cookie": raw.replace(b"\n", b"").replace(b"\r", b"").replace(b"\0", b"")}
    )
    assert header.status_code == (200 if raw == f"{COOKIE}={SECRET}".encode() else 403)
