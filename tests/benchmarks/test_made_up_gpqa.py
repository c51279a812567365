"""Made-up questions in GPQA's layout: well formed, the same for a seed, and never in the place of real ones."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("datasets")

from refusion.errors import ConfigError, DataError
from refusion.evaluation.benchmark_data import SOURCES, load_split, read_table
from refusion.evaluation.multiple_choice import shuffle_gpqa

GPQA = SOURCES["Idavidrein/gpqa"]
Write = Callable[..., Path]


@pytest.fixture
def made_up_gpqa(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import made_up_gpqa  # type: ignore[import-not-found]  # a script of the benchmarks folder

    return made_up_gpqa


@pytest.fixture
def write(made_up_gpqa: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Write:
    def write(*options: object) -> Path:
        monkeypatch.setattr(sys, "argv", ["made_up_gpqa.py", str(tmp_path), *map(str, options)])
        made_up_gpqa.main()
        return tmp_path / "gpqa" / "train.csv"

    return write


def test_every_question_has_four_different_options_and_says_that_it_is_made_up(write: Write) -> None:
    rows = read_table(write())
    assert len({row["Question"] for row in rows}) == len(rows) == 198
    assert all(len({row[name] for name in GPQA.columns[1:]}) == 4 for row in rows)
    assert all(row["Record ID"].startswith("made-up-0-") and row["High-level domain"] == "made up" for row in rows)


def test_the_task_reads_them_and_the_right_letter_is_spread_over_all_four(write: Write) -> None:
    path = write("--questions", 400)
    asked = shuffle_gpqa(load_split(GPQA.hub, "gpqa_main", path.parents[1])["train"])
    letters = Counter(asked["answer"])
    assert set(letters) == {"(A)", "(B)", "(C)", "(D)"}
    assert min(letters.values()) > 60  # 100 each are expected; so few would be 4.6 standard deviations
    assert all(row["choices"]["ABCD".index(row["answer"][1])] == row["Correct Answer"] for row in asked)


def test_right_answers_are_right(made_up_gpqa: ModuleType) -> None:
    for row in made_up_gpqa.rows(200, 3):
        words = row["Question"].rstrip("?").split()
        if row["Subdomain"] == "arithmetic":
            assert int(row["Correct Answer"]) == int(words[2]) + int(words[4]) * int(words[6])
        elif row["Subdomain"] == "remainder":
            assert int(row["Correct Answer"]) == int(words[4]) % int(words[8])
        elif row["Subdomain"] == "order":
            older, younger = words[0:-4:5], words[4:-4:5]
            (extreme,) = set(older) - {name.rstrip(".") for name in younger} if words[-1] == "oldest" else (
                {name.rstrip(".") for name in younger} - set(older)
            )  # fmt: skip
            assert row["Correct Answer"] == extreme


def test_a_seed_gives_the_same_rows_and_another_one_others(write: Write) -> None:
    first = write("--questions", 9).read_bytes()
    assert write("--questions", 9).read_bytes() == first  # its own file is written anew
    assert write("--questions", 9, "--seed", 1).read_bytes() != first


def test_other_rows_are_neither_lost_nor_hidden(write: Write, tmp_path: Path) -> None:
    (tmp_path / "gpqa").mkdir()
    theirs = tmp_path / "gpqa" / "gpqa_main.csv"
    theirs.write_text(",".join(GPQA.columns) + "\na,b,c,d,e\n")
    with pytest.raises(DataError, match=r"gpqa_main\.csv is there already"):
        write()
    theirs.rename(tmp_path / "gpqa" / "train.csv")
    with pytest.raises(DataError, match=r"train\.csv is there already and not made up"):
        write()
    with pytest.raises(ConfigError, match="questions is 0"):
        write("--questions", 0)
