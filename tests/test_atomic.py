from __future__ import annotations

import errno
from pathlib import Path

import pytest

from refusion.atomic import atomic_directory, atomic_file
from refusion.errors import CheckpointError


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "model") as draft:
        (draft / "file").write_text("x")
        assert not (tmp_path / "deep" / "model").exists()
    assert (tmp_path / "deep" / "model" / "file").read_text() == "x"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_files_get_the_users_usual_mode(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    with atomic_directory(tmp_path / "model") as draft:
        (draft / "file").touch(mode=0o600)
    assert (tmp_path / "model" / "file").stat().st_mode == usual.stat().st_mode


def test_a_failure_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as draft:
        (draft / "file").write_text("old")
    with pytest.raises(CheckpointError, match=r"cannot write .*model: No space left"), atomic_directory(target, replace=True) as draft:
        (draft / "file").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_old_directory_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("old", "new"):
        with atomic_directory(target, replace=True) as draft:
            (draft / name).touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(target):
        pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with atomic_file(target) as draft:
        draft.write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_file(target) as draft:
        draft.write_text("half")
        raise ValueError("stop")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
