"""The sources that a configuration's addresses name: those of dns+ and k8s+."""

from __future__ import annotations

from eldr.router.config.groups import WorkerSettings
from eldr.router.config.settings import ConfigError
from eldr.router.fleet.discovery.base import Source
from eldr.router.fleet.discovery.dns import DnsSource
from eldr.router.observe.counters import Metrics


def named_sources(workers: WorkerSettings, metrics: Metrics) -> list[Source]:
    """Make a source for each such address.

    Raises ConfigError if Kubernetes is named but eldr[kubernetes] is not installed, or the API's address is unknown.
    """

    def failed(source: str) -> None:
        metrics.discovery_failures[source] += 1

    sources: list[Source] = [
        DnsSource(url, role, workers.dns_interval_s, failed=failed) for url, role in workers.dns_names
    ]
    if workers.kubernetes:
        try:
            from eldr.router.fleet.discovery.kubernetes import KubernetesSource
        except ModuleNotFoundError as error:
            raise ConfigError(f"k8s+ addresses need the package {error.name}; install eldr[kubernetes]") from None
        url, account, relist_s = workers.kubernetes_api, workers.kubernetes_account, workers.kubernetes_relist_s
        sources += [
            KubernetesSource(address, role, url, account, relist_s, failed) for address, role in workers.kubernetes
        ]
    return sources
