"""Which hosts a worker may talk to, who gets the orchestrator's token, and what a log may show.

Documents name URLs; the operator says where they may lead. Addresses of the cloud's metadata
service and the link-local network are refused whatever name leads there.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

import attrs

from flowmesh_core.config import Settings
from flowmesh_core.errors import ArtifactError

if TYPE_CHECKING:  # loaded when the first task needs the network
    import httpx

__all__ = ["NetworkPolicy", "build_async_client", "build_client", "client_hooks", "mask_url"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Origin = tuple[str, str, int | None]

_PORTS = {"http": 80, "https": 443}
_FORBIDDEN = tuple(
    map(
        ipaddress.ip_network,
        (
            *("169.254.0.0/16", "fe80::/10"),
            # Metadata elsewhere: AWS, Alibaba, Azure, Oracle.
            *("fd00:ec2::254/128", "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),
        ),
    )
)
# IPv6 addresses that end with an IPv4 one. Source: RFC 4291 2.5.5, RFC 6052, RFC 7915, RFC 8215.
_ENDS_WITH_IPV4 = tuple(
    map(
        ipaddress.IPv6Network,
        ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48"),
    )
)
# Whatever else a request carries may be a secret and stays with the origin it was meant for.
_HARMLESS = frozenset(
    {
        *("accept", "accept-encoding", "connection", "content-length", "content-type", "host"),
        *("if-range", "range", "transfer-encoding", "user-agent"),
    }
)
_FIRST_KEY = "flowmesh_first"
# Comes before anything is sent. Source: the "trace" extension of httpx.
_CONNECTED = "connection.connect_tcp.complete"


@attrs.frozen(kw_only=True)
class NetworkPolicy:
    """The operator's rules for the network; a subclass may refuse more.

    Attributes:
        allow: Host names, or ``*.example.org`` for all below one; empty allows every host. The
            orchestrator's own is always allowed.
        orchestrator_url: The only origin that gets ``token``.
        token: Bearer token.
    """

    allow: tuple[str, ...] = ()
    orchestrator_url: str | None = None
    token: str | None = attrs.field(default=None, repr=False)

    @classmethod
    def from_settings(cls, settings: Settings) -> NetworkPolicy:
        """Build the policy of a worker."""
        return cls(
            allow=settings.http_allow,
            orchestrator_url=settings.orchestrator_base_url,
            token=settings.orchestrator_token,
        )

    def check(self, url: str) -> None:
        """Refuse a URL that a worker must not open; asks the name service, and so may block.

        Raises:
            ArtifactError: Saying why.
        """
        parts = _split(url)
        host = parts.hostname
        if parts.scheme not in _PORTS or not host:
            raise ArtifactError(f"{mask_url(url)} must be an http:// or https:// URL")
        if not self._allows(url, host):
            raise ArtifactError(
                f"{mask_url(url)}: host {host} is not among those that the operator allows;"
                " add it to FLOWMESH_HTTP_ALLOW"
            )
        for address in _addresses(host):
            self.check_peer(address, url)

    def check_peer(self, address: str, url: str) -> None:
        """Refuse an address of the link-local network or of a cloud's metadata service.

        For clients that ``client_hooks`` does not fit: they call ``check`` before they connect,
        and this with the address that they reached, which the name may have changed meanwhile.

        Args:
            address: IP address of the peer, without its port.
            url: What led there.

        Raises:
            ArtifactError: It is refused, or no IP address.
        """
        try:
            forms = [*_forms(_parse_address(address))]
        except ValueError:
            raise ArtifactError(f"{mask_url(url)} leads to {address!r}, no IP address") from None
        if any(form in network for form in forms for network in _FORBIDDEN):
            raise ArtifactError(
                f"{mask_url(url)} leads to {address}, a link-local or metadata address, which"
                " workers never open"
            )

    def _allows(self, url: str, host: str) -> bool:
        if not self.allow or self._is_orchestrator(url):
            return True
        return any(
            host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
            for pattern in map(str.lower, self.allow)
        )

    def _is_orchestrator(self, url: str) -> bool:
        return bool(self.orchestrator_url) and _origin(url) == _origin(self.orchestrator_url or "")

    def headers_for(self, url: str, headers: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return a request's headers; the token is added for the orchestrator's origin alone.

        An ``Authorization`` that the document gives is left as it is.
        """
        merged = dict(headers or {})
        given = any(name.lower() == "authorization" for name in merged)
        if self.token and not given and self._is_orchestrator(url):
            merged["Authorization"] = f"Bearer {self.token}"
        return merged

    def mask_url(self, url: str) -> str:
        """Return what a log may show of a URL."""
        return mask_url(url)


