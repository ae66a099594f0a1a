"""Which hosts the model, or a document, may send an agent to.

The model chooses these addresses, and it repeats what pages and files say. So, other than in the
core's rules, no host at all is allowed until the operator names it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urlsplit

import attrs
import httpx

from flowmesh_core import ArtifactError, NetworkPolicy, client_hooks

__all__ = ["HostRules", "host_of", "is_named", "open_client"]

VARIABLE = "FLOWMESH_AGENT_HTTP_ALLOW"

_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # Source: RFC 6052
_UNICAST = ipaddress.ip_network("2000::/3")  # Source: RFC 4291


@attrs.frozen(kw_only=True)
class HostRules(NetworkPolicy):
    """The hosts that an agent's own requests may reach.

    Attributes:
        hosts: The operator's list: host names, ``*.example.org``, or ``*`` for all. An address of a
            private network is reached only by a name, or number, that stands there in full.
    """

    hosts: tuple[str, ...] = ()

    def check_host(self, url: str) -> None:
        """Refuse a URL whose host is not in the list; asks nobody.

        Raises:
            ArtifactError: Saying why.
        """
        host = host_of(url)
        if not is_named(host, self.hosts):
            raise ArtifactError(f"host {host} is not among those that {VARIABLE} allows agents")

    def check(self, url: str) -> None:
        """Refuse a URL that leads where it must not; asks the name service, and so may block.

        Raises:
            ArtifactError: Saying why.
        """
        self.check_host(url)
        super().check(url)

    def check_peer(self, address: str, url: str) -> None:
        """Refuse an address of a private network that the operator did not mean.

        Raises:
            ArtifactError: Naming the host and its address.
        """
        super().check_peer(address, url)
        host = host_of(url)
        if not _is_public(address) and host not in map(str.lower, self.hosts):
            raise ArtifactError(
                f"host {host} leads to {address}, which is not a public address; agents go there"
                f" only if {VARIABLE} names the host in full"
            )


def host_of(url: str) -> str:
    """Return the host of a URL in small letters.

    Raises:
        ArtifactError: It is no URL for HTTP, or holds a login.
    """
    try:
        parts = urlsplit(url)
        host, login = parts.hostname, parts.username
    except ValueError as exc:
        raise ArtifactError(f"the URL cannot be read: {exc}") from None
    if parts.scheme not in ("http", "https") or not host or login is not None or "\\" in host:
        raise ArtifactError("the URL must be an http:// or https:// one, without a login")
    return host


def is_named(host: str, patterns: Iterable[str]) -> bool:
    """Tell whether a host is one of these names, below a ``*.example.org``, or there is a ``*``."""
    return any(
        pattern == "*"
        or (host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern)
        for pattern in map(str.lower, patterns)
    )


def _is_public(text: str) -> bool:
    """Tell whether an address lies in the public network, in whichever form it is written."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
    if address in _NAT64:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return _is_public(str(inner))
    return address in _UNICAST and address.is_global


def open_client(hosts: Iterable[str], *, timeout_s: float = 60.0) -> httpx.AsyncClient:
    """Build a client that reaches these hosts only, for the caller to close.

    It follows no redirects, keeps no cookies and goes through no proxy, which would look up and
    reach hosts in its place.
    """
    return httpx.AsyncClient(
        **client_hooks(HostRules(hosts=tuple(hosts)), asynchronous=True),
        timeout=timeout_s,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        trust_env=False,
    )
