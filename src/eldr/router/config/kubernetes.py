"""The addresses that stand for pods: which ones of a namespace of Kubernetes, and which of their ports."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote

from eldr.router.config.endpoint import RANKS, UrlError, worker_url

# The prefix of a URL that stands for pods.
KUBERNETES = "k8s+"
EXPECTED = (
    "expected k8s+http://NAMESPACE?selector=LABELS&port=PORT, such as k8s+http://moe?selector=role=decode&port=8000, "
    "or k8s+http://NAMESPACE/inferencepools/NAME"
)

# Names as in RFC 1123, section 2.1: of namespaces, and of other objects.
LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
NAMESPACE = re.compile(LABEL)
NAME = re.compile(rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*")
# A port's number or its name, which has a letter (RFC 6335, section 5.1).
PORT = re.compile(r"[1-9][0-9]{0,4}|(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")
# Label selectors, as kubectl's -l takes them.
_VALUE = r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?"
_KEY = rf"({LABEL}(\.{LABEL})*/)?[A-Za-z0-9]([A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?"
_ONE_OF = rf"\s+(in|notin)\s*\(\s*{_VALUE}\s*(,\s*{_VALUE}\s*)*\)"
_REQUIREMENT = rf"\s*(!\s*{_KEY}|{_KEY}(\s*(==?|!=)\s*{_VALUE}|{_ONE_OF})?)\s*"
SELECTOR = re.compile(f"{_REQUIREMENT}(,{_REQUIREMENT})*")
# One label with its value, as objects have them.
LABELLED = re.compile(f"{_KEY}={_VALUE}")


@dataclass(frozen=True, slots=True)
class KubernetesAddress:
    """Which pods are workers, and under which URLs.

    namespace: empty for the router's own.
    selector: labels of the pods. May be empty if there is a pool, which it narrows down.
    ports: numbers and names; each is a worker of its own. If empty, they are the pool's.
    pool: the name of an InferencePool. Empty if there is none.
    path: what the workers' URLs have behind the port.
    ranks: data-parallel engines behind each URL. 0 if there is one, which needs no rank.
    """

    scheme: str
    namespace: str
    selector: str
    ports: tuple[str, ...]
    pool: str
    path: str
    ranks: int

    def __str__(self) -> str:
        """The normal form, from which `kubernetes_address` makes the same address."""
        query = [f"selector={self.selector}"] if self.selector else []
        query += [f"port={port}" for port in self.ports]
        query += [f"path={quote(self.path)}"] if self.path else []
        pool = f"/inferencepools/{self.pool}" if self.pool else ""
        ranks = f"#dp={self.ranks}" if self.ranks else ""
        return f"{KUBERNETES}{self.scheme}://{self.namespace}{pool}{'?' if query else ''}{'&'.join(query)}{ranks}"

    def worker_urls(self, host: str, port: int) -> frozenset[str]:
        """The URLs of the workers at one port of a pod. host: its IP address."""
        base = f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{port}{self.path}"
        return frozenset(f"{base}#rank={rank}" for rank in range(self.ranks)) if self.ranks else frozenset((base,))


def kubernetes_address(text: str) -> KubernetesAddress:
    """Read an address that begins with k8s+. Raises UrlError, which says what it lacks."""

    def problem(what: str) -> UrlError:
        return UrlError(f"{text!r}: {what}; {EXPECTED}")

    base, mark, fragment = text.removeprefix(KUBERNETES).partition("#")
    base, _, query = base.partition("?")
    scheme, separator, rest = base.partition("://")
    if scheme not in ("http", "https") or not separator:
        raise problem("this is no address of pods")
    namespace, _, of = rest.partition("/")
    if namespace and not NAMESPACE.fullmatch(namespace):
        raise problem(f"{namespace!r} is no namespace")
    kind, _, pool = of.partition("/")
    if of and (kind != "inferencepools" or not NAME.fullmatch(pool)):
        raise problem(f"/{of} is not /inferencepools/NAME; the workers' own path is given as path=/PATH")
    ranks = RANKS.fullmatch(fragment)
    if mark and ranks is None:
        raise problem("what follows # is not dp=N")
    selector, ports, path = _query(query, problem)
    if not (selector or pool):
        raise problem("no selector says which pods")
    if not (ports or pool):
        raise problem("no port says where the pods listen")
    return KubernetesAddress(scheme, namespace, selector, ports, pool, path, int(ranks[1]) if ranks else 0)


def _query(query: str, problem: Callable[[str], UrlError]) -> tuple[str, tuple[str, ...], str]:
    """The selector, the ports and the path in the query of an address."""
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=100) if query else []
    except ValueError:
        raise problem("its query cannot be read") from None
    one: dict[str, str] = {}
    ports: list[str] = []
    for key, value in given:
        if key == "port":
            if not PORT.fullmatch(value) or (value.isdecimal() and int(value) > 65535) or value in ports:
                raise problem(f"{value!r} is no port, or is there twice")
            ports.append(value)
        elif key not in ("selector", "path") or key in one:
            raise problem(f"{key!r} is no part of an address, or is there twice")
        else:
            one[key] = value.strip()
    selector, path = one.get("selector", ""), one.get("path", "")
    if "selector" in one and not SELECTOR.fullmatch(selector):
        raise problem(f"{selector!r} is no label selector")
    if "path" in one:
        if not path.startswith("/"):
            raise problem(f"the path {path!r} does not begin with /")
        path = worker_url(f"http://pod:1{path}").removeprefix("http://pod:1")
    return selector, tuple(ports), path
