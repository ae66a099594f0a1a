"""Clients that go nowhere but where a policy lets them, against a server that is really there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from endpoint import Refusal, ScriptedEndpoint
from flowmesh_agent.network import build_http_client

from flowmesh_core import ArtifactError, NetworkPolicy

pytest.importorskip("httpx2", reason="needs the engine")

HERE = NetworkPolicy(allow=("127.0.0.1",))


def post(policy: NetworkPolicy, *urls: str, **options: Any) -> list[Any]:
    async def send() -> list[Any]:
        client = build_http_client(policy, timeout_s=5, trust_env=False, **options)
        async with client:
            return [await client.post(url, json={"model": "m"}) for url in urls]

    return asyncio.run(send())


def test_a_request_to_an_allowed_host_arrives_with_the_headers() -> None:
    with ScriptedEndpoint("hello") as endpoint:
        (response,) = post(HERE, endpoint.url, headers={"X-Team": "red"})
    assert response.status_code == 200
    assert endpoint.requests[0].headers["x-team"] == "red"


def test_a_host_that_is_not_allowed_sees_nothing() -> None:
    refused = pytest.raises(ArtifactError, match=r"host 127\.0\.0\.1 is not among those")
    with ScriptedEndpoint("hello") as endpoint, refused:
        post(NetworkPolicy(allow=("models.example",)), endpoint.url)
    assert endpoint.requests == []


def test_the_cloud_s_metadata_is_out_of_reach() -> None:
    with pytest.raises(ArtifactError, match="link-local or metadata"):
        post(NetworkPolicy(), "http://169.254.169.254/latest/meta-data")


def test_an_address_is_checked_again_once_it_has_been_reached() -> None:
    class Moved(NetworkPolicy):
        def check(self, url: str) -> None:
            """Let all pass, as a name does that leads elsewhere a moment later."""

        def check_peer(self, address: str, url: str) -> None:
            raise ArtifactError(f"reached {address}")

    refused = pytest.raises(ArtifactError, match=r"reached 127\.0\.0\.1")
    with ScriptedEndpoint("hello") as endpoint, refused:
        post(Moved(), endpoint.url)
    assert endpoint.requests == []


def test_a_redirect_is_not_followed() -> None:
    with ScriptedEndpoint("stolen") as other:
        moved = Refusal(307, headers={"Location": other.url})
        with ScriptedEndpoint(moved) as endpoint:
            (response,) = post(HERE, endpoint.url)
        assert response.status_code == 307
        assert other.requests == []


def test_cookies_are_not_kept() -> None:
    with ScriptedEndpoint(Refusal(200, headers={"Set-Cookie": "a=b"}), "hello") as endpoint:
        post(HERE, endpoint.url, endpoint.url)
    assert len(endpoint.requests) == 2
    assert "cookie" not in endpoint.requests[1].headers
