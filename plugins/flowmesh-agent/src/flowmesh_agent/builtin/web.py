"""The tools ``http``, ``web_search`` and ``web_read``.

The model chooses what they open, so they reach the operator's ``FLOWMESH_AGENT_HTTP_ALLOW`` only;
search and reader are the operator's own services, and their keys go nowhere else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin

import attrs
import httpx
from pydantic import BaseModel, Field, SecretStr

from flowmesh_agent.builtin.pages import page_text
from flowmesh_agent.hosts import HostRules, host_of, is_named, open_client
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.tools import Tool, ToolContext, ToolError
from flowmesh_core import ArtifactError, StrictBlock

__all__ = ["HttpTool", "WebReadTool", "WebSearchTool"]

MAX_BYTES = 2**20
MAX_REDIRECTS = 5

_TEXT_TYPES = ("text/", "application/json", "application/xml", "application/javascript")
_TEXT_ENDS = ("+json", "+xml")
# Unpacking could make a little into very much.
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "flowmesh-agent"}


@attrs.frozen(kw_only=True)
class _Answer:
    url: str
    status: int
    media_type: str
    text: str
    cut: bool

    @property
    def is_page(self) -> bool:
        return self.media_type in ("text/html", "application/xhtml+xml")


class HttpOptions(StrictBlock):
    """What a document may say of ``http`` and ``web_read``: fewer hosts than the operator's."""

    allow: list[str] | None = None


class HttpArguments(BaseModel):
    """What the model gives ``http``."""

    url: str = Field(description="an http:// or https:// URL")
    method: str = Field(default="GET", description="GET or HEAD; others where they are allowed")
    body: str | None = Field(default=None, description="text to send, JSON or plain")


class HttpTool(Tool[HttpArguments]):
    """One request to an allowed host."""

    name = "http"
    description = "Send an HTTP request and return the status and text of the answer."
    parameters = HttpArguments

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = HttpOptions.model_validate(options)

    async def call(self, ctx: ToolContext, arguments: HttpArguments) -> dict[str, Any]:
        """Return ``url``, ``status``, ``media_type`` and ``text``, and whether that was ``cut``."""
        method = arguments.method.upper()
        if method not in ctx.settings.http_methods:
            allowed = ", ".join(ctx.settings.http_methods)
            raise ToolError(f"method {method} is not allowed here; allowed are {allowed}")
        found = await _request(
            ctx.http, method, arguments.url, body=arguments.body, allow=self._options.allow
        )
        return attrs.asdict(found)


class SearchOptions(StrictBlock):
    """What a document may say of ``web_search``: two-letter codes of country and language."""

    results: int = Field(default=10, ge=1, le=100)
    country: str | None = Field(default=None, pattern="^[a-z]{2}$")
    language: str | None = Field(default=None, pattern="^[a-z]{2}$")


class SearchArguments(BaseModel):
    """What the model gives ``web_search``."""

    query: str = Field(min_length=1, max_length=2000, description="words to search for")


class WebSearchTool(Tool[SearchArguments]):
    """Google's results, through the API of Serper."""

    name = "web_search"
    description = "Search the web; returns title, link and snippet of each page that was found."
    parameters = SearchArguments

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = SearchOptions.model_validate(options)

    def check(self, settings: AgentSettings) -> None:
        """Refuse a worker without a key for the search."""
        _key(settings.serper_api_key, self.name, "SERPER_API_KEY")

    async def call(self, ctx: ToolContext, arguments: SearchArguments) -> list[Any]:
        """Return ``title``, ``link`` and ``snippet`` of each page."""
        settings = ctx.settings
        options = self._options
        key = _key(settings.serper_api_key, self.name, "SERPER_API_KEY")
        body = {"q": arguments.query, "num": options.results}
        body |= {"gl": options.country} if options.country else {}
        body |= {"hl": options.language} if options.language else {}
        async with open_client([host_of(settings.search_url)], timeout_s=ctx.seconds) as client:
            found = await _request(
                client,
                "POST",
                settings.search_url,
                body=json.dumps(body),
                headers={"X-API-KEY": key},
            )
        return _read_results(_successful(found, "the search"))


def _read_results(found: _Answer) -> list[Any]:
    try:
        results = [
            {name: str(entry.get(name, "")) for name in ("title", "link", "snippet")}
            for entry in json.loads(found.text).get("organic", [])
        ]
    except (ValueError, AttributeError, TypeError) as exc:
        raise ToolError(f"the search answered with something else than results: {exc}") from exc
    return results or ["nothing was found"]


class ReadArguments(BaseModel):
    """What the model gives ``web_read``."""

    url: str = Field(description="an http:// or https:// URL")


