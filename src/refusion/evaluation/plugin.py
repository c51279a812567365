"""Makes the model `refusion` known to lm-evaluation-harness.

The harness has a registry of models but, in 0.4.13, looks for no entry points of other packages, so its own command line would never
import us. PyTorch does look for some while it is imported (group `torch.backends`), and the harness imports it before it looks a model up:
`on_torch_import` stands there and adds one lazy line to the registry, if the harness is what is running. Programs that import the harness
themselves call `register`.
"""

from __future__ import annotations

import contextlib
import sys

NAME = "refusion"
TARGET = "refusion.evaluation.harness:ReFusionLM"


def on_torch_import() -> None:
    """Entry point. Does nothing, and imports nothing, unless the harness was imported before."""
    if "lm_eval.api" in sys.modules:
        with contextlib.suppress(ImportError):  # an import of torch must not fail because of a harness of another version
            register()


def register() -> None:
    """Add `refusion` to the harness's models; importing it waits until somebody asks for it."""
    import lm_eval.models  # noqa: F401  (fills the registry, which stays without the other models if ours is the first)
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
