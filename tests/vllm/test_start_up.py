"""What the connector refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CompilationMode

from eldr.engines.vllm import support
from eldr.engines.vllm.support import UnsupportedError, check_engine, check_version, full_attention_group, options
from tests.vllm import tiny_models
from tests.vllm.engine import running


def config(**parallel: Any) -> SimpleNamespace:
    settings = {
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "use_ubatching": False,
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**settings | parallel),
        compilation_config=SimpleNamespace(mode=CompilationMode.NONE),
    )


def test_a_model_without_experts_fails_at_start(tmp_path: Path) -> None:
    model = tiny_models.make_dense(tmp_path)
    with (
        pytest.raises(UnsupportedError, match=r"has no mixture-of-experts layers.*NixlConnector"),
        running(model),
    ):
        pass


def test_an_unknown_option_fails_at_start(tmp_path: Path) -> None:
    model = tiny_models.make_moe(tmp_path, layers=2, experts=4, top_k=2)
    with (
        pytest.raises(UnsupportedError, match="unknown key 'eldr_lease_magin_s'; known: eldr_lease_margin_s"),
        running(model, extra_config={"eldr_lease_magin_s": 1}),
    ):
        pass


def test_compiled_models_on_cpu() -> None:
    compiled = config()
    compiled.compilation_config.mode = CompilationMode.VLLM_COMPILE
    with pytest.raises(UnsupportedError, match="add --enforce-eager"):
        check_engine(compiled)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the connector warns of."""
    found: list[str] = []
    logger = SimpleNamespace(warning=lambda text, *values: found.append(text % values))
    monkeypatch.setattr(support, "logger", logger)
    return found


@pytest.mark.parametrize("version", ["0.30.0", "0.31.2", "0.32.0", "0.32.1rc1+cpu"])
def test_verified_versions(version: str, warnings: list[str]) -> None:
    check_version(version)
    assert not warnings


@pytest.mark.parametrize("version", ["0.33.0", "0.33.1.dev3+g1234567", "1.0.0", "dev"])
def test_versions_that_nobody_tried(version: str, warnings: list[str]) -> None:
    check_version(version)
    check_version(version)
    [warning] = warnings
    assert f"verified with vLLM 0.30 to 0.32, and not with this vLLM {version}." in warning


@pytest.mark.parametrize("version", ["0.29.1", "0.9.2"])
def test_versions_that_do_not_work(version: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"vLLM {version} is not supported.*Install vLLM 0\.30 to 0\.32"):
        check_version(version)


def test_this_engine_is_supported() -> None:
    check_engine(config())


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"prefill_context_parallel_size": 4}, "--prefill-context-parallel-size 4"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size 2"),
        ({"use_ubatching": True}, "--enable-dbo"),
    ],
)
def test_parallelism_that_hides_layers_or_tokens(setting: dict[str, Any], flag: str) -> None:
    with pytest.raises(UnsupportedError, match=flag):
        check_engine(config(**setting))


def test_a_cache_without_full_attention() -> None:
    cache = SimpleNamespace(kv_cache_groups=[])
    with pytest.raises(UnsupportedError, match="no full-attention layer"):
        full_attention_group(cache)


def test_prefixes_that_are_computed_again() -> None:
    spec = SimpleNamespace(prefix_replay_tokens=128)
    with pytest.raises(UnsupportedError, match="start vLLM with --no-swa-bounded-replay"):
        full_attention_group(SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)]))


@pytest.mark.parametrize("value", [-1, "2", True, None])
def test_options_must_be_numbers(value: object) -> None:
    with pytest.raises(UnsupportedError, match="eldr_lease_margin_s"):
        options({"eldr_lease_margin_s": value})


def test_other_options_are_left_to_nixl() -> None:
    assert options({"kv_lease_duration": 60, "eldr_lease_margin_s": 5})["eldr_lease_margin_s"] == 5
