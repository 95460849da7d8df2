"""Learning while the router serves: from bodies to signatures, over restarts, and what it must not disturb."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import weakref
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eldr.cli.main import main
from eldr.counts import CountsError, ExpertCounts, encode_counts
from eldr.learning.kept import Kept, load_kept
from eldr.learning.learner import FIRST, Learner
from eldr.learning.lessons import Asked, Lesson
from eldr.policies import make_policy
from eldr.policies.base import DecodeRequest
from eldr.policies.expected_union import ExpectedUnion
from eldr.prompt.fit import fit_prompt_model
from eldr.prompt.model import PromptModel
from eldr.prompt.words import Words, words_of_text, words_of_tokens
from eldr.router.api.metrics import FRESH_PER_S
from eldr.router.observe.counters import Metrics
from eldr.router.placement.learning import MOST_EXPECTED, MOST_EXPECTED_COUNTS, MOST_EXPECTED_WORDS, Learning
from tests.router.fake_worker import CHAT, EXPERTS, LAYERS, MESSAGES, RESPONSES, TOP_K, FakeWorker, Seen
from tests.router.harness import ASK, Setup, bearer, on_uvloop, running, until

KINDS = ("code loop return", "law court judge", "poem rose moon", "math sum prime")
BY_WORDS = {"reason": "expected_union_prompt"}


def counts_of(kind: int, tokens: int = 16) -> ExpertCounts:
    """Two experts for each kind."""
    counts = np.zeros((LAYERS, EXPERTS), np.uint32)
    counts[:, [2 * kind, 2 * kind + 1]] = tokens
    return ExpertCounts(counts, tokens, TOP_K)


def prompt_of(number: int) -> str:
    kind = KINDS[number % len(KINDS)].split()
    return f"{kind[number % 3]} about {kind[number // 3 % 3]} {number}"


def kind_of(text: str) -> int:
    return next(kind for kind, words in enumerate(KINDS) if any(word in text for word in words.split()))


async def by_kind(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Prompts use the experts of their kind."""
    worker.counts = encode_counts(counts_of(kind_of(str(seen.body["prompt"]))))
    await worker.answer(seen, writer)


def counting(s: Setup) -> None:
    for worker in s.prefill:
        worker.behaviour = by_kind


async def ask(s: Setup, count: int, first: int = 0) -> None:
    bodies = ({**ASK, "prompt": prompt_of(number)} for number in range(first, first + count))
    answers = await asyncio.gather(*(s.post(body) for body in bodies))
    assert [answer.status for answer in answers] == [200] * count


async def by_words(s: Setup) -> float:
    return await s.metric("eldr_decisions_total", **BY_WORDS)


async def until_fits(s: Setup, outcome: str, count: float = 1) -> None:
    async with asyncio.timeout(40):
        while await s.metric("eldr_learning_fits_total", outcome=outcome) < count:
            await asyncio.sleep(1.5 / FRESH_PER_S)  # what is asked more often is told the same again


def save_fitted(folder: Path) -> Path:
    """What a router before this one has learned. Token ids 7 and 8 are words that it knows as well."""
    prompts = [words_of_text(prompt_of(number).encode()) for number in range(40)]
    kinds = [number % len(KINDS) for number in range(40)]
    for number in range(20):
        ids = json.dumps([7, 7, number] if number % 2 else [8, 8, number]).encode()
        prompts.append(words_of_tokens(ids, 0, len(ids)))
        kinds.append(number % 2)
    profiles = np.stack([(counts_of(kind).counts > 0).reshape(-1) for kind in kinds]).astype(np.float32)
    (folder / "seen").mkdir(exist_ok=True)
    path = folder / "seen" / "tiny-50b897c9.npz"
    Kept(fit_prompt_model(prompts, profiles, LAYERS, TOP_K), None).save(path)
    return path


def learned_prompts(path: Path) -> PromptModel:
    model = load_kept(path).prompts
    assert model is not None
    return model


