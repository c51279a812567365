"""Files and directories that appear whole or not at all.

Everything is written beside its target under a hidden name and moved into place at the end, so a full disk, a crash or a second
process never leaves half a model behind. What is written is up to the caller.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from refusion.errors import CheckpointError

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends well.

    Raises CheckpointError if the disk is full or the place cannot be written, or if `target` exists and `replace` is false; an old
    target stays untouched until the new one is complete.
    """
    target = Path(target)
    draft = target.parent / f".{target.name}.{os.getpid()}.tmp"
    if not replace and target.exists():
        raise CheckpointError(f"{target} exists already; choose another place or remove it first")
    with _saving(target):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            yield draft
            for file in draft.rglob("*"):
                _use_default_mode(file)
            _swap_in(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to; it replaces `target` when the block ends well. Raises CheckpointError like `atomic_directory`."""
    target = Path(target)
    draft = target.parent / f".{target.name}.{os.getpid()}.tmp"
    with _saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            _use_default_mode(draft)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """Create `path` and its parents where they are missing. Raises CheckpointError in one line if the place cannot be written."""
    with _saving(path):
        path.mkdir(parents=True, exist_ok=True)


def _use_default_mode(path: Path) -> None:
    """safetensors writes files that only their owner may read; ours are like any other file of the user."""
    if path.is_file():
        path.chmod(0o666 & ~_UMASK)


def _swap_in(draft: Path, target: Path) -> None:
    """Move `draft` to `target`; an older `target` is set aside first and deleted last, because a full directory cannot be replaced."""
    aside = target.parent / f".{target.name}.{os.getpid()}.old"
    if target.exists():
        os.replace(target, aside)
    os.replace(draft, target)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _saving(target: Path) -> Iterator[None]:
    """Turn a failed write into one readable line; safetensors reports a full disk as an error of its own."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}; free some space or choose another place") from error
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {target}: {error}; free some space or choose another place") from error
