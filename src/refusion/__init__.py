"""ReFusion: masked diffusion over slots of tokens, decoded with a plain causal cache.

`from refusion import LLM, SamplingParams, SlotParams` is the Python interface, with `EngineSettings` and `AsyncEngine` for those who serve;
the names are imported when first used, so that `refusion --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refusion.engine.asynchronous import AsyncEngine
    from refusion.engine.settings import EngineSettings
    from refusion.llm import LLM, BlockDiffusionParams, MaskedDiffusionParams, RequestOutput, SamplingParams, SlotParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "BlockDiffusionParams",
    "EngineSettings",
    "MaskedDiffusionParams",
    "RequestOutput",
    "SamplingParams",
    "SlotParams",
    "__version__",
]

_ELSEWHERE = {"AsyncEngine": "refusion.engine.asynchronous", "EngineSettings": "refusion.engine.settings"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "refusion.llm")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
