"""Checkpoints on disk: which are complete, how one appears whole, how old ones and the remains of a killed process go.

Only names and moves; what a checkpoint holds is the Trainer's business. A directory named checkpoint-N is always complete: it is written
under a hidden name and renamed, and renamed back to a hidden name before it is deleted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from refusion.errors import CheckpointError


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in run_dir.glob("checkpoint-*") if (p / "trainer_state.json").exists() and p.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def publish(draft: Path, target: Path) -> None:
    """Let a complete draft become `target`, on disk before it has the name; an older target is replaced."""
    for file in draft.rglob("*"):
        if file.is_file():
            _sync(file)
    if target.exists():
        remove_checkpoint(target)
    os.replace(draft, target)
    _sync(target.parent)
    shutil.rmtree(draft.parent, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that no half of it is ever seen."""
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a killed process left of a checkpoint that it was writing or deleting."""
    for path in [*run_dir.glob(".checkpoint-*.tmp"), *run_dir.glob(".checkpoint-*.old")]:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """Turn a failed write into one readable line, and take away what was written of it; the checkpoints before it stay."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, OSError):
            reason = error.strerror or reason
        elif isinstance(error, RuntimeError):
            if not any(name in str(error) for name in ("inline_container", "PytorchStreamWriter")):
                raise
            reason = "a file could not be written whole"  # all that torch.save says of a full disk is where in the file it stood
        remove_leftovers(target.parent)
        raise CheckpointError(
            f"cannot write {target}: {reason}; free some space and go on with --resume, or choose another place"
        ) from error


def _sync(path: Path) -> None:
    """Wait until a file or directory is on disk, so that a crash of the machine cannot leave an empty file under a final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