class WebReadTool(Tool[ReadArguments]):
    """The text of one page: by the reader of Jina where there is a key for it, else our own."""

    name = "web_read"
    description = "Open a web page and return its text."
    parameters = ReadArguments

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = HttpOptions.model_validate(options)

    async def call(self, ctx: ToolContext, arguments: ReadArguments) -> str:
        """Return the page's text."""
        if ctx.settings.jina_api_key is not None:
            return await self._by_reader(ctx, arguments.url)
        found = await _request(ctx.http, "GET", arguments.url, allow=self._options.allow)
        _successful(found, found.url)
        return await asyncio.to_thread(page_text, found.text) if found.is_page else found.text

    async def _by_reader(self, ctx: ToolContext, url: str) -> str:
        settings = ctx.settings
        # The reader is no way around the rules: what it is asked for tells a host something. The
        # URL is sent as it was checked, and in a body, since a `..` could lead out of a path.
        try:
            url = str(httpx.URL(url))
            _check(url, self._options.allow)
            await asyncio.to_thread(HostRules(hosts=settings.http_allow).check, url)
        except (ArtifactError, httpx.InvalidURL) as exc:
            raise ToolError(str(exc)) from exc
        key = _key(settings.jina_api_key, self.name, "JINA_API_KEY")
        async with open_client([host_of(settings.reader_url)], timeout_s=ctx.seconds) as client:
            found = await _request(
                client,
                "POST",
                settings.reader_url,
                body=json.dumps({"url": url}),
                headers={"Authorization": f"Bearer {key}"},
            )
        return _successful(found, "the reader").text


def _key(secret: SecretStr | None, tool: str, variable: str) -> str:
    if secret is None:
        raise ToolError(f"{tool} is not set up on this worker: it needs {variable}")
    return secret.get_secret_value()


def _check(url: str, names: list[str] | None) -> None:
    try:
        host = host_of(url)
    except ArtifactError as exc:
        raise ToolError(str(exc)) from exc
    if names is not None and not is_named(host, names):
        raise ToolError(f"host {host} is not among those that this tool is allowed to open")


def _successful(found: _Answer, what: str) -> _Answer:
    if not 200 <= found.status < 300:
        raise ToolError(f"{what} answered with status {found.status}: {found.text[:200]}")
    return found


async def _request(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    *,
    body: str | None = None,
    headers: Mapping[str, str] | None = None,
    allow: list[str] | None = None,
) -> _Answer:
    """Send a request; a redirect is followed by hand, so that each hop is checked.

    Raises:
        ToolError: It was refused, or went wrong on the way.
    """
    try:
        for _ in range(1 + MAX_REDIRECTS):
            _check(url, allow)
            request = client.build_request(
                method, url, content=body, headers=_headers(body, headers)
            )
            response = await client.send(request, stream=True)
            try:
                if not response.has_redirect_location or headers:
                    return await _read(response)
                url = _next_url(response, method)
            finally:
                await response.aclose()
    except (ArtifactError, httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
        raise ToolError(f"{method} failed: {str(exc) or type(exc).__name__}") from exc
    raise ToolError(f"{method} was redirected more than {MAX_REDIRECTS} times")


def _headers(body: str | None, more: Mapping[str, str] | None) -> dict[str, str]:
    headers = {**_HEADERS, **(more or {})}
    if body is not None:
        try:
            json.loads(body)
            headers["Content-Type"] = "application/json"
        except ValueError:
            headers["Content-Type"] = "text/plain; charset=utf-8"
    return headers


def _next_url(response: httpx.Response, method: str) -> str:
    if method not in ("GET", "HEAD"):
        raise ToolError(f"{method} was redirected, which would lose its body; use the final URL")
    return urljoin(str(response.url), response.headers["location"])


async def _read(response: httpx.Response) -> _Answer:
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    packed = response.headers.get("content-encoding", "identity").lower()
    if packed != "identity":
        raise ToolError(f"the answer is packed with {packed}, although plain text was asked for")
    data, cut = await _first_bytes(response)
    is_text = media_type.startswith(_TEXT_TYPES) or media_type.endswith(_TEXT_ENDS)
    if data and media_type and not is_text:
        raise ToolError(f"the answer is {media_type}, which is no text")
    return _Answer(
        url=str(response.url),
        status=response.status_code,
        media_type=media_type,
        text=_decode(data, response.charset_encoding or "utf-8"),
        cut=cut,
    )


async def _first_bytes(response: httpx.Response) -> tuple[bytes, bool]:
    data = bytearray()
    async for block in response.aiter_raw():
        data += block
        if len(data) > MAX_BYTES:
            return bytes(data[:MAX_BYTES]), True
    return bytes(data), False


def _decode(data: bytes, charset: str) -> str:
    try:
        return data.decode(charset, errors="replace")
    except (LookupError, UnicodeError):  # a name that stands for no charset of text
        return data.decode(errors="replace")