def test_the_words_of_prompts_are_learned_kept_and_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, folder = tmp_path / "decisions.jsonl", tmp_path / "not there yet"
    settings: dict[str, Any] = {"signature": "prompt", "learned_dir": folder, "decision_log": log}

    @on_uvloop
    async def serve() -> None:
        async with running(1, 2, "expected-union", counting, **settings) as s:
            await ask(s, FIRST + 8)
            assert await by_words(s) == 0
            await until_fits(s, "adopted")
            assert await s.metric("eldr_prompt_model_r2") > 0.3
            assert await s.metric("eldr_learning_fit_duration_seconds") > 0
            await ask(s, 20, first=100)
            assert await by_words(s) == 20
            await until(lambda: list(folder.glob("*.npz")), "it is kept")

    @on_uvloop
    async def serve_again() -> None:
        async with running(1, 2, "expected-union", counting, **settings) as s:
            await ask(s, 5)
            assert await by_words(s) == 5
            assert await s.metric("eldr_policy_errors_total") == 0

    serve()
    (file,) = folder.iterdir()
    assert file.name.startswith("tiny-")
    assert learned_prompts(file).profiles.top_k == TOP_K
    serve_again()
    text = log.read_text()
    assert not any(word in text for words in KINDS for word in words.split())
    assert text.count('"event":"learned"') + text.count('"event": "learned"') >= 2
    assert main(["decisions", str(log), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decisions"] == FIRST + 8 + 20 + 5


@on_uvloop
async def test_a_damaged_file_is_said_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_fitted(tmp_path)
    damaged = path.read_bytes()[:-100]
    path.write_bytes(damaged)
    settings: dict[str, Any] = {"signature": "prompt", "learned_dir": path.parent}
    async with running(1, 2, "expected-union", counting, **settings) as s:
        await ask(s, 3)
        assert await by_words(s) == 0
        assert "what was learned before is not used: learned models" in caplog.text
        await ask(s, FIRST, first=50)
        await until_fits(s, "adopted")
        await until(lambda: path.read_bytes() != damaged, "another one takes its place")
    assert learned_prompts(path).requests >= FIRST


@on_uvloop
async def test_a_model_with_an_odd_name_can_be_kept(tmp_path: Path) -> None:
    def rename(s: Setup) -> None:
        counting(s)
        for worker in (*s.prefill, *s.decode):
            worker.model = "../" + "n" * 300 + "/é"

    settings: dict[str, Any] = {"signature": "prompt", "learned_dir": tmp_path / "kept"}
    async with running(1, 1, "expected-union", rename, **settings) as s:
        model = s.prefill[0].model
        bodies = ({**ASK, "model": model, "prompt": prompt_of(number)} for number in range(FIRST))
        assert {answer.status for answer in await asyncio.gather(*(s.post(body) for body in bodies))} == {200}
        await until_fits(s, "adopted")
        await until(lambda: (tmp_path / "kept").exists() and list((tmp_path / "kept").glob("*.npz")), "it is kept")


@on_uvloop
async def test_all_forms_of_a_prompt_are_known_by_their_words(tmp_path: Path) -> None:
    path = save_fitted(tmp_path)
    user = [{"role": "user", "content": "a poem about the moon"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "the law"}, {"type": "text", "text": "a court"}]}]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {**ASK, "prompt": "return the loop"}),
        ("/v1/completions", {**ASK, "prompt": ["return the loop"]}),
        ("/v1/completions", {**ASK, "prompt": [7, 7, 12]}),
        ("/v1/completions", {**ASK, "prompt": [[8, 8, 12]]}),
        (CHAT, {"model": "tiny", "messages": [{"role": "system", "content": "be brief"}, *user]}),
        (CHAT, {"model": "tiny", "messages": parts, "stream": True}),
        (RESPONSES, {"model": "tiny", "input": "sum of primes: math"}),
        (
            RESPONSES,
            {"model": "tiny", "input": [{"role": "user", "content": [{"type": "input_text", "text": "math"}]}]},
        ),
        (MESSAGES, {"model": "tiny", "max_tokens": 3, "system": "be brief", "messages": user}),
        (MESSAGES, {"model": "tiny", "max_tokens": 3, "messages": parts}),
    ]
    settings: dict[str, Any] = {"signature": "prompt", "learned_dir": path.parent, "learn": "online"}
    async with running(1, 2, "expected-union", **settings) as s:
        for number, (where, body) in enumerate(bodies, 1):
            answer = await s.post(body, where)
            assert answer.status == 200, answer.body
            assert await by_words(s) == number, body
        before = await by_words(s)
        for prompt in ("zzz", " ", [123456], "\ud800"):
            await s.post({**ASK, "prompt": prompt})
        assert await by_words(s) == before, "nothing is known of these"
        assert await s.metric("eldr_policy_errors_total") == 0


