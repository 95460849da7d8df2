"""The connector's name in vLLM, with and without the path of its module."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
from vllm.distributed.kv_transfer.kv_connector import factory
from vllm.plugins import load_plugins_by_group

from eldr.engines.vllm import plugin
from tests.vllm.engine import running
from tests.vllm.models import Models

GROUP = "vllm.general_plugins"
# In a process of its own, because the other tests import the connector.
LAZY = """
import sys
from eldr.engines.vllm.plugin import register
assert "vllm" not in sys.modules and "numpy" not in sys.modules
register()
register()
assert "eldr.engines.vllm.connector" not in sys.modules and "nixl" not in sys.modules
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
print(KVConnectorFactory.get_connector_class_by_name("EldrConnector").__module__)
"""


def test_vllm_finds_the_plugin_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [point.value for point in entry_points(group=GROUP, name="eldr")] == ["eldr.engines.vllm.plugin:register"]
    monkeypatch.setenv("VLLM_PLUGINS", "eldr")
    assert load_plugins_by_group(GROUP) == {"eldr": plugin.register}
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert load_plugins_by_group(GROUP) == {}


def test_the_connector_is_imported_when_asked_for() -> None:
    output = subprocess.run([sys.executable, "-c", LAZY], check=True, capture_output=True, text=True).stdout
    assert output.splitlines()[-1] == "eldr.engines.vllm.connector"


@pytest.mark.parametrize("missing", ["module", "class", "method"])
def test_a_vllm_without_the_registry_starts_all_the_same(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if missing == "module":
        monkeypatch.setitem(sys.modules, factory.__name__, None)
    elif missing == "class":
        monkeypatch.delattr(factory, "KVConnectorFactory")
    else:
        monkeypatch.delattr(factory.KVConnectorFactory, "register_connector")
    monkeypatch.setattr(plugin, "logger", logging.getLogger("plugin"))
    plugin.register()
    [record] = caplog.records
    assert "cannot register its KV connector" in record.getMessage()


def test_the_path_of_the_module_may_be_given_too(models: Models) -> None:
    model = models("moe")
    prompt = list(range(70))
    path = {"kv_connector_module_path": "eldr.engines.vllm.connector"}
    with running(model.path, around=lambda own: own | path) as engine:
        [answer] = engine.prefill(prompt)
    np.testing.assert_array_equal(answer.counts, model.reference.counts(prompt))
