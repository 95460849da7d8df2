"""What several processes of one router say, put together."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import exposition as classic
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_classic

from eldr.router.api.whole import all_metrics, all_states, all_workers

FORMS: dict[str, tuple[Any, Any]] = {
    "classic": (classic.generate_latest, read_classic),
    "openmetrics": (openmetrics.generate_latest, read_openmetrics),
}


def registry(requests: int, extra: bool) -> CollectorRegistry:
    found = CollectorRegistry()
    counter = Counter("requests", "Requests { of } all.", ["path", "status"], registry=found)
    counter.labels('/v1/"x" y{', "200").inc(requests)
    Gauge("alone", "Without labels.", registry=found).set(requests / 3)
    Histogram("seconds", "A\nhistogram.", registry=found).observe(requests)
    if extra:
        Gauge("extra", "In one process only.", ["worker"], registry=found).labels("http://w").set(1)
    return found


def samples(text: str, read: Any) -> dict[Any, float]:
    """Sample -> value. The standard's own parser also checks that families stand together."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in read(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("form", FORMS)
def test_expositions_of_two_processes(form: str) -> None:
    write, read = FORMS[form]
    texts = [write(registry(7, False)), write(registry(5, True))]
    whole = all_metrics(b'process="%d"\n%b' % each for each in enumerate(texts))
    wanted = {
        (name, *sorted([*labels, ("process", str(process))])): value
        for process, text in enumerate(texts)
        for (name, *labels), value in samples(text.decode(), read).items()
    }
    assert samples(whole.decode(), read) == wanted
    families = [family.name for family in read(whole.decode())]
    assert len(families) == len(set(families))


def worker(url: str, in_flight: int, elsewhere: int) -> dict[str, Any]:
    return {"url": url, "role": "decode", "in_flight": in_flight, "elsewhere": elsewhere}


def test_workers_run_the_sum_and_what_is_left_runs_for_other_machines() -> None:
    one = [worker("a", 3, 6), worker("b", 1, 0)]
    other = [worker("b", 0, 1), worker("a", 4, 5), worker("c", 9, 0)]
    assert all_workers([one, other]) == [worker("a", 7, 2), worker("b", 1, 0)]
    assert all_workers([[worker("a", 3, 6)]]) == [worker("a", 3, 6)]


def state(answered: int, at_s: float, reason: int) -> dict[str, Any]:
    return {
        "totals": {"answered": answered},
        "queue": {"admitted": answered, "queued": 1, "slots": 16},
        "histograms": {"ttft": {"bounds": [1, 2], "counts": [answered, 0, 1]}},
        "workers": [worker("a", answered, 9 - answered)],
        "decisions": [{"unix_s": at_s}, {"unix_s": at_s - 10}],
        "reasons": [{"policy": "jsq", "reason": "jsq", "count": reason}],
        "peers": {"reachable": True},
    }


def test_states_of_two_processes() -> None:
    whole = json.loads(all_states([json.dumps(state(4, 100, 2)).encode(), json.dumps(state(5, 105, 3)).encode()]))
    assert whole["totals"] == {"answered": 9}
    assert whole["queue"] == {"admitted": 9, "queued": 2, "slots": 16}
    assert whole["histograms"]["ttft"]["counts"] == [9, 0, 2]
    assert whole["workers"] == [worker("a", 9, 0)]
    assert [each["unix_s"] for each in whole["decisions"]] == [105, 100, 95, 90]
    assert whole["reasons"] == [{"policy": "jsq", "reason": "jsq", "count": 5}]
    assert whole["peers"]["processes"] == 2