@on_uvloop
async def test_counts_come_first_where_both_may_be_used(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learned_dir": save_fitted(tmp_path).parent}
    async with running(1, 2, "expected-union", counting, signature="auto", **settings) as s:
        await ask(s, 4)
        assert await by_words(s) == 0
        assert await s.metric("eldr_decisions_total", reason="expected_union") == 4
        s.prefill[0].behaviour, s.prefill[0].counts = None, None
        await ask(s, 4, first=10)
        assert await by_words(s) == 4


@on_uvloop
async def test_a_fitting_process_that_is_killed_costs_one_fit() -> None:
    async with running(1, 2, "expected-union", counting, signature="prompt") as s:
        await ask(s, FIRST)
        await until(active_children, "a fit has begun")
        (child,) = active_children()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await until_fits(s, "failed")
        assert (await s.post({**ASK, "prompt": prompt_of(3)})).status == 200
        await ask(s, 2 * FIRST, first=100)
        await until_fits(s, "adopted")
        await ask(s, 3, first=200)
        assert await by_words(s) == 3
    await until(lambda: not active_children(), "the process ends with the router")


@on_uvloop
async def test_nothing_is_learned_where_that_is_off_or_words_are_not_used() -> None:
    off: list[dict[str, Any]] = [{"learn": "off", "signature": "prompt"}, {"signature": "counts"}]
    for settings in off:
        async with running(1, 1, "expected-union", counting, **settings) as s:
            await ask(s, FIRST)
            await asyncio.sleep(1.5)  # it looks once a second
            assert await s.metric("eldr_learning_fits_total") == 0
            assert not active_children()


@on_uvloop
async def test_a_running_stream_holds_no_words() -> None:
    """They are forgotten once a request runs, before its first token."""
    gc.collect()
    before = sum(isinstance(each, Words) for each in gc.get_objects())
    async with running(1, 1, "expected-union", signature="prompt", learn="off") as s:
        s.decode[0].token_gap_s = 0.3
        task = asyncio.ensure_future(s.post({**ASK, "prompt": "many words " * 1000, "stream": True}))
        await until(lambda: s.decode[0].generated, "the decode leg runs")
        gc.collect()
        assert sum(isinstance(each, Words) for each in gc.get_objects()) == before
        assert (await task).status == 200


# What is learned about counts.


async def report_decodes(s: Setup, names: dict[str, int]) -> None:
    """The decode workers say that requests of a kind use the experts of the next one as much as those of their own."""
    reports = []
    for name, kind in names.items():
        counts = np.zeros((LAYERS, EXPERTS), np.uint32)
        both = [2 * kind, 2 * kind + 1, (2 * kind + 2) % EXPERTS, (2 * kind + 3) % EXPERTS]
        counts[:, both] = 8
        reports.append({"id": f"cmpl-{name}-0-0123abcd", "counts": encode_counts(ExpertCounts(counts, 16, TOP_K))})
    for first in range(0, len(reports), 8):
        body = {"v": 1, "reports": reports[first : first + 8]}
        answer = await s.post(body, "/eldr/experts", headers=bearer("key"))
        assert answer.status == 200, answer.body


async def ask_and_report(s: Setup, count: int, first: int = 0) -> None:
    names = {f"c{number}": number % len(KINDS) for number in range(first, first + count)}
    for number, name in enumerate(names, first):
        answer = await s.post({**ASK, "prompt": prompt_of(number), "max_tokens": 32}, headers={"x-request-id": name})
        assert answer.status == 200
    await report_decodes(s, names)


def test_corrections_of_counts_are_learned_kept_and_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, folder = tmp_path / "decisions.jsonl", tmp_path / "learned"
    (tmp_path / "key").write_text("key")
    settings: dict[str, Any] = {
        "learned_dir": folder,
        "decision_log": log,
        "report_key_file": tmp_path / "key",
        "signature": "counts",
    }

    @on_uvloop
    async def serve() -> None:
        async with running(1, 2, "expected-union", counting, **settings) as s:
            await ask_and_report(s, FIRST + 8)
            await until_fits(s, "adopted")
            assert 0 < await s.metric("eldr_activation_trust") <= 1
            await ask(s, 8, first=100)
            await until(lambda: list(folder.glob("*.npz")), "it is kept")

    @on_uvloop
    async def serve_again() -> None:
        async with running(1, 2, "expected-union", counting, **settings) as s:
            await ask(s, 5)
            assert await s.metric("eldr_policy_errors_total") == 0
            assert await s.metric("eldr_decisions_total", reason="expected_union") == 5

    serve()
    (file,) = folder.iterdir()
    kept = load_kept(file)
    assert kept.prompts is None
    assert kept.activation is not None
    assert kept.geometry == (LAYERS, EXPERTS, TOP_K)
    serve_again()
    learned = [json.loads(line) for line in log.read_text().splitlines() if '"learned"' in line]
    assert len(learned) >= 2, "what was kept is an event of the second run's log"
    assert all(event["activation"] is not None for event in learned)
    assert main(["decisions", str(log), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decisions"] == FIRST + 8 + 8 + 5


@on_uvloop
async def test_nothing_is_kept_of_counts_where_nobody_reports() -> None:
    async with running(1, 1, "expected-union", counting, signature="counts") as s:
        await ask(s, FIRST)
        await asyncio.sleep(1.5)
        assert await s.metric("eldr_learning_fits_total") == 0
        assert not active_children()


# The learning itself, without a router around it.


def make_learning() -> Learning:
    return Learning(ExpectedUnion(signature="prompt"), Learner(), Metrics(), None)


def request(name: str, words: Words | None = None, counts: ExpertCounts | None = None) -> DecodeRequest:
    return DecodeRequest(name, 16, counts, words=words_of_text(b"a few words") if words is None else words)


def taken(learning: Learning) -> int:
    lessons = learning.learner.lessons
    return 0 if lessons is None else lessons.taken


def test_prompts_are_learned_from_until_decodes_are_reported() -> None:
    learning = make_learning()
    learning.placed(request("1", counts=counts_of(0)))
    learning.placed(request("2"))
    assert taken(learning) == 1
    learning.report("2", counts_of(1))
    learning.placed(request("3", counts=counts_of(0)))
    assert taken(learning) == 2, "the experts of decodes are better lessons"
    learning.report("3", counts_of(1))
    assert taken(learning) == 3


def test_a_report_counts_once_and_only_for_a_request_that_was_placed() -> None:
    learning = make_learning()
    learning.report("unknown", counts_of(0))
    assert not learning.expects("unknown")
    learning.placed(request("1"))
    learning.placed(DecodeRequest("2", 16))
    learning.placed(request("3", words_of_text(b"")))
    for _ in range(2):
        for name in ("1", "2", "3"):
            learning.report(name, counts_of(0))
    assert taken(learning) == 1


def test_a_short_answer_says_nothing_and_is_no_fault() -> None:
    learning = make_learning()
    learning.placed(request("1"))
    learning.report("1", counts_of(0, tokens=3))
    assert taken(learning) == 0


def test_reports_that_no_rows_can_have_are_refused() -> None:
    learning = make_learning()
    often, rarely = counts_of(0).counts.copy(), counts_of(0).counts.copy()
    often[:, :2] = 31, 1
    rarely[0, 0] -= 1
    for name, counts in (("1", often), ("2", rarely)):
        learning.placed(request(name))
        with pytest.raises(CountsError):
            learning.report(name, ExpertCounts(counts, 16, TOP_K))
    assert taken(learning) == 0


def test_experts_of_another_model_are_refused_and_what_to_do_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the model behind a name has changed since the last run."""
    path = save_fitted(tmp_path)
    learning = Learning(ExpectedUnion(signature="prompt"), Learner(learned_prompts(path)), Metrics(), path)
    for name in ("1", "2", "3"):
        learning.placed(request(name))
    learning.report("1", counts_of(0))
    for name in ("2", "3"):
        with pytest.raises(CountsError, match="another model"):
            learning.report(name, ExpertCounts(np.full((1, 4), 8, np.uint32), 16, 2))
    assert taken(learning) == 1
    assert caplog.text.count("which is not what was learned from before") == 1
    assert f"if the model has changed, remove {path} and start anew" in caplog.text


def test_another_routers_lesson_of_another_model_keeps_no_report_out() -> None:
    learning = make_learning()
    words = request("1").words
    learning.learner.add(Lesson(1, 4, 2, Asked(words), np.zeros(4, dtype=np.uint8)))
    learning.placed(request("1"))
    learning.report("1", counts_of(0))
    assert taken(learning) == 1


def test_requests_that_are_never_reported_are_forgotten() -> None:
    learning = make_learning()
    for number in range(MOST_EXPECTED + 5):
        learning.placed(request(str(number)))
    for number in range(MOST_EXPECTED + 5):
        learning.report(str(number), counts_of(0))
    assert taken(learning) == MOST_EXPECTED


def test_the_words_that_wait_for_reports_are_bounded_however_long_prompts_are() -> None:
    learning = make_learning()
    given = []
    for number in range(200):
        buckets = np.arange(65536, dtype=np.uint16)
        given.append(weakref.ref(buckets))
        learning.placed(request(str(number), Words(buckets, np.ones(65536, np.uint16))))
        del buckets
    assert sum(buckets() is not None for buckets in given) == MOST_EXPECTED_WORDS // 65536
    learning.report("199", counts_of(0))
    learning.report("0", counts_of(0))
    assert taken(learning) == 1


def test_the_counts_that_wait_for_reports_are_a_bounded_sample() -> None:
    learning = Learning(ExpectedUnion(signature="counts"), Learner(words=False), Metrics(), None)

    def place(name: str) -> None:
        learning.placed(DecodeRequest(name, 16, counts_of(0)))

    for number in range(MOST_EXPECTED_COUNTS + 5):
        place(str(number))
    assert learning.expects("0")
    assert not learning.expects(str(MOST_EXPECTED_COUNTS))
    learning.report("0", counts_of(0))
    place("one more")
    assert learning.expects("one more")
    assert taken(learning) == 1


def test_counts_are_not_kept_for_a_policy_that_uses_them_as_they_are() -> None:
    learning = Learning(make_policy("jsq"), Learner(), Metrics(), None)
    learning.placed(DecodeRequest("1", 16, counts_of(0)))
    assert not learning.expects("1")
