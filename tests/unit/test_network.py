from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import attrs
import httpx
import pytest

from flowmesh_core.artifacts.network import (
    NetworkPolicy,
    build_async_client,
    build_client,
    client_hooks,
    mask_url,
)
from flowmesh_core.config import load_settings
from flowmesh_core.errors import ArtifactError

METADATA_SERVICE = "http://169.254.169.254/latest/meta-data/"


@attrs.define
class Site:
    """A real server; `routes` maps a path to the status and headers of its answer."""

    url: str
    routes: dict[str, tuple[int, dict[str, str]]] = attrs.field(factory=dict)
    seen: list[tuple[str, str, dict[str, str]]] = attrs.field(factory=list)

    def headers_at(self, path: str) -> dict[str, str]:
        return next(headers for _, seen, headers in self.seen if seen == path)


@pytest.fixture
def new_site() -> Iterator[Callable[[], Site]]:
    servers: list[ThreadingHTTPServer] = []

    def start() -> Site:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                site.seen.append((self.command, self.path, headers))
                status, extra = site.routes.get(self.path, (200, {}))
                self.send_response(status)
                for name, value in {"Content-Length": "0", **extra}.items():
                    self.send_header(name, value)
                self.end_headers()

            do_POST = do_GET  # noqa: N815 - the library's name

            def log_message(self, *_args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        site = Site(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return site

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "url",
    [
        METADATA_SERVICE,
        "http://169.254.0.1:8080/",
        "http://[fe80::1]/",
        "http://[fe80::1%25eth0]/",
        "http://[fd00:ec2::254]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[2002:a9fe:a9fe::1]/",
        "http://100.100.100.200/",
        "http://0xa9fea9fe/",
        "http://2852039166/",
        "http://[::169.254.169.254]/",
        "http://[::ffff:0:169.254.169.254]/",
        "http://[64:ff9b:1::a9fe:a9fe]/",
        "http://[2001:0:a9fe:a9fe::]/",
        "http://168.63.129.16/",
    ],
)
def test_metadata_and_link_local_addresses_are_refused_in_every_spelling(url: str) -> None:
    with pytest.raises(ArtifactError, match="link-local or metadata"):
        NetworkPolicy().check(url)


@pytest.mark.parametrize("address", ["169.254.169.254", "fe80::1%eth0", "::ffff:169.254.169.254"])
def test_a_peer_at_a_forbidden_address_is_refused_whatever_led_there(address: str) -> None:
    url = "https://u:p@files.invalid/x?sig=s3cret"
    with pytest.raises(ArtifactError, match=f"sig=.* leads to {re.escape(address)}, a link-local"):
        NetworkPolicy().check_peer(address, url)
    NetworkPolicy().check_peer("127.0.0.1", url)


@pytest.mark.parametrize("address", ["files.invalid", "", "/run/socket", "127.0.0.1:80"])
def test_a_peer_without_an_address_is_refused(address: str) -> None:
    with pytest.raises(ArtifactError, match=f"http://h/ leads to '{address}', no IP address"):
        NetworkPolicy().check_peer(address, "http://h/")


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8000/x", "http://10.1.2.3/", "https://[::1]/", "http://192.168.0.7"],
)
def test_loopback_and_private_addresses_are_allowed_because_orchestrators_live_there(
    url: str,
) -> None:
    NetworkPolicy().check(url)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/x", "gopher://host", "http://", "//host/x", "x"]
)
def test_only_http_and_https_are_opened(url: str) -> None:
    with pytest.raises(ArtifactError, match="must be an http:// or https:// URL"):
        NetworkPolicy().check(url)


