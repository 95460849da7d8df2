"""How many requests and tokens each client may have: token buckets, which this router process keeps in memory.

A bucket holds a limit's worth of units at first and is refilled evenly over its period. A request needs one unit of
each bucket of requests and a positive balance in each bucket of tokens. Its number of tokens is known only at its end,
so an estimate of its prompt is taken at the start, and the difference at the end. A balance may therefore become
negative, by one request of any length and what others generate at the same time. The debt delays the next request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Final

import orjson

from eldr.kernels import JsonObject
from eldr.router.http.errors import ApiError
from eldr.router.http.message import Request
from eldr.router.protocols.openai import USAGE, generated_tokens, prompt_tokens

# What each limit counts, and over how many seconds.
REQUESTS: Final = "requests"
TOKENS: Final = "tokens"
LIMITS: Final[dict[str, tuple[str, float]]] = {
    "requests_per_min": (REQUESTS, 60.0),
    "requests_per_day": (REQUESTS, 86400.0),
    "tokens_per_min": (TOKENS, 60.0),
    "tokens_per_day": (TOKENS, 86400.0),
}
KINDS: Final = (REQUESTS, TOKENS)


class QuotaError(ApiError):
    """The client has used up its quota. The body is that of OpenAI's own rate limits. kind: requests or tokens."""

    def __init__(self, client: str, kind: str, bucket: Bucket, wait_s: float) -> None:
        super().__init__(
            429,
            f"Rate limit reached for {client} on {kind} per {'min' if bucket.period_s == 60 else 'day'}: "
            f"limit {bucket.limit}. Try again in {duration(wait_s)}.",
            retry_after_s=max(1, math.ceil(wait_s)),
        )
        self.kind = kind

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": None, "code": "rate_limit_exceeded"}
        return orjson.dumps({"error": error})


class Bucket:
    """A balance of at most `limit` units, which `limit` units are added to in every `period_s` seconds.

    All times are monotonic, in seconds.
    """

    def __init__(self, limit: int, period_s: float, now_s: float) -> None:
        self.limit = limit
        self.period_s = period_s
        self._balance = float(limit)
        self._at_s = now_s

    def balance(self, now_s: float) -> float:
        """The units that are left. Negative for a debt."""
        if now_s > self._at_s:
            self._balance = min(float(self.limit), self._balance + (now_s - self._at_s) * self.limit / self.period_s)
            self._at_s = now_s
        return self._balance

    def take(self, units: float, now_s: float) -> None:
        """Take units out, more than there are if need be. A negative number puts units back, up to the limit."""
        self._balance = min(float(self.limit), self.balance(now_s) - units)

    def wait_s(self, units: float, now_s: float) -> float:
        """How long until the balance is `units`, if nothing else is taken. 0 if it is."""
        return max(0.0, (units - self.balance(now_s)) * self.period_s / self.limit)


class Quota:
    """The buckets of one client, and what it has used.

    limits: by the names in `LIMITS`, those that it has.
    used: requests that were let in, and tokens, by kind. refused: requests that were refused, by kind.
    """

    def __init__(self, client: str, limits: Mapping[str, int], now_s: float) -> None:
        self.client = client
        self.limits = dict(limits)
        self.used = dict.fromkeys(KINDS, 0)
        self.refused = dict.fromkeys(KINDS, 0)
        self._buckets: dict[str, list[Bucket]] = {kind: [] for kind in KINDS}
        for name, (kind, period_s) in LIMITS.items():
            if name in self.limits:
                self._buckets[kind].append(Bucket(self.limits[name], period_s, now_s))

    def refuse(self, now_s: float) -> QuotaError | None:
        """The error of a request that may not start now, counted as refused. None if it may."""
        worst: QuotaError | None = None
        for kind in KINDS:
            # Of tokens, any positive balance is enough, and a millionth of a token is one.
            needed = 1.0 if kind == REQUESTS else 1e-6
            for bucket in self._buckets[kind]:
                wait_s = bucket.wait_s(needed, now_s)
                if wait_s > 0 and (worst is None or max(1, math.ceil(wait_s)) > (worst.retry_after_s or 0)):
                    worst = QuotaError(self.client, kind, bucket, wait_s)
        if worst is not None:
            self.refused[worst.kind] += 1
        return worst

    def take(self, kind: str, units: int, now_s: float) -> None:
        """Take requests or tokens from their buckets. A negative number gives back what was taken before."""
        for bucket in self._buckets[kind]:
            bucket.take(units, now_s)

    def header_lines(self, now_s: float) -> bytes:
        """OpenAI's header lines about the limits that leave the least."""
        lines = b""
        for kind in KINDS:
            scarcest: Bucket | None = None
            for bucket in self._buckets[kind]:
                if scarcest is None or bucket.balance(now_s) < scarcest.balance(now_s):
                    scarcest = bucket
            if scarcest is not None:
                name, left = kind.encode(), max(0, math.floor(scarcest.balance(now_s)))
                reset = duration(scarcest.wait_s(scarcest.limit, now_s)).encode()
                lines += b"x-ratelimit-limit-%b: %d\r\n" % (name, scarcest.limit)
                lines += b"x-ratelimit-remaining-%b: %d\r\n" % (name, left)
                lines += b"x-ratelimit-reset-%b: %b\r\n" % (name, reset)
        return lines


