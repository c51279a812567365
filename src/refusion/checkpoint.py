"""A checkpoint directory in the plain Hugging Face layout, file by file: JSON settings and safetensors, one file or shards.

Only reading and writing; what the tensors mean is up to the caller. Pickled weights are refused, not loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusion.errors import CheckpointError

if TYPE_CHECKING:
    from safetensors import safe_open
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises CheckpointError if there are none or one of the index is missing."""
    if (path / INDEX).is_file():
        files = [path / name for name in sorted(set(read_json(path / INDEX)["weight_map"].values()))]
    else:
        files = [path / WEIGHTS]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; a checkpoint needs its weights as safetensors (pickled weights are not read)")
    return files


@contextmanager
def open_tensors(file: Path) -> Iterator[safe_open]:
    """One safetensors file, of which tensors can be read by name. Raises CheckpointError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; it is damaged or truncated, fetch it again") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises CheckpointError if it is damaged."""
    with open_tensors(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  (it is no mapping)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint by name."""
    return {name: tensor for file in weight_files(path) for name, tensor in read_tensors(file).items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if the file is missing or malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a checkpoint directory holds config.json, safetensors and a tokenizer") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, readable."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def side_files(path: Path) -> Iterator[Path]:
    """What belongs to a checkpoint beside config and weights: tokenizer, template, generation settings, licence."""
    for pattern in (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "chat_template*",
        "generation_config.json",
        "LICENSE*",
        "NOTICE*",
    ):
        yield from (file for file in sorted(path.glob(pattern)) if file.is_file())
