"""URLs of workers."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.config.endpoint import UrlError, rank_of, worker_url, worker_urls
from eldr.router.config.settings import RouterConfig


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://d:1", "http://d:1"),
        ("https://d.example:8443/", "https://d.example:8443"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://10.0.0.1", "http://10.0.0.1"),
        ("http://d:1#rank=3", "http://d:1#rank=3"),
        ("http://gateway/prefill0", "http://gateway/prefill0"),
        ("http://gateway/a/b/", "http://gateway/a/b"),
        ("https://gateway:8443/a%2Fb/~c;d=e@f#rank=3", "https://gateway:8443/a%2Fb/~c;d=e@f#rank=3"),
        ("http://d:1/v1/b", "http://d:1/v1/b"),
        ("http://d:1/.hidden/a..b", "http://d:1/.hidden/a..b"),
    ],
)
def test_urls_of_workers(text: str, url: str) -> None:
    assert worker_url(text) == url
    assert worker_urls(text) == (url,)


@pytest.mark.parametrize(
    "text",
    [
        "", "d:1", "http://", "http:///x", "//d:1", "ftp://d:1", "file:///etc/passwd", "unix:///run/x", "HTTP//d",
        "http://d:1/v1", "http://d:1/..", "http://d:1//", "http://d:1?x=y", "http://u@d:1", "http://u:p@d:1",
        "http://:p@d:1", "http://@d:1", "http://d:1@e:2", "http://d\\@e", "http://d:0", "http://d:99999", "http://d:+1",
        "http://d:1:2", "http://d :1", "http://d\r\nx: y", "http://d\x00", "http://dä:1", "http://[::1", "http://d%2e:1",
        "http://d:1#", "http://d:1#rank=-1", "http://d:1#rank=", "http://d:1#rank=01", "http://d:1#dp=0", "http://d:1#x",
        "http://d:1#rank=1#rank=2", "http://d:1/v1/", "http://d:1/a/v1", "http://d:1/a//b", "http://d:1/a//", "http:////a",
        "http://d:1/a/./b", "http://d:1/a/../b", "http://d:1/a/..", "http://d:1/%2e%2E/b", "http://d:1/.%2e",
        "http://d:1/a?b", "http://d:1/a%2", "http://d:1/a%zz", "http://d:1/a b", "http://d:1/a\\b", "http://d:1/ä",
        "http://d:1/a\r\nb", "http://d:1/a#b", "http://d:1/[a]", "http://d:1/a#rank=1/b",
    ],
)  # fmt: skip
def test_what_is_no_url_of_a_worker(text: str) -> None:
    with pytest.raises(UrlError):
        worker_urls(text)


def test_ranks_of_one_url() -> None:
    assert worker_urls("http://d:1#dp=2") == ("http://d:1#rank=0", "http://d:1#rank=1")
    assert [rank_of(url) for url in (*worker_urls("http://d:1#dp=2"), "http://d:1")] == [0, 1, None]
    lists: dict[str, Any] = {"prefill": ["http://p:1"], "decode": ["http://d:1#dp=3"]}  # as a file gives them
    config = RouterConfig.of(**lists)
    assert config.workers.decode == tuple(f"http://d:1#rank={rank}" for rank in range(3))
    with pytest.raises(UrlError):
        worker_url("http://d:1#dp=2")


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=40).map("http://".__add__)
    | st.text(max_size=40)
    | st.text("ab/.%2eE:1#@?=rankdp", max_size=30).map("http://d".__add__)
)
def test_any_text_is_a_url_or_an_error(text: str) -> None:
    try:
        urls = worker_urls(text)
    except UrlError:
        return
    for url in urls:
        assert worker_url(url) == url
        assert url.isascii()
        assert not set(url) & set("\\? \r\n\x00")
        assert not set(urlsplit(url).netloc) & set("@%")
        assert not url.endswith("/")
