"""CPU time that eldr's component for Dynamo takes for a request and for a streamed token.

    .envs/dynamo/bin/python -m benchmarks.dynamo.cost

Dynamo's real frontend, fake workers (tests/dynamo). CPU time is that of the component's process.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.dynamo.deployment import Deployment, wait_until

STREAMS, TOKENS, SHORT = 32, 250, 400
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def measure(deployment: Deployment, requests: int, tokens: int, at_once: int) -> float:
    """The component's CPU seconds for so many streams of so many tokens."""

    def stream(number: int) -> None:
        with deployment.open(f"{'abcdefgh'[number % 8] * 200} {number}", tokens, stream=True) as answer:
            answer.read()

    assert deployment.component is not None
    before = cpu_s(deployment.component.pid)
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(stream, range(requests)))
    return cpu_s(deployment.component.pid) - before


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        deployment = Deployment(Path(folder))
        try:
            deployment.start_component("--policy", "expected-union", "--learn", "off")
            deployment.start_frontend()
            deployment.worker("prefill", "p0")
            for number in range(2):
                deployment.worker("decode", f"d{number}")
            deployment.wait_ready()
            wait_until(lambda: len(list(deployment.samples("eldr_inflight"))) == 3, "the workers do not join")
            measure(deployment, 40, 2, 8)  # warm
            short = measure(deployment, SHORT, 1, 8) / SHORT
            long = measure(deployment, STREAMS, TOKENS, STREAMS) / STREAMS
            print(f"a request of one token: {short * 1e3:.2f} ms of CPU")
            print(f"a token: {(long - short) / (TOKENS - 1) * 1e6:.0f} us of CPU")
        finally:
            deployment.stop()


if __name__ == "__main__":
    main()
