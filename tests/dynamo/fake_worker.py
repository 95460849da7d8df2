"""A fake worker of a Dynamo deployment, as a process: python -m tests.dynamo.fake_worker ROLE NAME LOG [OPTION].

It appends an event to LOG for each request that begins or ends. A decode worker generates a token every GAP_S.
Options: "no-counts" for a prefill worker that counts no experts; the name of an exception, of Python or of Dynamo, for
a decode worker that raises it, after one token if a "+" is in front.
"""

from __future__ import annotations

import asyncio
import builtins
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop
from dynamo.common.utils.graceful_shutdown import install_signal_handlers
from dynamo.llm import exceptions
from dynamo.runtime import DistributedRuntime, dynamo_worker

from eldr.counts import encode_counts
from tests.dynamo.topics import counts_of

GAP_S = 0.02


@dynamo_worker()
async def serve(runtime: DistributedRuntime, role: str, name: str, log: Path, option: str) -> None:
    def note(event: str, context: Any, **more: Any) -> None:
        with log.open("a") as file:
            file.write(json.dumps({"event": event, "id": context.id(), **more}) + "\n")

    async def prefill(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        note("prefill", context, request=request)
        params = {"do_remote_prefill": True, "remote_host": name, "eldr_lease": {"left_s": 30.0, "unix_s": 0.0}}
        if option != "no-counts":
            params["eldr_counts"] = encode_counts(counts_of(request["token_ids"]))
        yield {"token_ids": [65], "disaggregated_params": {"kv_transfer_params": params}}

    async def decode(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        note("decode", context, request=request)
        sent = 0
        try:
            if option.startswith("+"):
                yield {"token_ids": [97]}
                sent += 1
            if option:
                name = option.removeprefix("+")
                raise (getattr(builtins, name, None) or getattr(exceptions, name))("what the worker says")
            for _ in range(request["stop_conditions"]["max_tokens"]):
                if context.is_stopped():
                    return
                yield {"token_ids": [97]}
                sent += 1
                await asyncio.sleep(GAP_S)
            yield {"token_ids": [], "finish_reason": "length"}
        finally:
            note("end", context, sent=sent, stopped=context.is_stopped())

    component, handler = ("prefill", prefill) if role == "prefill" else ("backend", decode)
    endpoint = runtime.endpoint(f"dynamo.{component}.generate")
    install_signal_handlers(asyncio.get_running_loop(), runtime, [endpoint], grace_period_s=0.0)
    await endpoint.serve_endpoint(handler, graceful_shutdown=True)


if __name__ == "__main__":
    role, name, log, *options = sys.argv[1:]
    uvloop.run(serve(role, name, Path(log), options[0] if options else ""))