@pytest.mark.parametrize("url", ["http://host:port/", "http://[::1/", "http://host:99999/"])
def test_text_that_is_no_url_is_refused_in_one_way(url: str) -> None:
    with pytest.raises(ArtifactError, match="is no URL"):
        NetworkPolicy().check(url)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("files.invalid", True),
        ("a.b.files.invalid", True),
        ("FILES.invalid", True),
        ("evilfiles.invalid", False),
        ("files.invalid.evil.invalid", False),
        ("127.0.0.2", False),
    ],
)
def test_allow_list_takes_names_and_subdomains(host: str, allowed: bool) -> None:
    policy = NetworkPolicy(allow=("127.0.0.1", "*.files.invalid", "Files.invalid"))
    if allowed:
        policy.check(f"http://{host}/x")
    else:
        with pytest.raises(ArtifactError, match="add it to FLOWMESH_HTTP_ALLOW"):
            policy.check(f"http://{host}/x")


def test_subdomain_pattern_does_not_allow_the_domain_itself() -> None:
    with pytest.raises(ArtifactError, match=r"host files\.invalid is not among those"):
        NetworkPolicy(allow=("*.files.invalid",)).check("http://files.invalid/")


def test_orchestrator_is_allowed_without_being_listed_but_only_at_its_port() -> None:
    policy = NetworkPolicy(allow=("files.invalid",), orchestrator_url="http://127.0.0.1:8000")
    policy.check("http://127.0.0.1:8000/api")
    with pytest.raises(ArtifactError, match="not among those"):
        policy.check("http://127.0.0.1:8001/api")


def test_policy_comes_from_the_operators_variables() -> None:
    policy = NetworkPolicy.from_settings(
        load_settings(
            {
                "FLOWMESH_HTTP_ALLOW": "a.invalid, *.b.invalid",
                "ORCHESTRATOR_BASE_URL": "http://127.0.0.1:8000/",
                "ORCHESTRATOR_TOKEN": "s3cret",
            }
        )
    )
    assert policy.allow == ("a.invalid", "*.b.invalid")
    assert policy.headers_for("http://127.0.0.1:8000/x") == {"Authorization": "Bearer s3cret"}
    assert "s3cret" not in repr(policy)


@pytest.mark.parametrize(
    ("url", "gets_token"),
    [
        ("https://orch.invalid/api/v1/results", True),
        ("https://orch.invalid:443/x", True),
        ("https://ORCH.invalid/x", True),
        ("http://orch.invalid/x", False),
        ("https://orch.invalid:8443/x", False),
        ("https://orch.invalid.evil.invalid/x", False),
        ("https://orch.invalid@evil.invalid/x", False),
        ("https://evil.invalid/?next=https://orch.invalid/", False),
    ],
)
def test_token_goes_to_the_orchestrators_own_origin_alone(url: str, gets_token: bool) -> None:
    policy = NetworkPolicy(orchestrator_url="https://orch.invalid", token="s3cret")
    headers = policy.headers_for(url, {"X-Mine": "1"})
    assert ("Authorization" in headers) is gets_token
    assert headers["X-Mine"] == "1"


def test_authorization_of_the_document_is_kept() -> None:
    policy = NetworkPolicy(orchestrator_url="https://orch.invalid", token="s3cret")
    given = {"authorization": "Basic eA=="}
    assert policy.headers_for("https://orch.invalid/x", given) == given


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h.invalid/a?X-Sig=abc&n=1", "https://***@h.invalid/a?X-Sig=***&n=***"),
        ("https://h.invalid:8443/a/b.tar?token", "https://h.invalid:8443/a/b.tar?***"),
        ("https://h.invalid/a#access_token=x", "https://h.invalid/a#***"),
        ("https://h.invalid/a", "https://h.invalid/a"),
        ("http://[::1/secret", "***"),
    ],
)
def test_masked_url_shows_neither_user_nor_values(url: str, shown: str) -> None:
    assert mask_url(url) == shown
    assert NetworkPolicy().mask_url(url) == shown


