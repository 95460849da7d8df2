"""Cost models: fitted against numpy's own polynomial solver, files refused when they are not sound."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.cost import (
    PRESETS,
    CostError,
    CostModel,
    MoeLayerCost,
    RestCost,
    find_cost,
    fit_moe_layer,
    load_cost,
)

MODEL = CostModel("m", "d", "s", MoeLayerCost(20.0, 6.0, 0.5, 0.99), RestCost(30.0, 0.25, 400.0, 1.0, 0.002))


def test_step_cost_adds_up_by_hand() -> None:
    """3 layers, 40 experts in all, 7 requests, 900 tokens of context."""
    moe = MODEL.step_cost(3, "moe")
    assert moe.step_s(40.0, 7, 900.0) == pytest.approx((3 * 20 + 6 * 40 + 3 * 0.5 * 7) * 1e-6)
    step = MODEL.step_cost(3, "step")
    rest = 3 * (30 + 0.25 * 7 + 0.002 * 900) + 400 + 7
    assert step.step_s(40.0, 7, 900.0) == pytest.approx((3 * 20 + 6 * 40 + 3 * 0.5 * 7 + rest) * 1e-6)


def test_scopes_that_there_are_not() -> None:
    with pytest.raises(CostError, match="no cost scope 'layer'"):
        MODEL.step_cost(3, "layer")
    with pytest.raises(CostError, match="covers only the MoE layers"):
        CostModel("m", "d", "s", MODEL.moe_layer).step_cost(3, "step")


@pytest.mark.parametrize("model", [MODEL, CostModel("n", "d", "s", MoeLayerCost(0.0, 1.0, 0.0)), *PRESETS.values()])
def test_round_trip(tmp_path: Path, model: CostModel) -> None:
    model.save(tmp_path / "cost.json")
    assert load_cost(tmp_path / "cost.json") == model
    assert find_cost(str(tmp_path / "cost.json")) == model


def test_find_cost_knows_its_presets() -> None:
    assert find_cost("qwen3-30b-a3b-rtxpro6000").moe_layer.per_expert_us == 6.263
    with pytest.raises(CostError, match="neither a file nor a preset; the presets are qwen3"):
        find_cost("qwen4")


def good() -> dict[str, dict[str, float | None] | str | None]:
    return json.loads(json.dumps({
        "format": "eldr-cost-v1", "name": "m", "device": "d", "source": "s",
        "moe_layer": {"base_us": 1, "per_expert_us": 2.5, "per_token_us": 0, "r2": None}, "rest": None,
    }))  # fmt: skip


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"format": "x"}, "not an eldr-cost-v1 file"),
    "no layer": ({"moe_layer": None}, "moe_layer is missing"),
    "negative": ({"moe_layer": {"base_us": -1, "per_expert_us": 1, "per_token_us": 1}}, "base_us is -1"),
    "not a number": ({"moe_layer": {"base_us": "1", "per_expert_us": 1, "per_token_us": 1}}, "base_us is '1'"),
    "true": ({"moe_layer": {"base_us": True, "per_expert_us": 1, "per_token_us": 1}}, "base_us is True"),
    "no time": ({"moe_layer": {"base_us": 0, "per_expert_us": 0, "per_token_us": 0}}, "no time at all"),
    "r2": ({"moe_layer": {"base_us": 1, "per_expert_us": 1, "per_token_us": 1, "r2": 2}}, "r2 is 2"),
    "half a rest": ({"rest": {"layer_base_us": 1}}, "layer_per_token_us is None"),
    "name": ({"name": 3}, "name is 3"),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_refuses_and_says_why(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({**good(), **change}))
    with pytest.raises(CostError, match=message) as caught:
        load_cost(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"NaN"])
def test_refuses_what_is_no_cost_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "cost.json"
    path.write_bytes(data)
    with pytest.raises(CostError, match=r"cost\.json"):
        load_cost(path)


def test_infinite_times_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(good()).replace("2.5", "Infinity"))
    with pytest.raises(CostError, match="per_expert_us is inf"):
        load_cost(path)


@given(
    base=st.floats(0, 100), per_expert=st.floats(0.1, 100), per_token=st.floats(0, 10), seed=st.integers(0, 1000)
)  # fmt: skip
def test_fit_finds_the_coefficients_of_exact_times(base: float, per_expert: float, per_token: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, tokens = rng.integers(8, 128, 20).astype(float), rng.integers(1, 64, 20).astype(float)
    fitted = fit_moe_layer(experts, tokens, base + per_expert * experts + per_token * tokens)
    found = (fitted.base_us, fitted.per_expert_us, fitted.per_token_us)
    assert found == pytest.approx((base, per_expert, per_token), abs=1e-6 * (base + 128 * per_expert + 64 * per_token))
    assert fitted.r2 == pytest.approx(1)


def test_fit_with_noise_is_least_squares_and_never_negative() -> None:
    rng = np.random.default_rng(0)
    experts, tokens = rng.integers(8, 128, 40).astype(float), rng.integers(1, 64, 40).astype(float)
    times = 5 + 3 * experts + 0.2 * tokens + rng.normal(0, 2, 40)
    reference = np.linalg.solve(*(lambda m: (m.T @ m, m.T @ times))(np.stack([np.ones(40), experts, tokens], 1)))
    fitted = fit_moe_layer(experts, tokens, times)
    assert (fitted.base_us, fitted.per_expert_us, fitted.per_token_us) == pytest.approx(reference)
    residual = times - np.stack([np.ones(40), experts, tokens], 1) @ reference
    assert fitted.r2 == pytest.approx(1 - residual.var() / times.var())
    falling = fit_moe_layer(experts, tokens, 500 + 3 * experts - 2 * tokens)
    assert falling.per_token_us == 0
    assert min(falling.base_us, falling.per_expert_us) >= 0


def test_fit_needs_measurements_that_tell_coefficients_apart() -> None:
    with pytest.raises(CostError, match="too few different measurements"):
        fit_moe_layer(np.array([8.0, 16, 32, 64]), np.array([4.0, 4, 4, 4]), np.arange(4.0))
