"""The trace that ships with eldr, from its raw arrays: whole, small, labelled, and with locality to find."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import eldr_small_moe
import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.cli.main import main
from eldr.demo.prompts import make_prompts
from eldr.trace import read_trace
from eldr.workloads.kinds import KINDS

TRACE = Path(__file__).parents[2] / "data/small-moe.npz"
MAX_BYTES = 2_000_000
TASKS = ("code", "mathematics", "medicine", "law")
BATCH = 8
DRAWS = 1500


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    with np.load(TRACE) as arrays:
        return dict(arrays)


def test_it_is_a_small_whole_recording_of_the_shipped_model() -> None:
    assert TRACE.stat().st_size <= MAX_BYTES
    trace = read_trace(TRACE)
    config = json.loads((eldr_small_moe.folder() / "config.json").read_text())
    geometry = (config["num_hidden_layers"], config["num_experts"], config["num_experts_per_tok"])
    assert (trace.meta.layers, trace.meta.experts, trace.meta.top_k) == geometry
    assert trace.requests >= 200
    labels, counts = np.unique(trace.label, return_counts=True)
    assert set(labels) == set(KINDS)
    assert counts.min() >= 25
    assert np.diff(trace.decode_offsets).min() > 0


def test_its_prompts_are_the_demos_own() -> None:
    trace = read_trace(TRACE)
    written = make_prompts(trace.requests, seed=1000)  # that of training/record_trace.py
    assert [trace.prompt(request).decode() for request in range(trace.requests)] == [prompt.text for prompt in written]
    assert trace.label.tolist() == [prompt.kind for prompt in written]
    assert [len(trace.prompt(request)) for request in range(trace.requests)] == trace.prompt_tokens.tolist()  # bytes


def active_experts(raw: dict[str, Any], pool: NDArray[np.int64], rng: np.random.Generator) -> float:
    """Mean distinct experts a layer, over batches drawn from the requests of `pool`, each at a random decode step."""
    offsets = raw["decode_offsets"]
    means = []
    for _ in range(DRAWS):
        batch = rng.choice(pool, BATCH, replace=False)
        rows = [raw["decode_experts"][rng.integers(offsets[request], offsets[request + 1])] for request in batch]
        means.append(np.mean([len(set(layer.ravel().tolist())) for layer in np.stack(rows, axis=1)]))
    return np.mean(means)


def one_kind_and_mixed(raw: dict[str, Any], kinds: list[str] | tuple[str, str, str, str]) -> tuple[float, float]:
    rng = np.random.default_rng(1)
    pools = [np.flatnonzero(raw["label"] == kind) for kind in kinds]
    one_kind = np.mean([active_experts(raw, pool, rng) for pool in pools])
    return float(one_kind), active_experts(raw, np.concatenate(pools), rng)


def test_batches_of_one_kind_activate_fewer_experts_than_mixed_ones(raw: dict[str, Any]) -> None:
    one_kind, mixed = one_kind_and_mixed(raw, list(KINDS))
    assert one_kind < 0.8 * mixed


def test_so_they_do_among_kinds_that_share_the_latin_script(raw: dict[str, Any]) -> None:
    one_kind, mixed = one_kind_and_mixed(raw, TASKS)
    assert one_kind < 0.95 * mixed


def test_a_prompts_experts_are_those_of_its_output_more_than_of_others(raw: dict[str, Any]) -> None:
    prompt = raw["prefill_counts"].reshape(len(raw["label"]), -1) / raw["prompt_tokens"][:, None]
    offsets, experts = raw["decode_offsets"], raw["prefill_counts"].shape[2]
    decode = np.zeros_like(prompt)
    for request, (start, end) in enumerate(pairwise(offsets)):
        for layer in range(raw["decode_experts"].shape[1]):
            chosen = raw["decode_experts"][start:end, layer].ravel()
            np.add.at(decode[request], layer * experts + chosen.astype(int), 1 / (end - start))
    cosine = prompt @ decode.T
    cosine /= np.linalg.norm(prompt, axis=1)[:, None] * np.linalg.norm(decode, axis=1)
    other = raw["label"][:, None] != raw["label"]
    own = np.diag(cosine)
    assert own.mean() > 0.7
    assert own.mean() > cosine[other].mean() + 0.2
    # For nearly every request, its own output is nearer to its prompt than the outputs of other kinds are on average.
    others = np.array([row[mask].mean() for row, mask in zip(cosine, other, strict=True)])
    assert (own > others).mean() > 0.95


def test_it_can_be_replayed_as_the_readme_says(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = ["replay", str(TRACE), "--workers", "4", "--batch", "6", "--requests", "200", "--seeds", "2"]
    assert main([*arguments, "--json", str(out)]) == 0
    active = {row["policy"]: row["active_experts_mean"] for row in json.loads(out.read_text())}
    assert active["locality-band"] < 0.9 * active["jsq"]
    assert active["expected-union"] < 0.9 * active["jsq"]
