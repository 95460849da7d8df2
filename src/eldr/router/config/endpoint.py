"""The address of a worker: its URL, as flags, files and the admin API give it, and its role."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from eldr.errors import EldrError

# What a worker is there for. An aggregated worker computes prompts and generates, with no hand-off to another.
Role = Literal["prefill", "decode", "aggregated"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "aggregated")
# The parts of a request. All of it is the decode leg if one worker does it all.
LegName = Literal["prefill", "decode"]
LEGS: tuple[LegName, ...] = ("prefill", "decode")

# A host name or IPv4 address, or an IPv6 address in brackets, and then a port. No user.
AUTHORITY = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
# The path that all paths of the API begin with behind a gateway: segments as in RFC 3986, section 3.3, none empty. No
# query.
PATH = re.compile(r"(/([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+)*")
DOTS = re.compile(r"(\.|%2e){1,2}", re.IGNORECASE)
# With data parallelism, several engines share one URL. rank=R is one of them, and dp=N is all N of them.
RANK = re.compile(r"rank=(0|[1-9][0-9]{0,3})")
RANKS = re.compile(r"dp=([1-9][0-9]{0,3})")


class UrlError(EldrError):
    """Text that is not the URL of a worker."""


def leg_of(role: Role) -> LegName:
    """The leg of requests that workers of this role run."""
    return "prefill" if role == "prefill" else "decode"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A known worker: its URL, in the form of `worker_url`, and its role."""

    url: str
    role: Role


Endpoints = frozenset[Endpoint]


def worker_url(text: str) -> str:
    """The normal form of one worker's URL, which identifies it: http://HOST:PORT/PATH, with #rank=R for a rank.

    Most workers have no path. None ends in a slash.

    Raises UrlError if `text` is not such a URL.
    """
    base, rank = _split(text)
    if rank and not RANK.fullmatch(rank):
        raise UrlError(f"{text!r} is not a worker's URL: expected #rank=R at the end, with R from 0")
    return f"{base}#{rank}" if rank else base


def worker_urls(text: str) -> tuple[str, ...]:
    """The normal forms of the URLs that `text` stands for. #dp=N stands for the ranks 0 to N - 1. Raises UrlError."""
    base, ranks = _split(text)
    found = RANKS.fullmatch(ranks)
    return tuple(f"{base}#rank={rank}" for rank in range(int(found[1]))) if found else (worker_url(text),)


def rank_of(url: str) -> int | None:
    """The rank in a worker's URL, or None if there is none."""
    found = RANK.fullmatch(urlsplit(url).fragment)
    return int(found[1]) if found else None


def why_no_endpoint(url: str) -> str | None:
    """Why no gateway could send a request to a worker with this URL. None if it can."""
    parts = urlsplit(url)
    try:
        ipaddress.ip_address(parts.hostname or "")
    except ValueError:
        return "a gateway needs the address of a worker, not its name; dns+http://NAME:PORT resolves it"
    if parts.path:
        return "a gateway picks addresses, and does not change paths"
    if parts.fragment:
        return "a gateway addresses ports, not ranks; give each rank a port of its own"
    return None


def _split(text: str) -> tuple[str, str]:
    """The base URL, and the text after the #."""
    problem = UrlError(f"{text!r} is not a worker's URL, expected one such as http://10.0.0.1:8000")
    base, mark, fragment = text.partition("#")
    scheme, separator, rest = base.partition("://")
    authority, slash, path = rest.partition("/")
    path = (slash + path).removesuffix("/")
    if scheme not in ("http", "https") or not separator or not AUTHORITY.fullmatch(authority):
        raise problem
    # Another party could resolve dots to a path that was not meant.
    if not PATH.fullmatch(path) or any(DOTS.fullmatch(segment) for segment in path.split("/")):
        raise problem
    if path.endswith("/v1"):
        raise UrlError(f"{text!r} is not a worker's URL: leave out /v1, which the router adds to it")
    try:
        port = urlsplit(f"{scheme}://{authority}").port
    except ValueError:
        raise problem from None
    if port == 0 or (mark and not fragment):
        raise problem
    return f"{scheme}://{authority}{path}", fragment
