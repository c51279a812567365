"""Whole runs on a tiny model: result file, log, resuming, one setting for all, and scorers that fail."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import datasets
from benchmark_rows import edit_json, write_rows
from lm_eval.api.task import ConfigurableTask

from refusion.decoding.params import SamplingParams, SlotParams
from refusion.errors import CheckpointError, ConfigError, DataError
from refusion.evaluation import answer_scoring, suite
from refusion.evaluation.benchmark_data import MADE_UP
from refusion.evaluation.benchmarks import BENCHMARKS, as_asked, load_tasks, task_configs
from refusion.evaluation.harness import ReFusionLM
from refusion.evaluation.results import read_result
from refusion.evaluation.suite import SuiteSettings, run_suite, samples_directory
from refusion.llm import LLM

FAST = ("gsm8k", "arc_challenge")


@pytest.fixture(scope="module")
def llm(roomy_model_dir: Path) -> LLM:
    return LLM.from_pretrained(roomy_model_dir, dtype="float32")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 new tokens instead of 512."""

    def configs(benchmark: Any) -> list[dict[str, Any]]:
        found = task_configs(benchmark)
        return [config | {"generation_kwargs": config["generation_kwargs"] | {"max_gen_toks": 24}} for config in found]

    monkeypatch.setattr("refusion.evaluation.benchmarks.task_configs", configs)