def test_redirect_to_the_metadata_service_is_refused_before_it_is_opened(
    new_site: Callable[[], Site],
) -> None:
    site = new_site()
    site.routes["/start"] = (302, {"Location": "/second"})
    site.routes["/second"] = (302, {"Location": METADATA_SERVICE})
    with (
        build_client(NetworkPolicy()) as client,
        pytest.raises(ArtifactError, match=r"169\.254\.169\.254, a link-local"),
    ):
        client.get(f"{site.url}/start")
    assert [path for _, path, _ in site.seen] == ["/start", "/second"]


def test_redirect_to_a_host_that_is_not_allowed_is_refused(new_site: Callable[[], Site]) -> None:
    site = new_site()
    site.routes["/start"] = (302, {"Location": "http://127.0.0.2:1/"})
    with (
        build_client(NetworkPolicy(allow=("127.0.0.1",))) as client,
        pytest.raises(ArtifactError, match=r"host 127\.0\.0\.2 is not among those"),
    ):
        client.get(f"{site.url}/start")


def test_redirect_to_another_origin_carries_no_secret_header(new_site: Callable[[], Site]) -> None:
    first, other = new_site(), new_site()
    first.routes["/here"] = (307, {"Location": "/still-here"})
    first.routes["/still-here"] = (307, {"Location": f"{other.url}/there"})
    headers = {"Authorization": "Bearer x", "X-Api-Key": "k", "Cookie": "c=1", "Range": "bytes=0-"}
    with build_client(NetworkPolicy()) as client:
        assert client.get(f"{first.url}/here", headers=headers).status_code == 200
    kept = first.headers_at("/still-here")
    assert kept["authorization"] == "Bearer x"
    assert kept["x-api-key"] == "k"
    arrived = other.headers_at("/there")
    assert not {"authorization", "x-api-key", "cookie"} & set(arrived)
    assert arrived["range"] == "bytes=0-"


def test_redirect_back_to_the_first_origin_does_not_get_its_secrets_again(
    new_site: Callable[[], Site],
) -> None:
    first, other = new_site(), new_site()
    first.routes["/here"] = (307, {"Location": f"{other.url}/there"})
    other.routes["/there"] = (307, {"Location": f"{first.url}/back"})
    with build_client(NetworkPolicy()) as client:
        client.get(f"{first.url}/here", headers={"X-Api-Key": "k"})
    assert "x-api-key" not in first.headers_at("/back")


def test_upload_that_a_redirect_would_lose_is_an_error(new_site: Callable[[], Site]) -> None:
    site = new_site()
    site.routes["/up"] = (302, {"Location": "/other"})
    with (
        build_client(NetworkPolicy()) as client,
        pytest.raises(ArtifactError, match=r"POST was redirected to .*/other as GET"),
    ):
        client.post(f"{site.url}/up", content=b"weights")


def test_upload_follows_a_redirect_that_keeps_it(new_site: Callable[[], Site]) -> None:
    site = new_site()
    site.routes["/up"] = (307, {"Location": "/other"})
    with build_client(NetworkPolicy()) as client:
        client.post(f"{site.url}/up", content=b"weights")
    assert [(method, path) for method, path, _ in site.seen] == [
        ("POST", "/up"),
        ("POST", "/other"),
    ]


def test_coroutines_get_the_same_protection(new_site: Callable[[], Site]) -> None:
    site = new_site()
    site.routes["/start"] = (302, {"Location": METADATA_SERVICE})

    async def scenario() -> int:
        async with build_async_client(NetworkPolicy()) as client:
            with pytest.raises(ArtifactError, match="link-local"):
                await client.get(f"{site.url}/start")
            return (await client.get(f"{site.url}/fine")).status_code

    assert asyncio.run(scenario()) == 200


# Clients of libraries.


