"""Tandem's hand-off under vLLM: a KV connector that `vllm serve` loads by name.

    --kv-transfer-config '{"kv_connector": "TandemConnector", "kv_connector_module_path": "tandem.vllm",
                           "kv_role": "kv_both"}'

vLLM is imported only when the class is asked for; nothing else of Tandem imports this package.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Make the connector known by its name alone; vLLM calls this in each of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "TandemConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("TandemConnector", "tandem.vllm.connector", "TandemConnector")


def __getattr__(name: str) -> Any:
    if name == "TandemConnector":
        from tandem.vllm.connector import TandemConnector

        return TandemConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
