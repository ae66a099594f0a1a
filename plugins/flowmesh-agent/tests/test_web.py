from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flowmesh_agent.builtin.pages import page_text
from flowmesh_agent.builtin.web import MAX_BYTES, HttpTool, WebReadTool, WebSearchTool
from flowmesh_agent.hosts import HostRules, open_client
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.tools import Tool, ToolContext, ToolError
from website import HERE, Route, Site

from flowmesh_core import ArtifactError

PUBLIC = "1.1.1.1"  # an address, for which no name service is asked
PAGE = b"<title>Caf\xc3\xa9</title><script>steal()</script><p>One <b>two</b></p><p>three &amp; four"
ROUTES: dict[str, Route] = {
    "/page": (200, {"Content-Type": "text/html; charset=utf-8"}, PAGE),
    "/latin": (200, {"Content-Type": "text/plain; charset=latin-1"}, "Café".encode("latin-1")),
    "/odd": (200, {"Content-Type": "text/plain; charset=zlib"}, b"plain"),
    "/json": (200, {"Content-Type": "application/problem+json"}, b'{"a": 1}'),
    "/picture": (200, {"Content-Type": "image/png"}, b"\x89PNG"),
    "/long": (200, {"Content-Type": "text/plain"}, b"x" * (MAX_BYTES + 10)),
    "/packed": (200, {"Content-Encoding": "gzip"}, gzip.compress(b"x" * 10**6)),
    "/gone": (404, {"Content-Type": "text/plain"}, b"no such page"),
    "/moved": (302, {"Location": "/page"}, b""),
    "/away": (302, {"Location": "http://elsewhere.example/"}, b""),
    "/metadata": (302, {"Location": "http://169.254.169.254/latest"}, b""),
    "/badly": (302, {"Location": "http://[::1"}, b""),
    "/round": (302, {"Location": "/round"}, b""),
}


@pytest.fixture
def site() -> Iterator[Site]:
    with Site(ROUTES) as made:
        yield made


@pytest.fixture
def use(make_tool_context: Callable[..., ToolContext]) -> Callable[..., Any]:
    """Call a tool once, where the operator allows agents this machine."""

    def call(
        tool: Tool[Any], *, allow: tuple[str, ...] = (HERE,), settings: Any = None, **arguments: Any
    ) -> Any:
        async def go() -> Any:
            async with open_client(allow, timeout_s=5) as http:
                known = AgentSettings(http_allow=allow, **(settings or {}))
                ctx = make_tool_context(http=http, settings=known, seconds=5.0)
                return await tool.call(ctx, tool.parameters(**arguments))

        return asyncio.run(go())

    return call


def test_an_answer_comes_with_status_type_and_text(site: Site, use: Any) -> None:
    assert use(HttpTool({}), url=f"{site.url}/json") == {
        "url": f"{site.url}/json",
        "status": 200,
        "media_type": "application/problem+json",
        "text": '{"a": 1}',
        "cut": False,
    }
    assert use(HttpTool({}), url=f"{site.url}/gone")["status"] == 404
    head = use(HttpTool({}), url=f"{site.url}/page", method="head")
    assert (head["status"], head["text"]) == (200, "")


def test_charsets_are_read_and_false_ones_do_no_harm(site: Site, use: Any) -> None:
    assert use(HttpTool({}), url=f"{site.url}/latin")["text"] == "Café"
    assert use(HttpTool({}), url=f"{site.url}/odd")["text"] == "plain"


def test_only_the_operators_methods_are_sent(site: Site, use: Any) -> None:
    with pytest.raises(ToolError, match="method DELETE is not allowed here; allowed are GET, HEAD"):
        use(HttpTool({}), url=f"{site.url}/page", method="DELETE")
    assert site.asked == []
    more = {"http_methods": ("GET", "POST")}
    use(HttpTool({}), url=f"{site.url}/page", method="post", body='{"a": 1}', settings=more)
    use(HttpTool({}), url=f"{site.url}/page", method="post", body="a", settings=more)
    (_, first, body), (_, second, _) = site.requests
    assert (first["content-type"], body) == ("application/json", b'{"a": 1}')
    assert second["content-type"].startswith("text/plain")


def test_hosts_that_the_operator_does_not_name_are_not_asked(site: Site, use: Any) -> None:
    for tool in (HttpTool({}), WebReadTool({})):
        with pytest.raises(ToolError, match=r"127\.0\.0\.1 is not among those.*HTTP_ALLOW"):
            use(tool, url=f"{site.url}/page", allow=())
        with pytest.raises(ToolError, match=r"127\.0\.0\.1 is not among those that this tool"):
            use(type(tool)({"allow": ["example.org"]}), url=f"{site.url}/page")
    assert site.asked == []


