"""HTTP clients, for models and MCP servers, that go nowhere but where a policy lets them."""

from __future__ import annotations

from collections.abc import Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING

from flowmesh_core import NetworkPolicy, client_hooks

if TYPE_CHECKING:  # comes with the engine
    import httpx2

__all__ = ["build_http_client"]


def build_http_client(
    policy: NetworkPolicy,
    *,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
    trust_env: bool = True,
) -> httpx2.AsyncClient:
    """Build a client that keeps no cookies and follows no redirects; the caller closes it.

    Args:
        policy: Asked before each request, and again with the address that was reached.
        timeout_s: For each read or write.
        headers: Sent with every request.
        trust_env: Whether the proxies of the environment are used.
    """
    import httpx2  # noqa: PLC0415 - see the import block

    return httpx2.AsyncClient(
        **client_hooks(policy, asynchronous=True),
        timeout=timeout_s,
        headers=dict(headers or {}),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        trust_env=trust_env,
    )
