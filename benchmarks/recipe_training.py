"""A training of `recipe_ablations.py` in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import harness
from recipe_arms import Arm


class Training:
    """One `refusion train` in a process of its own, its lines with their times in a log."""

    def __init__(self, arm: Arm, options: Sequence[str], log: Path) -> None:
        self.arm, self.log, self.began = arm, log, time.perf_counter()
        self.is_resumed = "--resume" in options
        self.lines: list[tuple[float, str]] = []
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(harness.ROOT / "src"), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "refusion", "train", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            process_group=0,  # a terminal's Ctrl-C is for us; a second one would end it without a checkpoint
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None, "it is a pipe"
        with open(self.log, "a", encoding="utf-8", buffering=1) as file:
            for line in self.process.stdout:
                self.lines.append((time.perf_counter() - self.began, line.rstrip()))
                file.write(f"{self.lines[-1][0]:7.1f} s  {line.rstrip()}\n")

    @property
    def code(self) -> int | None:
        """None while it runs."""
        code = self.process.poll()
        if code is not None and not hasattr(self, "seconds"):
            self.seconds = time.perf_counter() - self.began
            self.reader.join(timeout=2.0)  # a grandchild may still hold the pipe
        return code

    def interrupt(self) -> None:
        """Let it finish the step under way and save."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """With the loader and compile processes it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def last_words(self) -> str:
        return next((line for _, line in reversed(self.lines) if line.strip()), "without a word")

    def parts(self) -> dict[str, float]:
        """Seconds from one kind of line to the next: reading the data, the first step (which compiles), the other steps, the end."""
        steps = [at for at, line in self.lines if line.startswith("step ") and "tokens/s" in line]
        marks = {
            "start": next((at for at, line in self.lines if line.startswith("reading ")), None),
            "data": next((at for at, line in self.lines if "weights trained" in line), None),
            "first step": steps[0] if steps else None,
            "other steps": steps[-1] if steps else None,
            "end": self.seconds,
        }
        found, before = {}, 0.0
        for name, at in marks.items():
            if at is not None:
                found[name], before = at - before, at
        return found
