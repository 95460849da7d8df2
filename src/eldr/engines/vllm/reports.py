"""Reports finished requests' experts to the router: a thread of its own posts them, and the engine never waits for it.

`kv_connector_extra_config` has the addresses in `eldr_reports`; see docs/vllm.md. The scheduler's side has the thread.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from eldr.counts import ExpertCounts, encode_counts
from eldr.engines.vllm.support import UnsupportedError

# A child of vLLM's own logger, which writes to the worker's log.
logger = logging.getLogger("vllm.eldr")

KEY = "eldr_reports"
PATH = "/eldr/experts"
VERSION = 1
SHARE = 0.1
MOST_WAITING = 1024
MOST_IN_A_BATCH = 64
INTERVAL_S = 1.0
TIMEOUT_S = 5.0
WARN_INTERVAL_S = 60.0
SENT, DROPPED, FAILED, INCOMPLETE = OUTCOMES = ("sent", "dropped", "failed", "incomplete")


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Where reports go. urls: the routers. key: of reports. share: of the requests, how many are reported."""

    urls: tuple[str, ...]
    key: str
    share: float


def report_options(extra: Mapping[str, Any]) -> ReportOptions | None:
    """Read `eldr_reports` of kv_connector_extra_config. None if there is none. Raises UnsupportedError."""
    given = extra.get(KEY)
    if given is None:
        return None
    known = ("urls", "key_file", "share")
    if not isinstance(given, Mapping) or not set(given) <= set(known):
        raise UnsupportedError(f"{KEY} is {given!r}, expected an object with {', '.join(known)}")
    urls, share = given.get("urls"), given.get("share", SHARE)
    if not isinstance(urls, Sequence) or isinstance(urls, str) or not urls or not all(map(_is_url, urls)):
        raise UnsupportedError(f'{KEY}: urls is {urls!r}, expected a list of routers, such as ["http://router:8000"]')
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise UnsupportedError(f"{KEY}: share is {share!r}, expected a number above 0, and at most 1")
    path = given.get("key_file")
    if not isinstance(path, str):
        raise UnsupportedError(f"{KEY}: key_file is {path!r}, expected the file with the router's report key")
    try:
        key = Path(path).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedError(f"{KEY}: the key file {path} cannot be read: {error}") from None
    if not key or not key.isprintable() or " " in key:
        raise UnsupportedError(f"{KEY}: the key file {path} must have one line with a key of visible ASCII characters")
    return ReportOptions(tuple(url.rstrip("/") for url in urls), key, float(share))


def _is_url(text: object) -> bool:
    return isinstance(text, str) and _split(text) is not None


def _split(text: str) -> SplitResult | None:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return None
    return parts if usable and not parts.query and not parts.fragment and parts.username is None else None


class Reporter:
    """Sends what it is given. Of a router that is slow or gone, the oldest reports are dropped.

    `put`, `incomplete` and `take_outcomes` never block.
    """

    def __init__(self, options: ReportOptions) -> None:
        self._options = options
        self._below = int(options.share * 2**32)
        self._waiting: deque[tuple[str, ExpertCounts]] = deque()
        self._outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._some = threading.Event()
        self._warned_s = -WARN_INTERVAL_S
        # As a daemon it does not keep an engine that ends.
        self._thread = threading.Thread(target=self._run, name="eldr-reports", daemon=True)
        self._thread.start()

    def draws(self, request_id: str) -> bool:
        """Whether a request is reported."""
        return zlib.crc32(request_id.encode("utf-8", "replace")) < self._below

    def put(self, request_id: str, counts: ExpertCounts) -> None:
        """Report the experts of a request's decode rows."""
        with self._lock:
            if len(self._waiting) >= MOST_WAITING:
                self._waiting.popleft()
                self._outcomes[DROPPED] += 1
            self._waiting.append((request_id, counts))
        self._some.set()

    def incomplete(self) -> None:
        """A request's rows are not all there, so it is not reported."""
        with self._lock:
            self._outcomes[INCOMPLETE] += 1

    def take_outcomes(self) -> dict[str, int]:
        """Return how many reports had which outcome since the last call."""
        with self._lock:
            found, self._outcomes = self._outcomes, Counter()
        return dict(found)

    def _run(self) -> None:
        while True:
            self._some.wait()
            batch = self._take()
            sent = False
            for url in self._options.urls:
                sent |= self._post(url, batch)
            with self._lock:
                self._outcomes[SENT if sent else FAILED] += len(batch)
            time.sleep(INTERVAL_S)

    def _take(self) -> list[tuple[str, ExpertCounts]]:
        with self._lock:
            batch = [self._waiting.popleft() for _ in range(min(MOST_IN_A_BATCH, len(self._waiting)))]
            if not self._waiting:
                self._some.clear()
        return batch

    def _post(self, url: str, batch: list[tuple[str, ExpertCounts]]) -> bool:
        """Post a batch to one router. Returns whether it took the batch, whatever it thinks of the reports."""
        try:
            reports = [{"id": request_id, "counts": encode_counts(counts)} for request_id, counts in batch]
            body = json.dumps({"v": VERSION, "reports": reports}, separators=(",", ":")).encode()
            status = self._send(url, body)
            if status == 200:
                return True
            why: object = f"it answered {status}"
        except Exception as error:  # whatever it is, it must not end the thread
            why = error or type(error).__name__
        if time.monotonic() - self._warned_s >= WARN_INTERVAL_S:
            self._warned_s = time.monotonic()
            logger.warning("eldr cannot report finished requests' experts to %s: %s", url, why)
        return False

    def _send(self, url: str, body: bytes) -> int:
        """Send one request, on a connection of its own, and return the status. No proxy and no redirect is followed."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._options.key}"}
        try:
            connection.request("POST", parts.path + PATH, body, headers)
            return connection.getresponse().status
        finally:
            connection.close()
