"""EldrConnector under the name of the connector that it extends, for software that takes only names it knows.

`"kv_connector": "NixlConnector", "kv_connector_module_path": "eldr.engines.vllm.nixl"`; see docs/vllm.md. vLLM follows
the path of the module before it looks at its own connectors.
"""

from __future__ import annotations

from eldr.engines.vllm.connector import EldrConnector

# Not a class of this name: MultiConnector finds by a class's name who reads its statistics, and would find vLLM's own.
NixlConnector = EldrConnector
