"""The routers that are compared, each started as in production: metrics, health probes, retries and limits on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
API_KEY = "bench-key"
# Compiled, as a router that is installed to serve should be.
ELDR = str(ROOT / ".envs" / "compiled" / "bin" / "eldr")
# vLLM's side channel; sglang's bootstrap server. The mock has neither, the routers only pass the number on.
BOOTSTRAP_PORT = "8998"


@dataclass(frozen=True, slots=True)
class Fleet:
    """Ports of the mock workers, and of the router before them."""

    router_port: int
    prefill: tuple[int, ...]
    decode: tuple[int, ...]

    @property
    def prefill_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.prefill]

    @property
    def decode_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.decode]


@dataclass(frozen=True, slots=True)
class Contender:
    """One router. program: what must exist for it to run. command: from the fleet and a folder for its files.

    legs: workers that a request goes through. with_counts: whether hand-offs carry eldr's counts.
    """

    name: str
    program: str
    command: Callable[[Fleet, Path], list[str]]
    legs: int
    with_counts: bool = False

    @property
    def installed(self) -> bool:
        return shutil.which(self.program) is not None


def _eldr(program: str, fleet: Fleet, folder: Path) -> list[str]:
    key_file, decision_log = folder / "api.key", folder / "decisions.jsonl"
    key_file.write_text(API_KEY + "\n")
    decision_log.unlink(missing_ok=True)
    settings = {
        "port": fleet.router_port,
        "prefill": fleet.prefill_urls,
        "decode": fleet.decode_urls,
        "policy": "expected-union",
        "api_key_file": str(key_file),
        "worker_api_key_file": str(key_file),
        "decision_log": str(decision_log),
    }
    config = folder / "eldr.toml"
    # A TOML value of these kinds is written as in JSON.
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return [program, "serve", "--config", str(config)]


def other_eldr(program: str) -> Contender:
    """Another build of eldr, to be measured beside this one."""
    return Contender("eldr-other", program, partial(_eldr, program), legs=2, with_counts=True)


def _rust(name: str, pd_flag: str, *, bootstrap: bool, level: str) -> Contender:
    program = str(ROOT / ".envs" / name / "bin" / name)

    def command(fleet: Fleet, folder: Path) -> list[str]:
        prefill = [["--prefill", url, *([BOOTSTRAP_PORT] if bootstrap else [])] for url in fleet.prefill_urls]
        decode = [["--decode", url] for url in fleet.decode_urls]
        return [
            *([program, "launch"] if bootstrap else [program]),
            *(pd_flag, "--host", "127.0.0.1", "--port", str(fleet.router_port)),
            *(argument for worker in (*prefill, *decode) for argument in worker),
            *("--policy", "round_robin", "--log-level", level, "--api-key", API_KEY),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(fleet.router_port + 1)),
            *("--worker-startup-check-interval", "1"),
        ]  # fmt: skip

    return Contender(name, program, command, legs=2)


def _haproxy(fleet: Fleet, folder: Path) -> list[str]:
    servers = "".join(f"  server d{port} 127.0.0.1:{port} check inter 2s\n" for port in fleet.decode)
    config = folder / "haproxy.cfg"
    config.write_text(f"""global
  nbthread 1
  maxconn 8192
defaults
  mode http
  option http-keep-alive
  option http-no-delay
  option httpchk GET /health
  timeout connect 2s
  timeout client 300s
  timeout server 300s
listen proxy
  bind 127.0.0.1:{fleet.router_port}
  http-request use-service prometheus-exporter if {{ path /metrics }}
  http-request deny unless {{ req.hdr(authorization) -m str "Bearer {API_KEY}" }}
  balance roundrobin
{servers}""")
    return ["haproxy", "-db", "-f", str(config)]


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("eldr", ELDR, partial(_eldr, ELDR), legs=2, with_counts=True),
        _rust("sglang-router", "--pd-disaggregation", bootstrap=True, level="warn"),
        _rust("vllm-router", "--vllm-pd-disaggregation", bootstrap=False, level="warning"),
        Contender("haproxy", "haproxy", _haproxy, legs=1),
    )
}
