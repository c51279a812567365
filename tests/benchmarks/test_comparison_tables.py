"""Tables of the benchmarks, the comparison, the ablations and of published numbers, each from a small result file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from refusion.errors import DataError
from refusion.evaluation.results import Result, Run, write_result
from refusion.evaluation.statistics import Interval, wilson

Table = Callable[[str], list[str]]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import tables  # type: ignore[import-not-found]  # a script of the benchmarks folder

    return tables


@pytest.fixture
def table(tables: ModuleType, tmp_path: Path) -> Table:
    """The lines of the table of a marker, without provenance."""

    def table(marker: str) -> list[str]:
        text = tables.with_tables(f"<!-- table:{marker} -->\n<!-- /table -->", Path("page.md"), tmp_path)
        return [line for line in text.splitlines() if line.startswith("|")]

    return table


def save(path: Path, name: str, runs: list[Run]) -> None:
    write_result(path / f"{name}.json", Result(name=name, settings={"dtype": "bfloat16"}, runs=runs))


def test_benchmarks_stand_side_by_side_with_the_mean_of_those_all_have(table: Table, tmp_path: Path) -> None:
    def run(label: str, title: str, right: int, length: float) -> Run:
        figures = {
            "score": wilson(right, 100),
            "num_samples": 100,
            "tokens_per_forward": Interval(1.5, 1.4, 1.6),
            "tokens_per_answer": length,
        }
        return Run(label=label, settings={"title": title}, figures=figures)

    save(tmp_path, "base-whole", [run("gsm8k", "GSM8K", 20, 100.0), run("math", "MATH", 10, 100.0)])
    save(tmp_path, "base-part", [run("mmlu_pro", "MMLU-Pro", 30, 50.0)])
    save(tmp_path, "ours", [run("gsm8k", "GSM8K", 40, 200.0), run("mmlu_pro", "MMLU-Pro", 20, 80.0)])
    files = 'base-whole="base" base-part="base" ours="ReFusion"'
    lines = table(f"suite {files}")
    assert lines[0] == "| benchmark | questions | base | ReFusion |"
    assert lines[2] == "| GSM8K | 100 | 20.0 % (13.3–28.9) | 40.0 % (30.9–49.8) |"
    assert lines[3] == "| MATH | 100 | 10.0 % (5.5–17.4) | – |"
    assert lines[5] == "| mean of 2 |  | 25.0 % | 30.0 % |"
    assert table(f"suite-cost {files}")[2] == "| GSM8K | 1.50 | 100 | 1.50 | 200 |"


def test_the_comparison_has_rows_of_contenders_differences_and_ratios(table: Table, tmp_path: Path) -> None:
    accuracy = {"mean_accuracy": Interval(0.6, 0.55, 0.65), "accuracy_gcd": Interval(0.7, 0.6, 0.8)}
    speed = {"tokens_per_second_chat_1": 1500.0, "chat_agreement": Interval(0.9, 0.89, 0.91), "tokens_per_forward": Interval(2.0, 1.9, 2.1)}
    difference = {"mean_accuracy": Interval(-0.012, -0.03, 0.006), "accuracy_gcd": Interval(0.02, 0.0, 0.04)}
    ratios = {"speed_chat_1": Interval(2.5, 2.4, 2.6), "speed_chat_32": 0.8}
    save(
        tmp_path,
        "comparison",
        [
            Run(label="training of refusion-0", settings={"trained": "refusion-0"}, figures={"steps": 400, "validation_mdm": 1.25}),
            Run(label="refusion seed 0", settings={"contender": "refusion", "seed": 0}, figures=accuracy),
            Run(
                label="refusion",
                settings={"contender": "refusion", "seeds": [0, 1], "tasks": ["gcd"], "num_problems": {"gcd": 1500}},
                figures=accuracy | speed,
            ),
            Run(label="only timed", settings={"contender": "x", "seeds": [], "tasks": []}, figures={"tokens_per_second_chat_1": 80.0}),
            Run(label="refusion - y", settings={"first": "refusion", "second": "y", "tasks": ["gcd"]}, figures=difference),
            Run(label="refusion over y", settings={"first": "refusion", "second": "y"}, figures=ratios),
        ],
    )
    assert table("comparison comparison") == [
        "|  | seeds | problems | mean | 95 % interval | gcd |",
        "| :-- | --: | --: | --: | --: | --: |",
        "| refusion | 2 | 1,500 | 60.0 % | 55.0–65.0 | 70.0 % |",
    ]
    assert table("comparison-training comparison")[2:] == ["| refusion-0 | 400 | – | – | – | 1.250 |"]
    cost = table("comparison-cost comparison")
    assert cost[0] == "|  | tokens per forward, tasks | chat | chat, batch 1: tokens/s | agreement | base NLL | own NLL |"
    assert cost[2:] == ["| refusion | 2.00 | – | 1,500 | 90.0 % | – | – |", "| only timed | – | – | 80 | – | – | – |"]
    assert table("differences comparison")[2] == "| refusion - y | -1.2 (-3.0 to +0.6) | +2.0 (+0.0 to +4.0) |"
    assert table("ratios comparison")[2] == "| refusion over y | 2.50× (2.40–2.60) | 0.80× |"
    assert table('ratios comparison="y"') == table("ratios comparison")
    with pytest.raises(DataError, match="no speeds over refusion"):
        table('ratios comparison="refusion"')


def test_speeds_of_turns_with_first_runs_are_marked_and_what_rests_on_them(tables: ModuleType, tmp_path: Path) -> None:
    def contender(name: str, **figures: float) -> Run:
        return Run(label=name, settings={"contender": name, "seeds": [0], "tasks": []}, figures=figures)

    speeds = {"tokens_per_second_chat_1": 1500.0, "tokens_per_second_chat_32": 7747.0, "tokens_per_second_tasks_32": 900.0}
    ratio = Run(label="x over y", settings={"first": "x", "second": "y"}, figures={"speed_chat_1": 2.0, "speed_chat_32": 0.5})
    clean = contender("y", **speeds, first_runs_chat_32=0, first_runs_tasks_32=0)
    save(tmp_path, "dirty", [contender("x", **speeds, first_runs_chat_32=8, first_runs_tasks_32=0), clean, ratio])
    save(tmp_path, "clean", [clean, ratio])

    def lines(marker: str) -> list[str]:
        return tables.with_tables(f"<!-- table:{marker} -->\n<!-- /table -->", Path("page.md"), tmp_path).splitlines()

    cost = lines("comparison-cost dirty")
    assert cost[4] == "| x | – | – | 1,500 | 7,747* | 900 | – | – | – |"
    assert cost[5] == "| y | – | – | 1,500 | 7,747 | 900 | – | – | – |"
    assert cost[7].startswith("`*`: too low")
    ratios = lines("ratios dirty")
    assert (ratios[4], ratios[6][:12]) == ("| x over y | 2.00× | 0.50×* |", "`*`: rests o")
    assert not [line for kind in ("comparison-cost", "ratios") for line in lines(f"{kind} clean") if line.startswith("`*`")]


def test_ablations_show_one_group(table: Table, tmp_path: Path) -> None:
    figures = {"accuracy": Interval(0.5, 0.4, 0.6), "tokens_per_forward": Interval(3.0, 2.9, 3.1)}
    timed = figures | {"tokens_per_second": 1200.0, "over_autoregressive": 1.5}
    runs = [Run(label="slots: 8 in 32", settings={"group": "slots", "label": "8 in 32"}, figures=timed)]
    runs.append(Run(label="kv: anew", settings={"group": "kv", "label": "anew"}, figures=figures))
    save(tmp_path, "ablations", runs)
    assert table('ablations ablations="slots"')[2:] == ["| 8 in 32 | 50.0 % | 40.0–60.0 | 3.00 | 1,200 | 1.50 | – | – |"]
    assert table("ablations ablations")[3] == "| kv: anew | 50.0 % | 40.0–60.0 | 3.00 | – | – | – | – |"
    with pytest.raises(DataError, match="has no arms of magic"):
        table('ablations ablations="magic"')


def test_published_claims_carry_condition_and_source(table: Table, tmp_path: Path) -> None:
    claim = {"what": "speed", "value": "2×", "conditions": "batch 1", "source": "a paper"}
    (tmp_path / "published.json").write_text(json.dumps({"claims": [claim]}))
    assert table("published published")[2] == "| speed | 2× | batch 1 | a paper |"
    (tmp_path / "published.json").write_text(json.dumps({"claims": [{"what": "speed", "value": 2}]}))
    with pytest.raises(DataError, match="a claim is text in what, value"):
        table("published published")
