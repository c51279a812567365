"""ReFusion: masked diffusion over slots of tokens, decoded with a plain causal cache.

`from refusion import LLM, SamplingParams, SlotParams` is the whole Python interface; the names are imported when first used, so that
`refusion --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refusion.llm import LLM, RequestOutput, SamplingParams, SlotParams

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "SlotParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("refusion.llm"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
