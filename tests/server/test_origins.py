"""Host and Origin: pages in a browser can't use the server unless its operator lets them; programs notice nothing."""

import socket
from typing import Any

import pytest
from api_calls import CHAT, chat_body, http, running
from fakes import FakeEngine, fake_app
from hostile.answers import exchange, problem_with

from sightline_server.routes.origins import Origins
from sightline_server.settings import Settings

OWN = socket.gethostname()


def status(name: str | None, /, *origins: str, version: str = "1.1", **settings: Any) -> int:
    """What a request gets whose Host is ``name``; None: that has none."""
    found = Origins.of(Settings(**settings)).refusal(
        [] if name is None else [name.encode("latin-1")], [origin.encode("latin-1") for origin in origins], version
    )
    return 200 if found is None else found.status


ALWAYS = ["localhost", "LOCALHOST:8000", "localhost.", "a.localhost:80", "127.0.0.1:8000", "[::1]:8000", "192.168.1.7"]
ALWAYS += ["10.0.0.1:65535", OWN, f"{OWN}.local:8000"]
PRIVATE = ["gpu-box", "sightline:8000", "gpu.local", "a.b.internal", "box.home.arpa:8000"]
FOREIGN = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "1.2.3.4.nip.io"]
FOREIGN += ["evillocalhost.example", "local.example", "xn--lcalhost-1za.example"]
BROKEN = [
    "",
    "a/?x=",
    "a#",
    "[",
    "]",
    "\xff",
    "a:b:c",
    "a:",
    "a:0",
    "a:65536",
    "a:-1",
    "a b",
    "a@localhost",
    "@localhost",
]
BROKEN += [
    "localhost,evil.example",
    "localhost:80:80",
    "::1",
    "[::1",
    "http://localhost",
    "localhost\\",
    "local_h%6fst",
]
BROKEN += ["a" * 300, "localhost?", "localhost\t", "[::1]x"]


@pytest.mark.parametrize("host", ALWAYS)
@pytest.mark.parametrize("bound", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])
def test_K5_names_that_lead_nowhere_else_are_served(host: str, bound: str) -> None:
    assert status(host, host=bound) == 200


@pytest.mark.parametrize("host", PRIVATE)
def test_K5_names_of_the_local_network_where_it_is_listened_to(host: str) -> None:
    assert status(host, host="0.0.0.0") == status(host, host="::") == 200
    assert status(host, host="127.0.0.1") == 403


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_K5_a_name_that_somebody_else_made_lead_here(host: str, bound: str) -> None:
    assert status(host, host=bound) == 403
    # A page's own address is no foreign origin to itself: the name alone must do.
    assert status(host, f"http://{host}", host=bound) == 403
    assert status(host, host=bound, allowed_hosts=("*",)) == 200


def test_K5_names_that_the_operator_lists() -> None:
    listed = {"allowed_hosts": ("api.example.com", "*.Example.org")}
    assert status("API.example.com:443", **listed) == 200
    assert status("a.b.example.org", **listed) == 200
    assert status("example.org", **listed) == 403
    assert status("badexample.org", **listed) == 403
    assert status("b.example.com", **listed) == 403
    assert status("box.example", host="box.example") == 200


@pytest.mark.parametrize("host", BROKEN)
def test_K3_a_host_that_is_none(host: str) -> None:
    assert status(host, allowed_hosts=("*",), host="0.0.0.0") == 400


def test_K3_hosts_that_are_missing_or_two() -> None:
    origins = Origins.of(Settings())
    for hosts, version, expected in [([], "1.1", 400), ([b"localhost"] * 2, "1.1", 400), ([], "1.0", None)]:
        found = origins.refusal(hosts, [], version)
        assert (found and found.status) == expected
    assert status(None, "http://evil.example", version="1.0") == 400


@pytest.mark.parametrize("host", ["a/?x=", "a#", "[", "", "\xff", "a:b:c"])
async def test_K3_nothing_believes_the_host_header(host: str) -> None:
    async with http(fake_app(api_key=("k",))) as client:
        for path in ("/health", "/v1/models", "/nope"):
            answer = await client.get(path, headers={"Host": host.encode("latin-1")})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_host")
            assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "line",
    [
        "GET http://localhost/v1/models HTTP/1.1",
        "GET http://evil.example/health HTTP/1.1",
        "GET https://localhost@evil.example/health HTTP/1.1",
        "GET //evil.example/health#/v1 HTTP/1.1",
        "GET localhost:80 HTTP/1.1",
        "GET * HTTP/1.1",
        "GET ?a HTTP/1.1",
    ],
)
def test_K3_targets_with_a_host_of_their_own(line: str) -> None:
    with running(fake_app(api_key=("k",))) as address:
        host, _, port = address.removeprefix("http://").rpartition(":")
        response = exchange((host, int(port)), f"{line}\r\nHost: localhost\r\n\r\n".encode())
    assert problem_with(response) is None
    assert response.status == 400


