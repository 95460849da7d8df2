"""The component: makes the parts, registers as prefill and as decode worker, and serves until it is told to end."""

from __future__ import annotations

import asyncio
import time

from dynamo.common.utils.graceful_shutdown import install_signal_handlers
from dynamo.llm import ModelInput, ModelType, WorkerType, exceptions, register_model
from dynamo.runtime import DistributedRuntime, dynamo_worker

from eldr.router.config.endpoint import LegName
from eldr.router.config.groups import EjectionSettings
from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.sweep import PERIOD_S
from eldr.router.fleet.workers import Fleet
from eldr.router.observe.counters import Metrics
from eldr.router.observe.decision_log import DecisionLog
from eldr.router.placement.lanes import MakePolicy
from eldr.router.placement.making import logged, make_lanes
from eldr_dynamo.errors import Failure
from eldr_dynamo.instances import Instances
from eldr_dynamo.metrics import ComponentCollector
from eldr_dynamo.settings import ComponentConfig
from eldr_dynamo.stages import Client, Stages

# By Dynamo's classes of errors. The text of an HTTP error stays in the log.
STATUSES = {
    "PayloadTooLarge": 413,
    "RateLimited": 429,
    "NotImplemented": 501,
    "BackendProtocol": 502,
    "DeadlineExceeded": 504,
    "CapacityExhausted": 529,
}


class DynamoErrors:
    """Makes the errors that Dynamo's frontend understands."""

    def of(self, failure: Failure) -> Exception:
        text = failure.text
        if failure.refused:
            return exceptions.CannotConnect(text)
        match failure.kind:
            case "Unavailable":
                return exceptions.Disconnected(text)
            case "Cancelled":
                return exceptions.Cancelled(text)
            case "InvalidRequest":
                return ValueError(text)
        status = STATUSES.get(failure.kind)
        return exceptions.Unknown(text) if status is None else exceptions.HttpError(status, text)

    def unavailable(self, text: str) -> Exception:
        # WorkerUnavailable or Disconnected would take this component out of service for some seconds.
        return exceptions.HttpError(503, text)


@dynamo_worker()
async def serve(runtime: DistributedRuntime, config: ComponentConfig, make_policy: MakePolicy) -> None:
    """Serve until SIGTERM. Then leave discovery, wait as Dynamo's workers do, and let running requests end."""
    dynamo, placement = config.dynamo, config.placement
    clients: dict[LegName, Client] = {
        "prefill": await runtime.endpoint(dynamo.prefill_endpoint).client(),
        "decode": await runtime.endpoint(dynamo.decode_endpoint).client(),
    }
    fleet, metrics = Fleet(), Metrics()
    decision_log = None if dynamo.decision_log is None else DecisionLog(dynamo.decision_log)
    if decision_log is not None:
        make_policy = logged(make_policy, placement, decision_log)
    lanes = make_lanes(placement, fleet, make_policy, metrics)
    outcomes = Outcomes(fleet, metrics, EjectionSettings())
    for part in (lanes, outcomes):
        fleet.on_change(part.fleet_changed)
    instances = Instances(fleet, clients, dynamo.model_name)
    stages = Stages(fleet, lanes, outcomes, instances, clients, DynamoErrors(), metrics, placement.prefix_window_bytes)

    prefill = runtime.endpoint(f"{dynamo.namespace}.eldr.prefill")
    decode = runtime.endpoint(f"{dynamo.namespace}.eldr.decode")
    decode.metrics.register_prometheus_expfmt_callback(ComponentCollector(metrics, fleet, lanes).exposition)
    install_signal_handlers(asyncio.get_running_loop(), runtime, (prefill, decode))
    watching = asyncio.create_task(_watch(instances, outcomes))
    try:
        await register_model(
            ModelInput.Tokens, ModelType.Prefill, prefill, dynamo.model_path, dynamo.model_name,
            worker_type=WorkerType.Prefill, needs=[[WorkerType.Decode]], ignore_weights=True,
        )  # fmt: skip
        await register_model(
            ModelInput.Tokens, ModelType.Chat | ModelType.Completions, decode, dynamo.model_path, dynamo.model_name,
            worker_type=WorkerType.Decode, needs=[[WorkerType.Prefill]], ignore_weights=True,
        )  # fmt: skip
        await asyncio.gather(
            prefill.serve_endpoint(stages.prefill, graceful_shutdown=True),
            decode.serve_endpoint(stages.decode, graceful_shutdown=True),
        )
    finally:
        watching.cancel()
        await lanes.close()
        if decision_log is not None:
            decision_log.close()


async def _watch(instances: Instances, outcomes: Outcomes) -> None:
    """Notice workers that come and go, and ejections that are over, also while no request comes."""
    while True:
        instances.follow()
        outcomes.sweep(time.monotonic())
        await asyncio.sleep(PERIOD_S)