@pytest.fixture
def two_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with two cores, however few answers there are."""
    monkeypatch.setattr(answer_scoring, "num_cores", lambda: 2)
    monkeypatch.setattr(answer_scoring, "ANSWERS_AT_ONCE", 1)


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refusion.evaluation.harness.chunk_size", lambda lm: 1)


def run(llm: LLM, data: Path, output: Path, **options: Any) -> dict[str, Any]:
    extra = {name: options.pop(name) for name in ("resume", "on_missing", "on_progress") if name in options}
    settings = SuiteSettings(**({"data": data, "tasks": FAST, "decoder": "autoregressive"} | options))
    return run_suite(llm, settings, output, model_name="tiny", **extra)


def rows(output: Path, name: str) -> list[dict[str, Any]]:
    lines = (samples_directory(output) / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def untimed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def test_all_seven_run_end_to_end(llm: LLM, data_dir: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    content = run(
        llm, data_dir, tmp_path / "all.json", tasks=(), decoder="refusion", on_progress=lambda b, *count: seen.append((b.name, *count))
    )
    assert content == json.loads(json.dumps(read_result(tmp_path / "all.json")))
    assert [found["label"] for found in content["runs"]] == ["mmlu_pro", "arc_challenge", "gsm8k", "math", "gpqa", "humaneval", "mbpp"]
    for found in content["runs"]:
        assert found["figures"]["num_scorer_errors"] == 0, rows(tmp_path / "all.json", found["label"])
        assert found["figures"]["tokens_per_forward"]["value"] > 0
        assert found["figures"]["tokens_per_second"] > 0
        assert {"low", "high"} <= found["figures"]["score"].keys()
    gsm8k = next(found for found in content["runs"] if found["label"] == "gsm8k")
    assert gsm8k["settings"]["slots"]["serial_blocks"] == 4
    assert "exact_match,strict-match" in gsm8k["figures"]
    assert content["figures"]["num_benchmarks"] == 7
    assert seen[-1] == ("mbpp", 2, 2)
    (first, *_) = rows(tmp_path / "all.json", "gsm8k")
    assert {"prompt", "response", "target", "filtered", "scores", "num_tokens", "num_forwards", "finish_reason"} <= first.keys()
    assert all("prompt" not in row for row in rows(tmp_path / "all.json", "gpqa"))  # its authors' wish


def test_right_answers_score(llm: LLM, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "gsm8k": "It is so. The answer is 2.", "math": "Thus $\\boxed{2}$.", "arc_challenge": " B", "mmlu_pro": "the answer is (C)",
        "gpqa": "It is (A) or (B), no: The answer is (C).",
        "humaneval": "def double(x):\n    return 2 * x\n```", "mbpp": "```python\ndef double(x):\n    return 2 * x\n```\n",
    }  # fmt: skip
    real = suite._answer

    def fixed(lm: Any, benchmark: Any, group: Any, settings: Any) -> Any:
        outputs = llm.generate(["x"] * len(group), SamplingParams(max_tokens=2), decoder="autoregressive")
        told = [type(o)(o.prompt_ids, o.token_ids, answers[benchmark.name], o.finish_reason, o.stats) for o in outputs]
        monkeypatch.setattr(lm, "answer", lambda contexts, options: told)
        return real(lm, benchmark, group, settings)

    monkeypatch.setattr(suite, "_answer", fixed)
    content = run(llm, data_dir, tmp_path / "right.json", tasks=tuple(answers))
    scores = {found["label"]: found["figures"]["score"]["value"] for found in content["runs"]}
    is_third = [row["target"] == "(C)" for row in rows(tmp_path / "right.json", "gpqa")]
    assert scores.pop("gpqa") == sum(is_third) / 2 == 0.5
    assert scores == {"gsm8k": 0.5, "math": 1.0, "arc_challenge": 0.5, "mmlu_pro": 1.0, "humaneval": 1.0, "mbpp": 1.0}


def test_a_run_that_was_interrupted_goes_on_and_counts_nothing_twice(
    llm: LLM, data_dir: Path, tmp_path: Path, one_at_a_time: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(llm, data_dir, tmp_path / "whole.json")
    calls: Iterator[int] = iter(range(100))
    real = suite._answer

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(suite, "_answer", interrupted)
    output = tmp_path / "broken.json"
    with pytest.raises(KeyboardInterrupt):
        run(llm, data_dir, output)
    assert not output.exists()
    with pytest.raises(DataError, match="add --resume"):
        run(llm, data_dir, output)
    with pytest.raises(DataError, match="made with decoder=autoregressive, not refusion"):
        run(llm, data_dir, output, decoder="refusion", resume=True)
    resumed = run(llm, data_dir, output, resume=True)
    assert next(calls) == 5  # four questions, one of them asked twice
    for name in FAST:
        assert untimed(rows(output, name)) == untimed(rows(tmp_path / "whole.json", name))
    for one, other in zip(resumed["runs"], whole["runs"], strict=True):
        assert one["figures"]["score"] == other["figures"]["score"]
        assert one["figures"]["num_samples"] == other["figures"]["num_samples"] == 2


def test_a_small_run_may_grow(llm: LLM, data_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "grow.json"
    assert run(llm, data_dir, output, limit=1, tasks=("gsm8k",))["runs"][0]["figures"]["num_samples"] == 1
    assert run(llm, data_dir, output, resume=True)["runs"][1]["figures"]["num_samples"] == 2
    assert [row["doc_id"] for row in rows(output, "gsm8k")] == [0, 1]
    lines = (data_dir / "gsm8k" / "test.jsonl").read_text().splitlines()
    (data_dir / "gsm8k" / "test.jsonl").write_text("\n".join(reversed(lines)))
    with pytest.raises(DataError, match="holds another question 0"):
        run(llm, data_dir, output, resume=True)


def test_a_scorer_that_fails_on_one_answer_is_recorded(llm: LLM, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.task import ConfigurableTask

    real = ConfigurableTask.process_results

    def fragile(self: Any, doc: dict[str, Any], results: Any) -> Any:
        if "(2)" in doc["question"]:
            raise RecursionError("too deep")
        return real(self, doc, results)

    monkeypatch.setattr(ConfigurableTask, "process_results", fragile)
    content = run(llm, data_dir, tmp_path / "odd.json", tasks=("gsm8k",))
    figures = content["runs"][0]["figures"]
    assert (figures["num_samples"], figures["num_scorer_errors"]) == (2, 1)
    assert [row["error"] for row in rows(tmp_path / "odd.json", "gsm8k")] == ["RecursionError: too deep", None]


def test_one_setting_for_all_replaces_the_papers(llm: LLM, data_dir: Path, tmp_path: Path) -> None:
    slots = SlotParams(slot_size=4, block_size=8)
    content = run(llm, data_dir, tmp_path / "one.json", decoder="refusion", setting="one", slots=slots)
    assert {found["settings"]["slots"]["block_size"] for found in content["runs"]} == {8}
    assert content["settings"]["slots"] == {"slot_size": 4, "block_size": 8}
    with pytest.raises(ConfigError, match="setting is 'paper', which brings its own slot settings"):
        SuiteSettings(slots=slots)


def test_missing_rows_leave_out_one_benchmark_only(llm: LLM, data_dir: Path, tmp_path: Path) -> None:
    (data_dir / "gsm8k" / "test.jsonl").unlink()
    told: list[str] = []
    content = run(llm, data_dir, tmp_path / "some.json", on_missing=told.append)
    assert [found["label"] for found in content["runs"]] == ["arc_challenge"]
    assert "no rows of gsm8k" in told[0]
    assert "no rows of gsm8k" in content["notes"]
    with pytest.raises(DataError, match="no rows of gsm8k"):
        run(llm, data_dir, tmp_path / "none.json", tasks=("gsm8k",))


def test_made_up_rows_bear_another_name_and_count_in_no_mean(llm: LLM, data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "gpqa" / "train.jsonl"
    made_up = [json.loads(line) | {"Record ID": f"{MADE_UP}-{i}"} for i, line in enumerate(path.read_text().splitlines())]
    write_rows(path, made_up)
    content = run(llm, data_dir, tmp_path / "mixed.json", tasks=("gsm8k", "gpqa"))
    assert [found["label"] for found in content["runs"]] == ["gsm8k", "gpqa_made_up"]
    assert content["figures"]["num_benchmarks"] == 1
    assert content["figures"]["mean_score"] == content["runs"][0]["figures"]["score"]["value"]
    assert "gpqa_made_up: made-up questions" in content["notes"]
    assert all("prompt" in row for row in rows(tmp_path / "mixed.json", "gpqa_made_up"))


def test_one_made_up_row_makes_no_secret_public() -> None:
    """Rows of the authors stay confidential beside it."""
    for ids, is_confidential in ((["recA", f"{MADE_UP}-1"], True), ([f"{MADE_UP}-0", f"{MADE_UP}-1"], False)):
        task = SimpleNamespace(eval_docs=datasets.Dataset.from_dict({"Record ID": ids}))
        found = as_asked(BENCHMARKS["gpqa"], [task])  # type: ignore[list-item]
        assert (found.is_made_up, found.is_confidential) == (True, is_confidential)


def test_a_checkpoint_without_mask_token_cannot_infill(roomy_model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in roomy_model_dir.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    edit_json(bare / "config.json", mask_token_id=None)
    with pytest.raises(CheckpointError, match="no mask token"):
        run(LLM.from_pretrained(bare), data_dir, tmp_path / "bare.json", decoder="refusion")
    assert not samples_directory(tmp_path / "bare.json").exists()


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("batch_size", 0), ("setting", "two"), ("tasks", ("gsm9k",)), ("suite", "all")])
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        SuiteSettings(**{name: value})


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot be copied safely")
def test_formulas_are_compared_in_copies_of_the_process_with_the_same_outcome(
    llm: LLM, data_dir: Path, tmp_path: Path, two_scorers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(llm, data_dir, tmp_path / "copies.json", tasks=("math",))
    monkeypatch.setattr(answer_scoring, "MOST_SCORERS", 1)
    run(llm, data_dir, tmp_path / "here.json", tasks=("math",))
    assert untimed(rows(tmp_path / "copies.json", "math")) == untimed(rows(tmp_path / "here.json", "math"))
    monkeypatch.setattr(answer_scoring, "_scored", lambda *_: {"filtered": {}, "scores": {"process": os.getpid()}, "error": None})
    for most, is_here in ((2, False), (1, True)):
        monkeypatch.setattr(answer_scoring, "MOST_SCORERS", most)
        run(llm, data_dir, tmp_path / f"{most}.json", tasks=("math",))
        assert all((row["scores"]["process"] == os.getpid()) == is_here for row in rows(tmp_path / f"{most}.json", "math"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot be copied safely")
def test_a_scorer_that_tells_something_waits_for_no_lock_of_the_bar(two_scorers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar(io.StringIO):
        """A stream whose lock another thread held when the process was copied."""

        def write(self, text: str) -> int:
            raise AssertionError("a copy of this process would wait for ever")

    def scored(*_: Any) -> dict[str, Any]:
        print("a formula took too long", file=sys.stderr)
        return {"filtered": {}, "scores": {}, "error": None}

    monkeypatch.setattr(answer_scoring, "_scored", scored)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Bar())
        assert len(answer_scoring.score_all(BENCHMARKS["math"], [()] * 4)) == 4  # pyright: ignore[reportArgumentType]: nobody looks at them


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot be copied safely")
def test_scorers_collect_no_garbage_of_the_run(two_scorers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        """Stands for a graph or an event, which only the process that made it can free."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    def scored(*_: Any) -> dict[str, Any]:
        gc.collect()
        return {"filtered": {}, "scores": {}, "error": None}

    monkeypatch.setattr(answer_scoring, "_scored", scored)
    gc.disable()
    try:
        OnGpu()
        answer_scoring.score_all(BENCHMARKS["math"], [()] * 4)  # pyright: ignore[reportArgumentType]: nobody looks at them
    finally:
        gc.enable()
    gc.collect()
    assert [file.name for file in tmp_path.iterdir()] == [str(os.getpid())]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot be copied safely")
