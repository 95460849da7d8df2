"""The vLLM plugin `eldr`: lets `"kv_connector": "EldrConnector"` name the connector, without the path of its module.

vLLM loads its general plugins in every process, and in those that do not use this connector too. MultiConnector can
only report the statistics of connectors that are registered by name.
"""

from __future__ import annotations

import logging

CONNECTOR = "EldrConnector"

# A child of vLLM's own logger, which writes to the worker's log.
logger = logging.getLogger("vllm.eldr")


def register() -> None:
    """Register the connector's name. Its module is imported by the first process that asks for the connector.

    Never raises: vLLM does not start if a plugin does. May be called again.
    """
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        KVConnectorFactory.register_connector(CONNECTOR, "eldr.engines.vllm.connector", CONNECTOR)
    except ValueError:
        pass  # registered already
    except Exception as error:
        logger.warning(
            "eldr cannot register its KV connector in this vLLM, which it was not made for (%r). "
            "Without the connector, vLLM works as usual",
            error,
        )
