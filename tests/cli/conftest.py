"""Running the real entry point in this process: what it prints and how it exits."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, RunCli


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    """run_cli("generate", "hello", stdin="...", terminal=True): the exit code and what went to stdout and stderr."""
    from refusion.cli.main import main

    def run(*arguments: object, stdin: str = "", terminal: bool = False) -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(exit_info.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def edited_model(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model with other entries in config.json; None removes one."""

    def edit(**changes: Any) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(tiny_model_dir, path)
        config = json.loads((path / "config.json").read_text(encoding="utf-8")) | changes
        config = {name: value for name, value in config.items() if value is not None}
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return path

    return edit
