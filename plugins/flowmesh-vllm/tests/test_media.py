from __future__ import annotations

import json
from typing import Any

import pytest
from flowmesh_vllm.media import clean_media

from flowmesh_core import InputError

# A name would be asked of a name service; these need none.
ALLOWED = ("127.0.0.1", "10.0.0.0")


def said(*parts: Any) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "see http://169.254.169.254/ and file:///etc/passwd"},
        {"role": "user", "content": [{"type": "text", "text": "what is it?"}, *parts]},
    ]


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


FORMS = {
    "as OpenAI has it": picture,
    "in short": lambda url: {"type": "image_url", "image_url": url},
    "without a type": lambda url: {"image_url": url},
    "sound": lambda url: {"type": "audio_url", "audio_url": {"url": url}},
    "film": lambda url: {"type": "video_url", "video_url": {"url": url}},
    "unknown": lambda url: {"type": "smell", "smell_url": {"detail": {"url": url}}},
    "several": lambda url: {"type": "image_url", "image_url": [{"url": "data:,x"}, {"url": url}]},
    "listed": lambda url: {"type": "video_url", "video_url": ["data:,x", url]},
    "nested": lambda url: {"type": "tool_result", "content": [{"content": [picture(url)]}]},
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@each_form
def test_a_local_file_is_refused_wherever_it_stands(form: Any) -> None:
    message = r"a message points to 'file:///etc/passwd', which is no plain http\(s\) URL"
    with pytest.raises(InputError, match=message):
        clean_media(said(form("file:///etc/passwd")), ())


@each_form
def test_the_clouds_metadata_is_refused_wherever_it_stands(form: Any) -> None:
    with pytest.raises(InputError, match=r"a message points to .*link-local or metadata"):
        clean_media(said(form("http://169.254.169.254/latest/meta-data/")), ())


@each_form
def test_a_host_that_the_operator_does_not_name_is_refused(form: Any) -> None:
    clean_media(said(form("http://127.0.0.1:8000/a.png")), ALLOWED)
    with pytest.raises(InputError, match=r"host 127\.0\.0\.2 is not .* to FLOWMESH_HTTP_ALLOW"):
        clean_media(said(form("http://127.0.0.2:8000/a.png")), ALLOWED)


@pytest.mark.parametrize(
    "url",
    [
        *("/etc/passwd", "", "FILE:///etc/passwd", " file:///etc/passwd", "ftp://127.0.0.1/x"),
        *("s3://bucket/x", "gopher://127.0.0.1", "//127.0.0.1/x", "adata:,x", "data"),
        *("http://", "http:127.0.0.1", "ht\ntp://127.0.0.1/", "xhttp://127.0.0.1/"),
    ],
)
def test_whatever_is_not_fetched_over_http_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"no plain http\(s\) URL|must be an http"):
        clean_media(said(picture(url)), ())


@pytest.mark.parametrize("mark", ["\\", " ", "\t", "\n", "\0", "\u3002", "\uff0f"])
def test_an_address_that_readers_may_understand_differently_is_refused(mark: str) -> None:
    url = f"http://127.0.0.2{mark}@127.0.0.1/a.png"
    with pytest.raises(InputError, match=r"a message points to .*no plain http"):
        clean_media(said(picture(url)), ALLOWED)
    with pytest.raises(InputError, match=r"a message points to .*no plain http"):
        clean_media(said(picture(f"http://127.0.0.1/a.png{mark}")), ALLOWED)


def test_a_part_brings_no_name_of_something_that_was_seen_before() -> None:
    def part(**fields: Any) -> dict[str, Any]:
        return {**picture("data:,x"), **fields}

    messages = said(part(uuid="theirs"), {"type": "text", "text": "uuid", "uuid": None})
    before = json.dumps(messages)
    found = clean_media(messages, ALLOWED)
    assert found == said(part(), {"type": "text", "text": "uuid"})
    assert json.dumps(messages) == before


def test_all_else_of_a_message_stays_as_it_is() -> None:
    messages = [
        *said(picture("http://127.0.0.1:80/a.png?b=c%20d#e"), "a bare text"),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "uuid", "tool_call_id": "1"},
    ]
    assert clean_media(messages, ALLOWED) == messages


def test_what_stands_in_the_message_itself_needs_no_host() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    for part in (picture("data:image/png;base64,iVBORw0KGgo="), sound):
        assert clean_media(said(part), ALLOWED) == said(part)


def test_without_a_list_every_host_that_is_no_trap_is_allowed() -> None:
    messages = said(picture("http://127.0.0.1/a.png"), picture("https://10.0.0.1/b.png"))
    assert clean_media(messages, ()) == messages


def test_one_bad_address_among_good_ones_is_found() -> None:
    good = [picture("http://127.0.0.1/a.png")] * 3
    with pytest.raises(InputError, match="file:///x"):
        clean_media([*said(*good), *said(*good, picture("file:///x"))], ALLOWED)


def test_secrets_of_an_address_are_not_told() -> None:
    with pytest.raises(InputError, match=r"http://\*\*\*@127\.0\.0\.2/a\?key=\*\*\*: host"):
        clean_media(said(picture("http://me:secret@127.0.0.2/a?key=secret")), ALLOWED)


def test_texts_that_only_mention_addresses_pass() -> None:
    messages = [
        *said({"type": "text", "text": "file:///etc/passwd"}),
        {"role": "user", "content": "http://169.254.169.254/"},
        {"role": "assistant", "content": None},
        {"role": "tool"},
    ]
    assert clean_media(messages, ALLOWED) == messages
    assert clean_media([], ALLOWED) == []


def test_nor_are_they_when_the_address_cannot_be_read() -> None:
    with pytest.raises(InputError, match="no plain") as caught:
        clean_media(said(picture("http://me:secret@127.0.0.2/a b")), ALLOWED)
    assert "secret" not in str(caught.value)