class Charge:
    """What one request takes from its client's quota.

    prompt_tokens: at first an estimate. generated_tokens: so far. Set both to what is known, and settle once.
    """

    def __init__(self, quota: Quota, prompt_tokens: int) -> None:
        self._quota: Quota | None = quota
        self._taken = prompt_tokens
        self.prompt_tokens = prompt_tokens
        self.generated_tokens = 0

    def know(self, answer: JsonObject) -> None:
        """Take the numbers of tokens from the `usage` of an answer, as far as it states them."""
        usage = answer.inner("usage", USAGE)
        if usage is None:
            return
        self.prompt_tokens = prompt_tokens(usage) or self.prompt_tokens
        generated = generated_tokens(usage)
        if generated is not None:
            self.generated_tokens = generated

    def settle(self, failed: bool) -> None:
        """The request has ended. failed: whether the client got an error, which costs a request, but no tokens."""
        quota, self._quota = self._quota, None
        if quota is not None:
            tokens = 0 if failed else self.prompt_tokens + self.generated_tokens
            quota.used[TOKENS] += tokens
            quota.take(TOKENS, tokens - self._taken, time.monotonic())


class Quotas:
    """The quotas of all clients with a name."""

    def __init__(self) -> None:
        self.clients: dict[str, Quota] = {}

    def adopt(self, limits: Mapping[str, Mapping[str, int]]) -> None:
        """Use these limits, client -> limits by name. A client whose limits stay the same keeps its balances."""
        now_s = time.monotonic()
        clients: dict[str, Quota] = {}
        for client, wanted in limits.items():
            quota = self.clients.get(client)
            if quota is None or quota.limits != wanted:
                changed = Quota(client, wanted, now_s)
                if quota is not None:
                    changed.used, changed.refused = quota.used, quota.refused
                quota = changed
            clients[client] = quota
        self.clients = clients

    def admit(self, request: Request, prompt_tokens: int) -> Charge | None:
        """Let a request in, and write its client's balances into the headers of its answer.

        prompt_tokens: an estimate. Returns None if the client has no name. Raises QuotaError.
        """
        quota = self.clients.get(request.client)
        if quota is None:
            return None
        now_s = time.monotonic()
        error = quota.refuse(now_s)
        if error is None:
            quota.used[REQUESTS] += 1
            quota.take(REQUESTS, 1, now_s)
            quota.take(TOKENS, prompt_tokens, now_s)
        if quota.limits:
            request.answer_lines += quota.header_lines(now_s)
        if error is not None:
            try:
                raise error
            finally:
                del error  # it knows this frame, which knows the body: no cycle
        return Charge(quota, prompt_tokens)


def duration(seconds: float) -> str:
    """A duration as OpenAI's headers write it: 20ms, 7.66s, 6m0s, 23h59m59s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, whole = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{whole}s" if hours else f"{minutes}m{whole}s"
