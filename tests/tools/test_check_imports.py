from __future__ import annotations

from pathlib import Path

import pytest
from check_imports import find_offences, main


def _offences(tmp_path: Path, name: str, source: str) -> list[str]:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    return list(find_offences(file, tmp_path))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("decoding/refusion.py", "from refusion.engine import Engine"),
        ("decoding/refusion.py", "def f():\n    import refusion.llm"),
        ("model/config.py", "from ..decoding import params"),
        ("hub.py", "from refusion import LLM"),
        ("evaluation/tables.py", "from refusion.serving import app"),
        ("training/trainer.py", "from refusion.model import Transformer"),
        ("novelty.py", ""),
    ],
)
def test_sideways_and_upward_imports_are_found(tmp_path: Path, name: str, source: str) -> None:
    assert len(_offences(tmp_path, name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("decoding/refusion.py", "from refusion.model.cache import Cache\nfrom refusion.decoding import params\nimport torch"),
        ("cli/main.py", "from refusion import __version__, hub"),
        ("training/trainer.py", "from refusion import slots\nfrom .loss import hybrid_loss"),
        ("llm.py", "from refusion.engine import Engine"),
    ],
)
def test_downward_imports_pass(tmp_path: Path, name: str, source: str) -> None:
    assert _offences(tmp_path, name, source) == []


def test_the_exit_code_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hub.py").write_text("import refusion.cli")
    assert main(tmp_path) == 1
    assert "hub.py:1: hub must not import cli" in capsys.readouterr().err
    (tmp_path / "hub.py").write_text("import refusion.errors")
    assert main(tmp_path) == 0