def test_a_librarys_client_keeps_the_policy_and_follows_no_redirect(
    new_site: Callable[[], Site],
) -> None:
    site = new_site()
    site.routes["/start"] = (302, {"Location": METADATA_SERVICE})
    with httpx.Client(**client_hooks(NetworkPolicy(allow=("127.0.0.1",)))) as client:
        assert client.get(f"{site.url}/start").status_code == 302
        assert client.get(f"{site.url}/fine").status_code == 200
        with pytest.raises(ArtifactError, match=r"host 127\.0\.0\.2 is not among those"):
            client.get("http://127.0.0.2:1/")
        with pytest.raises(ArtifactError, match=r"host 169\.254\.169\.254 is not among those"):
            client.get(f"{site.url}/start", follow_redirects=True)


def test_a_librarys_client_for_coroutines_keeps_it_too(new_site: Callable[[], Site]) -> None:
    site = new_site()
    site.routes["/start"] = (302, {"Location": METADATA_SERVICE})

    async def scenario() -> None:
        hooks = client_hooks(NetworkPolicy(allow=("127.0.0.1",)), asynchronous=True)
        async with httpx.AsyncClient(**hooks) as client:
            assert (await client.get(f"{site.url}/start")).status_code == 302
            with pytest.raises(ArtifactError, match="is not among those"):
                await client.get(f"{site.url}/start", follow_redirects=True)
            with pytest.raises(ArtifactError, match="is not among those"):
                await client.get(METADATA_SERVICE)

    asyncio.run(scenario())


class Strict(NetworkPolicy):
    """Refuses the loopback network too, but only of whom it has really reached."""

    def check(self, url: str) -> None:
        assert url.startswith("http://127.0.0.1:")

    def check_peer(self, address: str, url: str) -> None:
        if address == "127.0.0.1":
            raise ArtifactError(f"{url} leads to this machine")


def test_whom_a_connection_reached_is_checked_before_anything_is_sent(
    new_site: Callable[[], Site],
) -> None:
    site = new_site()
    policy = Strict()

    async def scenario() -> None:
        hooks = client_hooks(policy, asynchronous=True)
        async with httpx.AsyncClient(**hooks) as other, build_async_client(policy) as own:
            for client in (other, own):
                with pytest.raises(ArtifactError, match="leads to this machine"):
                    await client.get(site.url)

    with httpx.Client(**client_hooks(policy)) as other, build_client(policy) as own:
        for client in (other, own):
            with pytest.raises(ArtifactError, match="leads to this machine"):
                client.get(site.url)
    asyncio.run(scenario())
    assert site.seen == []


def test_a_policy_that_refuses_more_refuses_names_as_well() -> None:
    class Narrow(NetworkPolicy):
        def check_peer(self, address: str, url: str) -> None:
            raise ArtifactError(f"not {address}")

    with pytest.raises(ArtifactError, match=r"not 127\.0\.0\.1"):
        Narrow().check("http://127.0.0.1/")


def test_one_task_is_not_let_in_with_the_cookie_of_another(new_site: Callable[[], Site]) -> None:
    site = new_site()
    site.routes["/login"] = (200, {"Set-Cookie": "session=s3cret; Path=/"})

    async def scenario() -> None:
        async with build_async_client(NetworkPolicy()) as client:
            await client.get(f"{site.url}/login", headers={"Cookie": "own=1"})
            await client.get(f"{site.url}/next")

    asyncio.run(scenario())
    assert site.headers_at("/login")["cookie"] == "own=1"
    assert "cookie" not in site.headers_at("/next")


def test_whole_urls_never_reach_the_log(
    new_site: Callable[[], Site], caplog: pytest.LogCaptureFixture
) -> None:
    site = new_site()
    with caplog.at_level(logging.INFO), build_client(NetworkPolicy()) as client:
        client.get(f"{site.url}/x?signature=s3cret")
    with caplog.at_level(logging.INFO), httpx.Client(**client_hooks(NetworkPolicy())) as client:
        client.get(f"{site.url}/x?signature=s3cret")
    assert "s3cret" not in caplog.text


def test_importing_the_network_rules_loads_no_http_library() -> None:
    code = (
        "import sys, flowmesh_core.artifacts.fetch, flowmesh_core.inputs;"
        "sys.exit('httpx' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
