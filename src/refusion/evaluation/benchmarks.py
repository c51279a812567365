"""The paper's seven benchmarks as tasks of lm-evaluation-harness: names, what counts, and their definitions.

A definition is a file in `tasks/`: `bases` names the harness's own definitions, the rest overrides them; prompts, lengths and the paper's
decoding settings stand there. The two code benchmarks stand alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusion.errors import ConfigError, DataError
from refusion.evaluation.benchmark_data import MADE_UP, load_split

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

TASKS = Path(__file__).with_name("tasks")


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One column of the paper's table."""

    name: str
    title: str
    score: str
    """The figure that counts, as lm-eval names it: metric,filter. Others are reported beside it."""
    is_code: bool = False
    """Scoring runs programs, several at a time."""
    is_algebra: bool = False
    """Scoring compares formulas, a tenth of a second each and under alarms: in several copies of this process."""
    is_confidential: bool = False
    """Its authors ask that the questions stay off the web: logs hold no prompt."""
    needs: str | None = None
    """Package that its scorer imports."""
    is_made_up: bool = False
    """Its rows are made up to try the task: the score says nothing about the benchmark and counts in no mean."""


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(name="mmlu_pro", title="MMLU-Pro", score="exact_match,custom-extract"),
        Benchmark(name="arc_challenge", title="ARC-Challenge", score="exact_match,remove_whitespace"),
        Benchmark(name="gsm8k", title="GSM8K", score="exact_match,flexible-extract"),
        Benchmark(name="math", title="MATH", score="math_verify,none", needs="math_verify", is_algebra=True),
        Benchmark(name="gpqa", title="GPQA", score="exact_match,flexible-extract", is_confidential=True),
        Benchmark(name="humaneval", title="HumanEval", score="pass_at_1,create_test", is_code=True),
        Benchmark(name="mbpp", title="MBPP", score="pass_at_1,extract_code", is_code=True),
    )
}

SUITES = {"paper": tuple(BENCHMARKS)}
"""Suite -> its benchmarks, in the order of the paper's table."""


def choose(suite: str, names: Sequence[str] = ()) -> list[Benchmark]:
    """The benchmarks of a suite, or those named. Raises ConfigError with the nearest name for one that is unknown."""
    if suite not in SUITES:
        raise ConfigError(f"suite is {suite!r}; {_nearest(suite, SUITES)}")
    for name in names:
        if name not in SUITES[suite]:
            raise ConfigError(f"tasks has {name!r}; {_nearest(name, SUITES[suite])}")
    return [BENCHMARKS[name] for name in SUITES[suite] if name in (names or SUITES[suite])]


def load_tasks(benchmark: Benchmark, data: Path | None) -> list[ConfigurableTask]:
    """The harness's tasks of a benchmark with their rows. Raises DataError if rows or scorer are missing."""
    if benchmark.needs and find_spec(benchmark.needs) is None:
        raise DataError(f"{benchmark.name} needs {benchmark.needs}; install it with `pip install 'refusion[eval]'`")
    rows: dict[tuple[str, str | None], Any] = {}
    return [_task(config, data, rows) for config in task_configs(benchmark)]


def as_asked(benchmark: Benchmark, tasks: Sequence[ConfigurableTask]) -> Benchmark:
    """The benchmark, under a name and title of its own if any row is made up, so that nobody takes its score for the benchmark's."""
    docs: list[Any] = [task.eval_docs for task in tasks]
    ids = [record for rows in docs if "Record ID" in rows.column_names for record in rows["Record ID"]]
    if not any(str(record).startswith(MADE_UP) for record in ids):
        return benchmark
    name, title = f"{benchmark.name}_made_up", f"{benchmark.title} (made-up rows)"
    is_confidential = benchmark.is_confidential and not all(str(record).startswith(MADE_UP) for record in ids)
    return replace(benchmark, name=name, title=title, is_confidential=is_confidential, is_made_up=True)


def task_configs(benchmark: Benchmark) -> list[dict[str, Any]]:
    """One harness configuration per base of the definition, with our overrides."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    ours = load_yaml(TASKS / f"{benchmark.name}.yaml")
    bases = ours.pop("bases", None)
    stock = Path(lm_eval.tasks.__file__).parent
    configs = [ours] if bases is None else [load_yaml(stock / base) | ours for base in bases]
    return [{key: value for key, value in config.items() if key not in ("tag", "group", "task_list")} for config in configs]


def _task(config: dict[str, Any], data: Path | None, rows: dict[tuple[str, str | None], Any]) -> ConfigurableTask:
    from lm_eval.api.task import ConfigurableTask

    try:
        return ConfigurableTask(config=config | {"custom_dataset": _Rows(config, data, rows)})
    except IndexError as error:  # it looks at the first row
        raise DataError(f"there is no row for {config['task']}; give --data the whole {config['dataset_path']}") from error


class _Rows:
    """Stands where the harness would call `datasets.load_dataset` by a name on the hub; tasks of the same rows load them once."""

    def __init__(self, config: dict[str, Any], data: Path | None, loaded: dict[tuple[str, str | None], Any]) -> None:
        self.source, self.data, self.loaded = (config["dataset_path"], config.get("dataset_name")), data, loaded

    def __call__(self, **_: Any) -> Any:
        if self.source not in self.loaded:
            self.loaded[self.source] = load_split(*self.source, self.data)
        return self.loaded[self.source]


def _nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = get_close_matches(name, known, 1)
    return (f"did you mean {near[0]}? " if near else "") + f"it must be one of {', '.join(known)}"