def test_a_star_opens_no_private_address(site: Site, use: Any) -> None:
    port = site.url.rpartition(":")[2]
    for host in (HERE, "localhost", "0x7f000001", "[::ffff:127.0.0.1]"):
        with pytest.raises(ToolError, match="not a public address"):
            use(HttpTool({}), url=f"http://{host}:{port}/page", allow=("*",))
    assert site.asked == []
    assert use(HttpTool({}), url=f"{site.url}/page", allow=("*", HERE))["status"] == 200


def test_each_hop_of_a_redirect_is_checked(site: Site, use: Any) -> None:
    assert use(HttpTool({}), url=f"{site.url}/moved")["url"] == f"{site.url}/page"
    with pytest.raises(ToolError, match=r"elsewhere\.example is not among"):
        use(HttpTool({}), url=f"{site.url}/away")
    with pytest.raises(ToolError, match=r"169\.254\.169\.254"):
        use(HttpTool({}), url=f"{site.url}/metadata", allow=("*", HERE))
    with pytest.raises(ToolError, match="GET failed: Invalid URL"):
        use(HttpTool({}), url=f"{site.url}/badly")
    with pytest.raises(ToolError, match="redirected more than 5 times"):
        use(HttpTool({}), url=f"{site.url}/round")
    with pytest.raises(ToolError, match="would lose its body"):
        use(
            HttpTool({}),
            url=f"{site.url}/moved",
            method="POST",
            body="x",
            settings={"http_methods": ("POST",)},
        )


def test_what_is_no_text_or_packed_is_refused_and_the_long_is_cut(site: Site, use: Any) -> None:
    with pytest.raises(ToolError, match="image/png, which is no text"):
        use(HttpTool({}), url=f"{site.url}/picture")
    with pytest.raises(ToolError, match="packed with gzip"):
        use(HttpTool({}), url=f"{site.url}/packed")
    found = use(HttpTool({}), url=f"{site.url}/long")
    assert (len(found["text"]), found["cut"]) == (MAX_BYTES, True)


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "http://u:p@127.0.0.1/", "http://", "x"),
        "http://evil.example\\.127.0.0.1/",  # some readers take it for a slash
    ],
)
def test_other_urls_are_refused(url: str, use: Any) -> None:
    with pytest.raises(ToolError, match="must be an http:// or https:// one, without a login"):
        use(HttpTool({}), url=url)


def test_a_server_that_is_gone_is_an_error_for_the_model(use: Any) -> None:
    with pytest.raises(ToolError, match="GET failed: "):
        use(HttpTool({}), url=f"http://{HERE}:1/")


def test_options_that_no_tool_knows_are_refused() -> None:
    with pytest.raises(ValueError, match="alow"):
        HttpTool({"alow": []})
    with pytest.raises(ValueError, match="less than or equal to 100"):
        WebSearchTool({"results": 101})


def test_a_page_is_read_as_text(site: Site, use: Any) -> None:
    assert use(WebReadTool({}), url=f"{site.url}/page") == "Café\nOne two\nthree & four"
    assert use(WebReadTool({}), url=f"{site.url}/latin") == "Café"
    with pytest.raises(ToolError, match="answered with status 404: no such page"):
        use(WebReadTool({}), url=f"{site.url}/gone")


def test_the_reader_gets_the_key_and_only_allowed_hosts(site: Site, use: Any) -> None:
    settings = {"jina_api_key": "jina-secret", "reader_url": site.url}
    site.routes["/"] = (200, {"Content-Type": "text/plain"}, b"# Read")
    allow = (PUBLIC,)
    wanted = f"https://{PUBLIC}/a?b=1"
    assert use(WebReadTool({}), url=wanted, allow=allow, settings=settings) == "# Read"
    line, headers, body = site.requests[0]
    assert (line, json.loads(body)) == ("POST /", {"url": wanted})
    assert headers["authorization"] == "Bearer jina-secret"
    with pytest.raises(ToolError, match=r"other\.example is not among"):
        use(WebReadTool({}), url="https://other.example/", allow=allow, settings=settings)
    with pytest.raises(ToolError, match="not among those that this tool"):
        use(WebReadTool({"allow": ["a.example"]}), url=wanted, allow=allow, settings=settings)
    assert len(site.requests) == 1


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("/../../../https://evil.example/", "/https://evil.example/"),
        ("/a/./../?q=http://evil.example#x", "/?q=http://evil.example#x"),
        ("/ä b%2f..", "/%C3%A4%20b%2f.."),
    ],
)
def test_no_path_leads_the_reader_elsewhere(site: Site, use: Any, url: str, sent: str) -> None:
    settings = {"jina_api_key": "jina-secret", "reader_url": f"{site.url}/read"}
    site.routes["/read"] = (200, {"Content-Type": "text/plain"}, b"# Read")
    use(WebReadTool({}), url=f"https://{PUBLIC}{url}", allow=(PUBLIC,), settings=settings)
    ((line, _, body),) = site.requests
    assert (line, json.loads(body)) == ("POST /read", {"url": f"https://{PUBLIC}{sent}"})


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"http://{HERE}/", "not a public address"),
        ("http://0x7f000001/", "not a public address"),
        ("http://169.254.169.254/latest", "link-local or metadata address"),
        ("http://[::1", "Invalid"),
        ("http://u:p@1.1.1.1/", "without a login"),
        ("file:///etc/passwd", "must be an http:// or https:// one"),
    ],
)
def test_the_reader_is_no_way_to_private_addresses(
    site: Site, use: Any, url: str, says: str
) -> None:
    settings = {"jina_api_key": "jina-secret", "reader_url": site.url}
    with pytest.raises(ToolError, match=says):
        use(WebReadTool({}), url=url, allow=("*", "169.254.169.254"), settings=settings)
    assert site.asked == []


