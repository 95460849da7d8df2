"""The admin API, on an address of its own: show the fleet, add workers, drain them and remove them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import orjson

from eldr.router.api.ui.page import TYPE, page
from eldr.router.api.ui.state import UiState
from eldr.router.api.whole import Whole, all_states, all_workers
from eldr.router.config.endpoint import ROLES, Endpoint, Role, UrlError, leg_of, why_no_endpoint, worker_url
from eldr.router.fleet.membership import Membership, MembershipError
from eldr.router.fleet.workers import Worker
from eldr.router.http.admin_key import AdminKey
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import Request
from eldr.router.http.server import ClientConnection
from eldr.router.protocols.openai import json_object

SOURCE = "admin"
PAGE = b"/ui"
STATE = b"/ui/state"
WORKERS = b"/admin/workers"
# What the processes of a router tell each other: a request that changes the fleet.
CHANGE = b"change"


class AdminApi:
    """Answers admin requests. It is a handler of `ClientConnection`.

    Every request needs the admin key, except the one for the page. The page contains no data about the fleet. It asks
    for the key and fetches the data with it.

    ui: the data that the page shows.
    whole: all processes of this router. What one is told, all do.
    behind_gateway: whether a gateway must be able to send requests to workers that join.
    """

    def __init__(
        self, membership: Membership, key: AdminKey, ui: UiState, whole: Whole, behind_gateway: bool = False
    ) -> None:
        self._behind_gateway = behind_gateway
        self._ui = ui
        self._whole = whole
        if whole.siblings is not None:
            whole.siblings.answers[STATE] = lambda details: ui.json()
            whole.siblings.answers[WORKERS] = lambda details: orjson.dumps(self._workers())
            whole.siblings.heard[CHANGE] = self._changed_elsewhere
            membership.came_back = self._came_back
        self.connections: set[ClientConnection] = set()
        self.closing = False
        self._membership = membership
        self._key = key
        self._routes: dict[bytes, dict[bytes, Callable[[dict[str, Any]], tuple[int, object]]]] = {
            WORKERS: {b"POST": self._join, b"DELETE": self._remove},
            b"/admin/drain": {b"POST": self._drain},
        }

    def refused(self, error: ApiError) -> None:
        """Nothing is counted here, because the router's metrics are about its clients."""

    def answer_lines(self, headers: dict[bytes, bytes]) -> bytes:
        """None: the page at /ui and the data that it fetches have the same origin."""
        return b""

    def permit(self, method: bytes, path: bytes, headers: dict[bytes, bytes]) -> str:
        if path != PAGE and not self._key.is_in(headers):
            raise ApiError(401, "the admin API needs its key, as Authorization: Bearer KEY (see --admin-key-file)")
        return "admin"

    def handle(self, request: Request, exchange: ClientExchange) -> None:
        if request.method == b"GET" and request.path == PAGE:
            text, headers = page()
            exchange.respond(200, text, TYPE, headers)
            return
        if request.method == b"GET" and request.path == STATE:
            self._whole.gather(
                STATE,
                b"",
                self._ui.json(),
                lambda states: exchange.respond(200, all_states(states), extra=b"cache-control: no-store\r\n"),
            )
            return
        if request.method == b"GET" and request.path == WORKERS:
            self._list(exchange)
            return
        try:
            status, answer = self._answer(request)
        except ApiError as error:
            exchange.respond_error(error)
        else:
            exchange.respond(status, orjson.dumps(answer))
            self._tell(request, answer)

    def _tell(self, request: Request, answer: object) -> None:
        """Let the other processes do the same, and those that start later."""
        siblings = self._whole.siblings
        if siblings is not None and isinstance(answer, dict):
            topic = _topic(answer["role"], answer["url"])
            siblings.keep(CHANGE, topic, b" ".join((request.method, request.path, request.body)))

    def _came_back(self, endpoint: Endpoint) -> None:
        """A source names a worker anew. Whoever starts later finds it there, and must not let it go again."""
        assert self._whole.siblings is not None
        for role in ROLES:
            if leg_of(role) == leg_of(endpoint.role):
                self._whole.siblings.forget(_topic(role, endpoint.url))

    def _changed_elsewhere(self, change: bytes) -> None:
        """Another process was told something. Here it may be so already."""
        method, path, body = change.split(b" ", 2)
        with contextlib.suppress(ApiError):
            self._act(method, path, body)

    def _answer(self, request: Request) -> tuple[int, object]:
        methods = self._routes.get(request.path)
        if methods is None:
            raise ApiError(404, "Not Found: the endpoints are " + ", ".join(map(bytes.decode, (PAGE, *self._routes))))
        if request.method not in methods:
            allowed = [*([b"GET"] if request.path == WORKERS else []), *methods]
            raise ApiError(405, "Method Not Allowed: use " + ", ".join(map(bytes.decode, allowed)))
        return self._act(request.method, request.path, request.body)

    def _act(self, method: bytes, path: bytes, body: bytes) -> tuple[int, object]:
        """Raises ApiError."""
        try:
            return self._routes[path][method](json_object(body))
        except UrlError as error:
            raise ApiError(400, str(error), param="url") from None

    def _workers(self) -> list[dict[str, Any]]:
        return [describe(worker) for worker in self._membership.workers()]

    def _list(self, exchange: ClientExchange) -> None:
        def finish(answers: list[bytes]) -> None:
            workers = all_workers([orjson.loads(answer) for answer in answers])
            exchange.respond(200, orjson.dumps({"workers": workers}))

        self._whole.gather(WORKERS, b"", orjson.dumps(self._workers()), finish)

    def _join(self, fields: dict[str, Any]) -> tuple[int, object]:
        """Add a worker. Returns 202: it is probed first, and listed as joining until it is up."""
        _only(fields, "url", "role")
        role = _role(fields)
        if role is None:
            raise _no_role()
        url = _url(fields)
        why_not = why_no_endpoint(url) if self._behind_gateway else None
        if why_not is not None:
            raise ApiError(400, f"{url}: {why_not}", param="url")
        try:
            worker = self._membership.join(Endpoint(url, role), SOURCE)
        except MembershipError as error:
            raise ApiError(409, str(error), param="url") from None
        return 202, describe(worker)

    def _remove(self, fields: dict[str, Any]) -> tuple[int, object]:
        """Remove a worker at once. Its running requests are cut off."""
        _only(fields, "url", "role")
        return self._let_go(fields, 0.0)

    def _drain(self, fields: dict[str, Any]) -> tuple[int, object]:
        """Stop sending requests to a worker. It leaves once its running requests have ended, or after timeout_s."""
        _only(fields, "url", "role", "timeout_s")
        timeout_s = fields.get("timeout_s")
        if timeout_s is not None and (type(timeout_s) not in (int, float) or not 0 <= timeout_s < math.inf):
            raise ApiError(400, "timeout_s must be a number of seconds, 0 or more", param="timeout_s")
        return self._let_go(fields, timeout_s)

    def _let_go(self, fields: dict[str, Any], timeout_s: float | None) -> tuple[int, object]:
        try:
            worker = self._membership.worker(_url(fields), _role(fields))
        except MembershipError as error:
            raise ApiError(404, str(error), param="url") from None
        self._membership.drain(worker, timeout_s)
        return 202, describe(worker)


