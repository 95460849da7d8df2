"""URLs of workers."""

from __future__ import annotations

from typing import Any

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
        "http://d:1#rank=1#rank=2",
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
@given(st.text(max_size=40).map("http://".__add__) | st.text(max_size=40))
def test_any_text_is_a_url_or_an_error(text: str) -> None:
    try:
        urls = worker_urls(text)
    except UrlError:
        return
    for url in urls:
        assert worker_url(url) == url
        assert not set(url) & set("@\\?% \r\n\x00")