def test_a_search_returns_title_link_and_snippet(site: Site, use: Any) -> None:
    organic = [{"title": "T", "link": "https://x.example", "snippet": "S", "position": 1}, {}]
    site.routes["/search"] = (
        200,
        {"Content-Type": "application/json"},
        json.dumps({"organic": organic}).encode(),
    )
    settings = {"serper_api_key": "serper-secret", "search_url": f"{site.url}/search"}
    tool = WebSearchTool({"results": 3, "country": "de"})
    found = use(tool, query="what", allow=(), settings=settings)
    assert found[0] == {"title": "T", "link": "https://x.example", "snippet": "S"}
    line, headers, body = site.requests[0]
    assert (line, headers["x-api-key"]) == ("POST /search", "serper-secret")
    assert json.loads(body) == {"q": "what", "num": 3, "gl": "de"}


def test_a_search_that_fails_says_so(site: Site, use: Any) -> None:
    with pytest.raises(ToolError, match="needs SERPER_API_KEY"):
        use(WebSearchTool({}), query="what")
    settings = {"serper_api_key": "serper-secret", "search_url": f"{site.url}/gone"}
    with pytest.raises(ToolError, match="the search answered with status 404"):
        use(WebSearchTool({}), query="what", settings=settings)
    settings["search_url"] = f"{site.url}/away"  # the key goes nowhere else
    with pytest.raises(ToolError, match="the search answered with status 302"):
        use(WebSearchTool({}), query="what", settings=settings)
    settings["search_url"] = f"{site.url}/latin"
    with pytest.raises(ToolError, match="something else than results"):
        use(WebSearchTool({}), query="what", settings=settings)


@pytest.mark.parametrize(
    "address",
    [
        *("10.0.0.1", "127.0.0.1", "192.168.1.1", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
        *("::1", "fd00::1", "fe80::1%eth0", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::"),
        *("::", "ff02::1", "2001:0:4136:e378:8000:63bf:f5ff:fffe"),
    ],
)
def test_private_addresses_need_the_name_in_full(address: str) -> None:
    with pytest.raises(ArtifactError, match=r"not a public address|link-local or metadata"):
        HostRules(hosts=("*.example.org",)).check_peer(address, "http://a.example.org/")
    if not address.startswith("fe80"):
        HostRules(hosts=("a.example.org",)).check_peer(address, "http://A.example.org/")


def test_the_metadata_service_is_reached_under_no_name() -> None:
    for address in ("169.254.169.254", "fe80::1", "::ffff:169.254.169.254"):
        with pytest.raises(ArtifactError, match="link-local or metadata"):
            HostRules(hosts=("a.example.org",)).check_peer(address, "http://a.example.org/")


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "2606:4700::1", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_public_addresses_pass(address: str) -> None:
    HostRules(hosts=("*",)).check_peer(address, "http://a.example.org/")


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("a < b <c", "a < b"),
        ("<!-- <p>no</p> -->yes", "yes"),
        ("<ScRiPt>x<y</sCrIpT>z", "z"),
        ("<style>p{}", ""),
        ('<p title="a > b">c', "c"),
        ("<table><tr><td>1<td>2</table>", "1 2"),
        ("İ<B>x</B><script>y</script>", "İx"),
        ("<svg/>after", "after"),
        ("&lt;p&gt; &copy;", "<p> ©"),
        ("", ""),
    ],
)
def test_pages_become_what_a_reader_sees(html: str, text: str) -> None:
    assert page_text(html) == text


@pytest.mark.parametrize(
    "part", ["<", "<!--", "<a ", "</", "<a b='", "<script>", "<title>", "&#", "= "]
)
def test_no_page_takes_long(part: str) -> None:
    started = time.perf_counter()
    page_text(part * (2**18 // len(part)))
    assert time.perf_counter() - started < 5