def describe(worker: Worker) -> dict[str, Any]:
    """Return a worker as the API shows it."""
    return {
        "url": worker.url,
        "role": worker.role,
        "state": worker.state,
        "problem": worker.problem,
        "source": worker.source,
        "in_flight": worker.in_flight,
        "elsewhere": worker.elsewhere,
        "max_inflight": worker.max_inflight if worker.leg == "decode" else None,
        "waiting": None if worker.load is None else worker.load[0],
        "kv_usage": None if worker.load is None else worker.load[1],
        "models": None if worker.models is None else sorted(worker.models),
    }


def _topic(role: str, url: str) -> bytes:
    """What a change is about. Of each, those that start later are told the last."""
    return f"{role} {url}".encode()


def _only(fields: dict[str, Any], *known: str) -> None:
    for name in fields:
        if name not in known:
            raise ApiError(400, f"unknown field {name!r}; the fields are {', '.join(known)}", param=name)


def _url(fields: dict[str, Any]) -> str:
    url = fields.get("url")
    if not isinstance(url, str):
        raise ApiError(400, "url must be a worker's URL, such as http://10.0.0.1:8000", param="url")
    return worker_url(url)


def _role(fields: dict[str, Any]) -> Role | None:
    role = fields.get("role")
    if role not in (None, *ROLES):
        raise _no_role()
    return role


def _no_role() -> ApiError:
    return ApiError(400, f"role must be one of {', '.join(ROLES)}", param="role")
