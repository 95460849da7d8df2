"""The experiment on other texts in a prompt, on a made-up trace whose prompts tell its kinds apart."""

import numpy as np
import pytest

from eldr.evaluate import prompt_texts
from eldr.evaluate.bench import Bench
from eldr.evaluate.results import rounded
from eldr.prompt.words import words_of_text
from eldr.report.evaluation.prompt_texts import texts_section
from eldr.trace import write_trace
from tests.synthetic import make_trace, prompts_of_kinds


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("traces") / "spoken.npz"
    write_trace(make_trace(requests=160, experts=32, kinds=4, steps=200, seed=3, **prompts_of_kinds(160, 4)), path)
    return Bench(path, seeds=4, requests=300)


def test_instructions_are_plain_text_of_the_size_asked_for() -> None:
    one, other = prompt_texts.instructions(2000, 0), prompt_texts.instructions(2000, 1)
    assert len(one) == len(other) == 2000
    assert one.isascii()
    assert one.endswith(b"\n\n")
    assert one == prompt_texts.instructions(2000, 0)
    assert one != other
    assert prompt_texts.instructions(8000, 0)[:1900] == one[:1900], "a longer one goes on"


def test_each_prompt_is_in_its_text(bench: Bench) -> None:
    trace = bench.trace
    split = bench.laboratory.split(0)
    sides = (split.calibrate, split.serve)
    side_of = {request: set(side.tolist()) for side in sides for request in side.tolist()}
    sizes = {"plain": 0, "same-2": 2000, "same-8": 8000, "groups-8": 8000, "behind-2": 2002}
    for name in prompt_texts.TEXTS_OF:
        texts = prompt_texts.texts_of(trace, name, sides, 0)
        for request, text in enumerate(texts):
            own = trace.prompt(request)
            assert text.startswith(own) if name == "behind-2" else text.endswith(own)
            if name in sizes:
                assert len(text) == len(own) + sizes[name]
                continue
            # Kind k's requests are k, k + 4, ...: turns are of the same label, and of the same side of the split.
            *earlier, last = text.split(b"\n\n")
            assert (len(earlier), last) == (prompt_texts.TURNS, own)
            found = [{other for other in range(160) if trace.prompt(other) == turn} for turn in earlier]
            assert all(others & side_of[request] - {request} for others in found)
            if name == "turns-label":
                assert all(any(other % 4 == request % 4 for other in others) for others in found)
    shared = {text[:8000] for text in prompt_texts.texts_of(trace, "groups-8", sides, 0)}
    assert len(shared) == prompt_texts.GROUPS


def test_similar_turns_share_more_words_than_those_of_the_label(bench: Bench) -> None:
    trace = bench.trace
    split = bench.laboratory.split(0)

    def shared(name: str) -> float:
        texts = prompt_texts.texts_of(trace, name, (split.calibrate, split.serve), 0)
        own = [set(words_of_text(trace.prompt(request)).buckets.tolist()) for request in range(160)]
        earlier = [text[: len(text) - len(trace.prompt(request))] for request, text in enumerate(texts)]
        heard = [set(words_of_text(text).buckets.tolist()) for text in earlier]
        return float(np.mean([len(a & b) / len(a) for a, b in zip(own, heard, strict=True)]))

    assert shared("turns-alike") > shared("turns-label")


def test_a_request_is_found_in_a_longer_text(bench: Bench) -> None:
    cases = [("plain", "fitted"), ("same-8", "fitted"), ("same-8", "unknown"), ("turns-label", "fitted")]
    assert all({"text": text, "fit": fit} in prompt_texts.TEXTS.parts(bench) for text, fit in cases)
    rows = [row for text, fit in cases for row in prompt_texts.TEXTS.run(bench, {"text": text, "fit": fit})]
    explained = {(row["text"], row["fit"]): row["explained"] for row in rows}
    assert all(0 < value <= 1 for value in explained.values())
    assert explained["same-8", "unknown"] <= explained["plain", "fitted"] + 0.05
    # Kinds differ strongly and their words tell them apart: what all prompts share takes little away.
    assert all(row["vs_jsq_mean"] < -6 for row in rows if row["fit"] == "fitted")
    section = texts_section(rounded(rows), "spoken")
    assert [cells[1] for cells in section.numbers[0].cells()] == ["yes", "yes", "no", "yes"]
