"""The page itself: one file with its style and script inside, which may load nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

TYPE = b"text/html; charset=utf-8"


@cache
def page() -> tuple[bytes, bytes]:
    """Return the page and its header lines.

    The header has a policy that allows its style and script by their digests, so nothing that a client puts into a
    label or an id can ever run.
    """
    text = resources.files("eldr.router.api.ui").joinpath("page.html").read_bytes()
    script, style = (_digests(text, tag) for tag in (b"script", b"style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; style-src-attr 'none'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = f"content-security-policy: {policy}\r\nreferrer-policy: no-referrer\r\ncache-control: no-store\r\n"
    return text, headers.encode()


def _digests(text: bytes, tag: bytes) -> str:
    found = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), text, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in found)
