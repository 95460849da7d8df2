"""What the example of Envoy's configuration must say, whether or not there is an Envoy to run it."""

from __future__ import annotations

import pytest
import yaml

from eldr.router.config.groups import QueueLimits
from tests.router.picker.envoy import EXAMPLE


@pytest.mark.parametrize("name", ["workers", "picker"])
def test_envoy_lets_through_what_the_picker_does(name: str) -> None:
    """A conversation lasts as long as its request, so both clusters have as many at once as run and wait."""
    clusters = yaml.safe_load(EXAMPLE.read_text())["static_resources"]["clusters"]
    (cluster,) = (each for each in clusters if each["name"] == name)
    (thresholds,) = cluster["circuit_breakers"]["thresholds"]
    limits = QueueLimits()
    for limit in ("max_connections", "max_pending_requests", "max_requests"):
        assert thresholds[limit] >= limits.max_streams + 3 * limits.max_queued
