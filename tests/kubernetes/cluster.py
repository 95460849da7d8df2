"""A real kube-apiserver with its etcd: as much of a cluster as discovery speaks with. No node runs the pods."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

from eldr.lifeline import die_with
from tests.router.certificates import certificate

ROOT = Path(__file__).parents[2]
BUILT = Path(os.environ.get("ELDR_KUBERNETES", ROOT / ".envs" / "kubernetes"))
NAMESPACE, ACCOUNT = "moe", "eldr"
MOE = f"/api/v1/namespaces/{NAMESPACE}"
RBAC = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}"
POOLS = f"/apis/inference.networking.k8s.io/v1/namespaces/{NAMESPACE}/inferencepools"
ADMIN = "admin-of-the-tests"
RULES = {
    "pods": {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]},
    "pools": {
        "apiGroups": ["inference.networking.k8s.io"],
        "resources": ["inferencepools"],
        "verbs": ["list", "watch"],
    },
}


class RefusedError(Exception):
    """An answer that is no success."""


class Cluster:
    """Start it, and stop it. folder: for its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cert, key = certificate(folder, "apiserver")
        service_cert, service_key = certificate(folder, "service")
        etcd, etcd_peer, self._port = _free_port(), _free_port(), _free_port()
        self.url = f"https://127.0.0.1:{self._port}"
        (folder / "tokens.csv").write_text(f"{ADMIN},admin,1,system:masters\n")
        self._etcd = [
            BUILT / "etcd",
            f"--data-dir={folder / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{etcd_peer}",
            "--unsafe-no-fsync",
        ]
        self._apiserver = [
            BUILT / "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            f"--etcd-prefix=/{NAMESPACE}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._port}",
            f"--tls-cert-file={self.cert}",
            f"--tls-private-key-file={key}",
            f"--token-auth-file={folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://tests",
            f"--service-account-key-file={service_cert}",
            f"--service-account-signing-key-file={service_key}",
            "--service-cluster-ip-range=10.0.0.0/24",
            # No controller makes a service account and its token for each namespace, which it would wait for.
            "--disable-admission-plugins=ServiceAccount",
            "--endpoint-reconciler-type=none",
        ]
        self._processes: list[subprocess.Popen[bytes]] = []

    async def start(self) -> Cluster:
        self._run("etcd", self._etcd)
        await self._start_apiserver()
        return self

    async def _start_apiserver(self) -> None:
        self._run("apiserver", self._apiserver)
        deadline_s = time.monotonic() + 120
        while True:
            with contextlib.suppress(aiohttp.ClientError, RefusedError, OSError):
                await self.ask("GET", "/readyz")
                return
            if time.monotonic() > deadline_s or any(process.poll() is not None for process in self._processes):
                raise AssertionError((self.folder / "apiserver.log").read_text()[-3000:])
            await asyncio.sleep(0.3)

    async def restart_apiserver(self) -> None:
        """Its memory of past changes is lost."""
        self._end(self._processes.pop())
        await self._start_apiserver()

    def stop(self) -> None:
        for process in reversed(self._processes):
            self._end(process)

    def _run(self, name: str, command: list[Any]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            tie = die_with(os.getpid())
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=tie))

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    async def ask(self, method: str, path: str, body: object = None, token: str = ADMIN) -> Any:
        """The answer to one request. Raises RefusedError, with the answer's v1.Status if there is one."""
        context = ssl.create_default_context(cafile=str(self.cert))
        headers = {"authorization": f"Bearer {token}"}
        if body is not None:
            headers["content-type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
            session.request(
                method, self.url + path, data=None if body is None else json.dumps(body), headers=headers, ssl=context
            ) as answer,
        ):
            text = await answer.text()
            if answer.status >= 300:
                raise RefusedError(text)
            return json.loads(text) if answer.content_type == "application/json" and "watch=" not in path else text

    # What its users do.

    async def prepare(self) -> None:
        """A namespace, and a service account in it."""
        await self.ask("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        await self.ask("POST", f"{MOE}/serviceaccounts", {"metadata": {"name": ACCOUNT}})

    async def allow(self, *rules: str) -> None:
        """Give the account a role with these rules, in place of the one that it had."""
        role = {"metadata": {"name": ACCOUNT}, "rules": [RULES[rule] for rule in rules]}
        with contextlib.suppress(RefusedError):
            await self.ask("DELETE", f"{RBAC}/roles/{ACCOUNT}")
        await self.ask("POST", f"{RBAC}/roles", role)
        binding = {
            "metadata": {"name": ACCOUNT},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": ACCOUNT},
            "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": NAMESPACE}],
        }
        with contextlib.suppress(RefusedError):
            await self.ask("POST", f"{RBAC}/rolebindings", binding)

    async def token(self, secret: str) -> str:
        """A token of the account, which is valid while the secret exists."""
        made = await self.ask("POST", f"{MOE}/secrets", {"metadata": {"name": secret}})
        bound = {"apiVersion": "v1", "kind": "Secret", "name": secret, "uid": made["metadata"]["uid"]}
        request = {"spec": {"audiences": ["https://tests"], "expirationSeconds": 3600, "boundObjectRef": bound}}
        answer = await self.ask("POST", f"{MOE}/serviceaccounts/{ACCOUNT}/token", request)
        return str(answer["status"]["token"])

    async def account(self, folder: Path, secret: str) -> Path:
        """The account as it is mounted into a pod."""
        folder.mkdir()
        (folder / "token").write_text(await self.token(secret))
        (folder / "namespace").write_text(NAMESPACE)
        (folder / "ca.crt").write_bytes(self.cert.read_bytes())
        return folder

    # Its pods. The part of the node's kubelet, which reports their state, is played by `_report`.

    async def create(self, name: str, role: str, ip: str, port: int, ready: bool = True) -> None:
        container = {
            "name": "vllm",
            "image": "vllm",
            "ports": [{"name": "http", "containerPort": port}],
            "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}},
        }
        metadata = {"name": name, "labels": {"role": role}}
        spec = {"nodeName": "node", "containers": [container]}
        await self.ask("POST", f"{MOE}/pods", {"metadata": metadata, "spec": spec})
        await self._report(name, ready, {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": "10.9.9.9"})

    async def set_ready(self, name: str, ready: bool) -> None:
        await self._report(name, ready, {})

    async def _report(self, name: str, ready: bool, status: dict[str, Any]) -> None:
        kinds = {"Initialized": True, "Ready": ready, "ContainersReady": ready, "PodScheduled": True}
        conditions = [{"type": kind, "status": str(value)} for kind, value in kinds.items()]
        await self.ask("PATCH", f"{MOE}/pods/{name}/status", {"status": {**status, "conditions": conditions}})

    async def delete(self, name: str) -> None:
        await self.ask("DELETE", f"{MOE}/pods/{name}")

    async def finish(self, name: str) -> None:
        await self.ask("DELETE", f"{MOE}/pods/{name}", {"gracePeriodSeconds": 0})

    async def clear(self) -> None:
        for pod in (await self.ask("GET", f"{MOE}/pods"))["items"]:
            await self.finish(pod["metadata"]["name"])

    async def define_pools(self) -> None:
        """The InferencePool of GAIE v1.6, with as much of its schema as this server's version takes."""
        schema = {
            "type": "object",
            "properties": {
                "spec": {
                    "type": "object",
                    "required": ["selector", "targetPorts"],
                    "properties": {
                        "selector": {
                            "type": "object",
                            "properties": {
                                "matchLabels": {"type": "object", "additionalProperties": {"type": "string"}}
                            },
                        },
                        "targetPorts": {
                            "type": "array",
                            "maxItems": 8,
                            "items": {"type": "object", "properties": {"number": {"type": "integer"}}},
                        },
                    },
                }
            },
        }
        names = {"kind": "InferencePool", "plural": "inferencepools", "singular": "inferencepool"}
        group = "inference.networking.k8s.io"
        version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
        crd = {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {
                "name": f"inferencepools.{group}",
                "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes/kubernetes/pull/78458"},
            },
            "spec": {"group": group, "scope": "Namespaced", "names": names, "versions": [version]},
        }
        await self.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd)
        for _ in range(100):
            with contextlib.suppress(RefusedError):
                await self.ask("GET", POOLS)
                return
            await asyncio.sleep(0.1)
        raise AssertionError("the pools never came")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
