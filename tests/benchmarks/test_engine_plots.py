"""The pictures of forwards and serving: drawn from result files, the same twice, refused without figures."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from refusion.evaluation.results import Result, Run, write_result

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Script = Callable[..., tuple[int, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Script:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def script(*options: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["engine_plots.py", "--output", str(tmp_path), *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(BENCHMARKS / "engine_plots.py"), run_name="__main__")
        return int(stop.value.code or 0), capsys.readouterr().err

    return script


def written(path: Path, *runs: Run) -> Path:
    write_result(path, Result(name=path.stem, settings={}, runs=list(runs)))
    return path


def forward(label: str, **figures: float) -> Run:
    return Run(label=f"tiny, 16 cached: {label}", settings={}, figures={f"forward_ms_{rows[1:]}": ms for rows, ms in figures.items()})


def test_plots_show_every_line_once_and_are_the_same_twice(script: Script, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = written(
        tmp_path / "a.json", forward("floor", t1=1.0, t8=1.0), forward("static", t1=9.0, t8=9.0), forward("mark of an H100", t1=5.0)
    )
    later = written(tmp_path / "b.json", forward("static", t1=2.0, t8=3.0))
    loads = [
        Run(label="", settings={"decoder": decoder, "concurrency": count}, figures={"tokens_per_second": 10.0 * count})
        for decoder in ("autoregressive", "refusion")
        for count in (1, 4)
    ]
    serving = written(tmp_path / "serving.json", *loads, Run(label="compared", settings={}, figures={"auto_over_better": 1.0}))
    drawn = []
    for _ in range(2):
        code, err = script("--forwards", first, later, "--serving", serving)
        assert code == 0, err
        drawn.append([(tmp_path / f"engine-{name}.svg").read_text() for name in ("forwards", "serving")])
    assert drawn[0] == drawn[1]
    forwards, loads_drawn = drawn[0]
    assert forwards.count(">16 cached<") == 1, "the later file takes the place of the first"
    assert ">16 cached, weights and cache read once<" in forwards
    assert "H100" not in forwards
    assert [loads_drawn.count(f">{name}<") for name in ("autoregressive", "refusion", "auto")] == [1, 1, 0]


def test_a_later_file_takes_the_place_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import engine_plots  # pyright: ignore[reportMissingImports]  (a script)

    files = [
        written(tmp_path / "a.json", forward("static", t8=9.0, t1=9.0)),
        written(tmp_path / "b.json", forward("static", t1=2.0, t16=3.0)),
    ]
    assert engine_plots.forward_lines(files) == {"tiny": {"16 cached: static": {1: 2.0, 16: 3.0}}}


def test_files_without_figures_are_refused(script: Script, tmp_path: Path) -> None:
    empty = written(tmp_path / "empty.json", Run(label="nothing", settings={}, figures={"speed": 1.0}))
    code, err = script("--forwards", empty)
    assert (code, "no forwards" in err) == (1, True)
    code, err = script("--forwards", written(tmp_path / "a.json", forward("static", t1=1.0)), "--serving", empty)
    assert (code, "no speeds" in err) == (1, True)