def test_an_answer_that_ends_its_scorer_is_recorded(two_scorers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(name: str) -> dict[str, Any]:
        if name == "fatal":
            os._exit(9)
        return {"filtered": {"none": name}, "scores": {}, "error": None}

    monkeypatch.setattr(answer_scoring, "_scored", scored)
    answers: Any = [("first",), ("fatal",), ("last",)]
    found = answer_scoring.score_all(BENCHMARKS["math"], answers)
    assert [row["filtered"].get("none") for row in found] == ["first", None, "last"]
    assert [row["error"] is None for row in found] == [True, False, True]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot be copied safely")
def test_scorers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    script = """
import os, pathlib, sys, time
from refusion.evaluation import answer_scoring
from refusion.evaluation.benchmarks import BENCHMARKS

def scored(*_):
    pathlib.Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(60)

answer_scoring._scored, answer_scoring.num_cores, answer_scoring.ANSWERS_AT_ONCE = scored, lambda: 2, 1
answer_scoring.score_all(BENCHMARKS["math"], [()] * 4)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) as run:
        assert comes_true(lambda: len(list(tmp_path.iterdir())) == 2)
        run.kill()
    assert comes_true(lambda: not any(is_running(int(file.name)) for file in tmp_path.iterdir()))


def comes_true(claim: Callable[[], bool], seconds: float = 20) -> bool:
    ends = time.monotonic() + seconds
    while not claim() and time.monotonic() < ends:
        time.sleep(0.05)
    return claim()


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that nobody has collected yet has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_rows_are_read_once_and_not_for_every_question(llm: LLM, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ConfigurableTask.eval_docs.fget
    assert read is not None, "it is a property"
    num_reads = 0

    def counted(task: ConfigurableTask) -> Any:
        nonlocal num_reads
        num_reads += 1
        return read(task)

    tasks = load_tasks(BENCHMARKS["mmlu_pro"], data_dir)
    monkeypatch.setattr(ConfigurableTask, "eval_docs", property(counted))
    asked = suite.questions(tasks, ReFusionLM(llm, decoder="autoregressive"), None)
    assert (len(asked) >= len(tasks), num_reads) == (True, len(tasks))
    assert [question.doc_id for question in asked[: len(tasks)]] == [0] * len(tasks)
