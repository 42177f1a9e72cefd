"""Tandem: serve large language models with prefill and decode on separate engines."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tandem.llm import LLM as LLM
    from tandem.wire.sampling import SamplingParams as SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """`LLM` and `SamplingParams` are imported on first use: importing tandem itself costs nothing."""
    if name == "LLM":
        from tandem.llm import LLM

        return LLM
    if name == "SamplingParams":
        from tandem.wire.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'tandem' has no attribute {name!r}")