def mask_url(url: str) -> str:
    """Replace user, password, fragment and every value of the query by ``***``."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    user, at, host = parts.netloc.rpartition("@")
    query = "&".join(map(_mask_value, parts.query.split("&"))) if parts.query else ""
    fragment = "***" if parts.fragment else ""
    netloc = f"***@{host}" if at and user else host
    return urlunsplit((parts.scheme, netloc, parts.path, query, fragment))


def _mask_value(pair: str) -> str:
    name, equals, _ = pair.partition("=")
    return f"{name}=***" if equals else "***"


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises when it is no number
    except ValueError as exc:
        raise ArtifactError(f"{mask_url(url)} is no URL: {exc}") from None
    return parts


def _origin(url: str) -> Origin:
    parts = _split(url)
    return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme)


def _addresses(host: str) -> Iterator[str]:
    """Resolve a host; a name that cannot be resolved leads nowhere and is the connection's matter.

    Numbers in all their spellings (``0xa9fea9fe``) are resolved too.
    """
    try:
        yield str(_parse_address(host))
        return
    except ValueError:  # a name
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    yield from (str(entry[4][0]) for entry in found)


def _parse_address(text: str) -> Address:
    """Read an address; only one of IPv6 may have a zone, and ``1.2.3.4%.example.org`` is a name."""
    return ipaddress.ip_address(text.partition("%")[0] if ":" in text else text)


def _forms(address: Address) -> Iterator[Address]:
    """Return an address and the IPv4 ones that it may stand for."""
    yield address
    if isinstance(address, ipaddress.IPv4Address):
        return
    if any(address in network for network in _ENDS_WITH_IPV4):
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.sixtofour:
        yield address.sixtofour
    yield from address.teredo or ()


def build_client(policy: NetworkPolicy, *, timeout_s: float = 60.0) -> httpx.Client:
    """Build a client that keeps the policy on every hop; the timeout is for each read or write.

    Redirects are followed, and carry no secret to another origin. What the policy refuses raises
    ``ArtifactError``. The caller closes it.
    """
    import httpx  # noqa: PLC0415 - see the import block

    return httpx.Client(**client_hooks(policy) | {"follow_redirects": True}, timeout=timeout_s)


def build_async_client(policy: NetworkPolicy, *, timeout_s: float = 60.0) -> httpx.AsyncClient:
    """Build the same for coroutines; names are resolved on a thread, cookies are not kept.

    Several tasks may share it, and one must not be let in with what another was given.
    """
    from http.cookiejar import CookieJar, DefaultCookiePolicy  # noqa: PLC0415 - as below

    import httpx  # noqa: PLC0415 - see the import block

    return httpx.AsyncClient(
        **client_hooks(policy, asynchronous=True) | {"follow_redirects": True},
        timeout=timeout_s,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
    )


def client_hooks(policy: NetworkPolicy, *, asynchronous: bool = False) -> dict[str, Any]:
    """Return arguments with which a library's own httpx client keeps the policy.

    For libraries that pass arguments on: ``QdrantClient(url, **client_hooks(policy))``. Each URL
    is checked before it is opened, and whom a connection really reached before anything is sent.
    Redirects are not followed; a library that follows them all the same is checked on every hop.

    Args:
        policy: Whose ``ArtifactError`` a refused request raises; libraries may wrap it.
        asynchronous: The client is an ``AsyncClient``; names are then resolved on a thread.

    Returns:
        ``event_hooks`` and ``follow_redirects``, of which the client must replace neither. One of
        httpx2 takes them as well.
    """
    _quieten()
    before = _checking_in_turn(policy) if asynchronous else _checking(policy)
    return {"event_hooks": {"request": [before]}, "follow_redirects": False}


def _checking(policy: NetworkPolicy) -> Callable[[httpx.Request], None]:
    def before(request: httpx.Request) -> None:
        url = str(request.url)
        policy.check(url)
        _follow(request)

        def watch(event: str, info: Mapping[str, Any]) -> None:
            if event == _CONNECTED:
                try:
                    _check_stream(policy, info["return_value"], url)
                except ArtifactError:
                    info["return_value"].close()
                    raise

        request.extensions["trace"] = watch

    return before


def _checking_in_turn(policy: NetworkPolicy) -> Callable[[httpx.Request], Awaitable[None]]:
    async def before(request: httpx.Request) -> None:
        url = str(request.url)
        await asyncio.to_thread(policy.check, url)
        _follow(request)

        async def watch(event: str, info: Mapping[str, Any]) -> None:
            if event == _CONNECTED:
                try:
                    _check_stream(policy, info["return_value"], url)
                except ArtifactError:
                    await info["return_value"].aclose()
                    raise

        request.extensions["trace"] = watch

    return before


def _quieten() -> None:
    """Keep the library from logging whole URLs, signatures included, at level INFO."""
    for logger in map(logging.getLogger, ("httpx", "httpx2")):
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)


def _follow(request: httpx.Request) -> None:
    """Look at a request, which may be a redirected one, and drop what was not meant for its host.

    Raises:
        ArtifactError: The redirect would turn an upload into a plain GET, and so lose it.
    """
    origin = _origin(str(request.url))
    # A redirected request takes over the extensions of the first one.
    first = request.extensions.setdefault(_FIRST_KEY, (origin, request.method))
    if first[1] != request.method:
        raise ArtifactError(
            f"{first[1]} was redirected to {mask_url(str(request.url))} as {request.method}, which"
            " would lose its content; use the final URL"
        )
    if first[0] != origin:
        for name in set(request.headers) - _HARMLESS:
            del request.headers[name]


def _check_stream(policy: NetworkPolicy, stream: Any, url: str) -> None:
    """Look whom we really reached: the name may have led elsewhere since it was checked."""
    peer = stream.get_extra_info("server_addr")
    if isinstance(peer, tuple):
        policy.check_peer(str(peer[0]), url)
