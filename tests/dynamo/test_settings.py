"""The flags of the component, and what it says of bad ones."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from eldr_dynamo.__main__ import main
from eldr_dynamo.settings import ComponentConfig

from eldr.settings import build


def test_defaults_are_where_dynamos_own_vllm_workers_are() -> None:
    dynamo = build(ComponentConfig, {"model_path": "Qwen/Qwen3-30B-A3B"}).dynamo
    assert (dynamo.prefill_endpoint, dynamo.decode_endpoint) == ("dynamo.prefill.generate", "dynamo.backend.generate")
    assert dynamo.model_name == "Qwen/Qwen3-30B-A3B"
    assert dynamo.namespace != "dynamo"


def test_an_endpoint_may_be_written_as_dynamo_does() -> None:
    given = {"model_path": "m", "decode_endpoint": "dyn://a.b.c", "served_model_name": "n"}
    dynamo = build(ComponentConfig, given).dynamo
    assert (dynamo.decode_endpoint, dynamo.model_name) == ("a.b.c", "n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give the model"),
        (["--model-path", "m", "--decode-endpoint", "backend"], "NAMESPACE.COMPONENT.ENDPOINT"),
        (["--model-path", "m", "--namespace", "dynamo"], "another DYN_NAMESPACE"),
        (["--model-path", "m", "--policy", "best"], "best"),
        (["--model-path", "m", "--policy", "locality-band"], "calibration"),
    ],
)
def test_bad_input(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert said in capsys.readouterr().err


def test_the_component_is_of_the_version_of_eldr_whose_parts_it_uses() -> None:
    assert version("eldr-dynamo") == version("eldr")
