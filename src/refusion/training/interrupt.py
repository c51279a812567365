"""Ctrl-C during training: the step under way is finished and saved, so that the run can be resumed; a second Ctrl-C stops at once.

Runs of several processes are left alone: their processes would notice at different steps and wait for one another.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SaveOnInterrupt(TrainerCallback):
    """Asks the Trainer for a checkpoint and an end after the step during which SIGINT came."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.is_asked = False
        self.process_id = os.getpid()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take SIGINT while the block runs; in a thread, where Python allows no handlers, or with several processes nothing changes."""
        if threading.current_thread() is not threading.main_thread() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            yield
            return
        before = signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.is_asked:
            control.should_save = control.should_training_stop = True

    def _ask(self, *_: Any) -> None:
        if os.getpid() != self.process_id:  # a loader worker, which inherits the handler and gets the terminal's signal too
            return
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        with suppress(RuntimeError):  # the signal came in the middle of another line's output
            self.report("stopping after this step with a checkpoint; Ctrl-C again stops at once without one")