async def test_K3_forwarded_headers_change_nothing() -> None:
    forwarded = {
        "X-Forwarded-For": "127.0.0.1",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Prefix": "/health",
        "X-Real-Ip": "127.0.0.1",
        "X-Original-Url": "/health",
        "X-Rewrite-Url": "/health",
        "Forwarded": "for=127.0.0.1;host=evil.example",
    }
    with running(fake_app(api_key=("k",))) as address:
        host, _, port = address.removeprefix("http://").rpartition(":")
        lines = "".join(f"{name}: {value}\r\n" for name, value in forwarded.items())
        for path, expected in [("/v1/models", 401), ("/health", 200), ("/nope", 401)]:
            raw = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode()
            assert exchange((host, int(port)), raw).status == expected


ORIGINS = ["http://evil.example", "null", "https://localhost.evil.example", "http://localhost:81", "file://", "", "*"]
ORIGINS += [
    "http://127.0.0.1:8000",
    "chrome-extension://abc",
    "http://localhost/",
    "http://localhost:8000@evil.example",
]
ORIGINS += ["javascript://localhost:8000", "http://[::1]:8000", "http:localhost:8000", "\xff"]


@pytest.mark.parametrize("origin", ORIGINS)
async def test_K5_a_foreign_origin(origin: str) -> None:
    engine = FakeEngine()
    headers = {"Host": b"localhost:8000", "Origin": origin.encode("latin-1")}
    async with http(fake_app(engine)) as client:
        for answer in (
            await client.post(CHAT, json=chat_body(), headers=headers),
            await client.get("/v1/models", headers=headers),
            await client.options(CHAT, headers=headers | {"Access-Control-Request-Method": b"POST"}),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
            assert not [name for name in answer.headers if name.startswith("access-control")]
    assert engine.requests == []


def test_K5_origins_that_are_the_servers_own() -> None:
    assert status("localhost:8000", "http://localhost:8000") == 200
    assert status("127.0.0.1:8000", "http://127.0.0.1:8000") == 200
    assert status("[::1]:8000", "http://[::1]:8000") == 200
    # Behind a proxy that speaks TLS, and on the ports that browsers leave out.
    assert status("api.example.com", "https://api.example.com", allowed_hosts=("api.example.com",)) == 200
    assert status("localhost:80", "http://localhost") == status("localhost", "http://localhost:80") == 200
    assert status("localhost:8000", "http://localhost:8000", "http://localhost:8000") == 403


async def test_K5_origins_that_the_operator_lists() -> None:
    app = fake_app(cors_origins=("https://app.example",), api_key=("k",))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with http(app) as client:
        preflight = await client.options(CHAT, headers={"Origin": "https://app.example"} | asked)
        foreign = await client.options(CHAT, headers={"Origin": "https://other.example"} | asked)
        called = await client.post(
            CHAT, json=chat_body(), headers={"Origin": "https://app.example", "Authorization": "Bearer k"}
        )
    assert preflight.status_code == called.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert foreign.status_code == 403
    assert "access-control-allow-origin" not in foreign.headers


async def test_K5_no_answer_lets_every_origin_read_it() -> None:
    async with http(fake_app()) as client:
        for path in ("/health", "/ready", "/v1/models", "/metrics", "/nope"):
            answer = await client.get(path, headers={"Host": "localhost", "Origin": "http://localhost"})
            assert answer.status_code in (200, 404)
            assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_K5_what_to_do_is_in_the_sentence() -> None:
    async with http(fake_app()) as client:
        name = await client.get("/health", headers={"Host": "box.example"})
        origin = await client.get("/health", headers={"Origin": "http://box.example"})
    assert "add it to --allowed-hosts" in name.json()["error"]["message"]
    assert "add the origin to --cors-origins" in origin.json()["error"]["message"]
