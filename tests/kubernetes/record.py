"""Writes down what a real kube-apiserver answers, for the fake one of tests/router.

python -m tests.kubernetes.record
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.kubernetes.cluster import BUILT, MOE, POOLS, Cluster, RefusedError
from tests.router.fake_apiserver import RECORDED_FILE


async def record(folder: Path) -> dict[str, Any]:
    cluster = await Cluster(folder).start()
    try:
        await cluster.prepare()
        await cluster.define_pools()
        await cluster.allow()
        token = await cluster.token("recorded")
        pods = f"{MOE}/pods"
        old = (await cluster.ask("GET", pods))["metadata"]["resourceVersion"]
        await cluster.create("pod", "decode", "10.0.0.1", 8200)
        spec = {"selector": {"matchLabels": {"role": "decode"}}, "targetPorts": [{"number": 8200}]}
        kind = {"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool"}
        await cluster.ask("POST", POOLS, {**kind, "metadata": {"name": "pool"}, "spec": spec})
        recorded = {
            "version": subprocess.check_output([BUILT / "kube-apiserver", "--version"], text=True).strip(),
            "pod": await cluster.ask("GET", f"{pods}/pod"),
            "pool": await cluster.ask("GET", f"{POOLS}/pool"),
            "list": await cluster.ask("GET", f"{pods}?limit=1&labelSelector=role=none"),
            "unauthorized": await refused(cluster, pods, "nobody"),
            "forbidden_list": await refused(cluster, pods, token),
            "forbidden_watch": await refused(cluster, f"{pods}?watch=true", token),
        }
        await cluster.delete("pod")
        ending = (await cluster.ask("GET", f"{pods}/pod"))["metadata"]
        recorded["ending"] = {key: ending[key] for key in ("deletionTimestamp", "deletionGracePeriodSeconds")}
        # It remembers past changes in memory alone.
        await cluster.restart_apiserver()
        recorded["gone"] = (await watched(cluster, f"resourceVersion={old}&timeoutSeconds=5"))[-1]["object"]
        return recorded
    finally:
        cluster.stop()


async def watched(cluster: Cluster, query: str) -> list[Any]:
    """The events of a whole watch."""
    text = await cluster.ask("GET", f"{MOE}/pods?watch=true&{query}")
    return [json.loads(line) for line in str(text).splitlines()]


async def refused(cluster: Cluster, path: str, token: str) -> Any:
    try:
        await cluster.ask("GET", path, token=token)
    except RefusedError as refusal:
        return json.loads(str(refusal))
    raise AssertionError(f"{path} was answered")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(record(Path(folder)))
    RECORDED_FILE.write_text(json.dumps(found, indent=1) + "\n")
