"""Running generated Python: one short-lived process per answer, fenced in as far as the machine permits.

The process starts isolated (`python -I -S`) in an empty temporary directory that is also its HOME, with limits on memory, CPU time, size
and number of files and processes, in its own network and process namespaces where the kernel allows that, and under an audit hook that
refuses sockets, processes, signals and foreign paths. This keeps a language model's mistakes away from the machine; it is not a prison
for an attacker.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from refusion.errors import ConfigError

CHILD = Path(__file__).with_name("sandbox_child.py")

Outcome = Literal["passed", "failed", "timeout"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLimits:
    """What one program may use."""

    seconds: float = 5.0
    """Wall-clock time, > 0; the CPU time is the same, rounded up."""
    memory_bytes: int = 512 << 20
    """Address space."""
    output_bytes: int = 1 << 20
    """Size of every file it writes, its output among them."""
    num_files: int = 64
    """Files and directories it may create, >= 0; together with output_bytes this bounds what it takes of the disk."""

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ConfigError(f"seconds is {self.seconds}; it must be > 0")
        if self.num_files < 0:
            raise ConfigError(f"num_files is {self.num_files}; it must be >= 0")


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """`passed` only if program and all tests ran to their end; `output` is what they printed, tracebacks included."""

    outcome: Outcome
    output: str

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def run_python(program: str, tests: Sequence[str] = (), limits: SandboxLimits | None = None) -> SandboxResult:
    """Execute `program`, then each test in its names, in a process of its own."""
    limits = limits or SandboxLimits()
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="sandbox-") as place, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as verdict:
        job = {
            "program": program, "tests": list(tests), "verdict_fd": verdict.fileno(), "nonce": nonce,
            "memory_bytes": limits.memory_bytes, "cpu_seconds": int(-(-limits.seconds // 1)), "file_bytes": limits.output_bytes,
            "num_files": limits.num_files,
        }  # fmt: skip
        in_time = _run(job, place, output, limits.seconds)
        output.seek(0)
        text = output.read(limits.output_bytes).decode(errors="replace")
        verdict.seek(0)
        has_passed = verdict.read(len(nonce)) == nonce.encode()
    if not in_time:
        return SandboxResult("timeout", text)
    return SandboxResult("passed" if has_passed else "failed", text)


def run_many(
    jobs: Iterable[tuple[str, Sequence[str]]], limits: SandboxLimits | None = None, num_workers: int | None = None
) -> list[SandboxResult]:
    """`run_python` over (program, tests) pairs, several at a time, in their order."""
    with ThreadPoolExecutor(num_workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda job: run_python(job[0], job[1], limits), jobs))


def _run(job: dict[str, object], place: str, output: IO[bytes], seconds: float) -> bool:
    """Whether the process ended by itself in time; whatever is left of it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        cwd=place,
        env={"HOME": place, "TMPDIR": place, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        pass_fds=[int(str(job["verdict_fd"]))],
        start_new_session=True,
    )
    try:
        process.communicate(json.dumps(job).encode(), timeout=seconds)
        return process.returncode not in (124, -signal.SIGALRM, -signal.SIGXCPU)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
