from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from refusion import LLM
from refusion.evaluation.results import read_result
from refusion.synthesis.jsonl import write_rows
from refusion.synthesis.predictable import make

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a benchmark script in this process: exit code, standard output, standard error."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name: str, *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def chat_data(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl.gz"
    write_rows(path, [{"query": f"question {i}", "response": "x"} for i in range(4)])
    return path


def test_chat_writes_one_run_per_setting_with_its_slots_printed_whole(
    run: Run, tmp_path: Path, chat_data: Path, tiny_model_dir: Path
) -> None:
    sweep = tmp_path / "sweep.json"
    sweep.write_text(
        json.dumps([{"decoder": "autoregressive"}, {"slot_size": 4, "block_size": 8, "acceptance": "argmax", "label": "narrow"}])
    )
    output, texts = tmp_path / "chat.json", tmp_path / "texts.jsonl"
    options = ["--dtype", "float32", "--data", chat_data, "--rows", "1:4", "--max-tokens", 12, "--sweep", sweep]
    code, out, err = run("chat", "--model", tiny_model_dir, "--base", tiny_model_dir, *options, "--output", output, "--save-texts", texts)
    assert code == 0, err
    content = read_result(output)
    greedy, narrow = content["runs"]
    assert greedy["figures"]["agreement"]["value"] == 1.0  # the model is its own base
    assert greedy["figures"]["tokens_per_forward"]["value"] == 1.0
    assert narrow["label"] == "narrow"
    assert narrow["settings"]["slots"]["slot_size"] == 4
    assert narrow["settings"]["slots"]["slot_threshold"] is not None
    assert content["settings"]["num_prompts"] == 3
    assert len(out.splitlines()) == 2
    assert len(texts.read_text().splitlines()) == 6


def test_tasks_count_right_answers_per_family(run: Run, tmp_path: Path, tiny_model_dir: Path) -> None:
    output = tmp_path / "tasks.json"
    options = ["--dtype", "float32", "--max-tokens", 8, "--limit", 7, "--slot-size", 4, "--token-threshold", 0.2]
    code, _out, err = run("tasks", "--model", tiny_model_dir, *options, "--output", output)
    assert code == 0, err
    content = read_result(output)
    assert content["figures"]["accuracy"]["value"] == 0.0
    assert {name for name in content["figures"] if name.startswith("accuracy_")} >= {"accuracy_addition", "accuracy_function"}
    assert content["settings"]["slots"]["token_threshold"] == 0.2


def test_answers_are_judged_by_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    judge = runpy.run_path(str(BENCHMARKS / "tasks.py"))["judge"]
    rows = make(9, 14)
    assert judge(rows, [row["response"] for row in rows]) == [True] * 14
    assert judge(rows, ["```python\ndef f(): pass\n```"] * 14) == [False] * 14


def test_batch_one_speed_and_forward_times(run: Run, tmp_path: Path, chat_data: Path, tiny_model_dir: Path) -> None:
    output = tmp_path / "cpu.json"
    options = ["--num-prompts", 2, "--max-tokens", 8, "--repeats", 1, "--threads", 1, "--data", chat_data]
    code, _out, err = run("cpu", "--model", tiny_model_dir, "--base", tiny_model_dir, *options, "--output", output)
    assert code == 0, err
    labels = [item["label"] for item in read_result(output)["runs"]]
    assert labels == ["refusion", "autoregressive_base", "autoregressive_same", "forward"]


def test_fusion_keeps_every_golden_token(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "fusion.json"
    code, _out, err = run("fusion", "--golden-only", "--limit", 6, "--output", output)
    assert code == 0, err
    for item in read_result(output)["runs"]:
        found = item["figures"]
        assert found["same_tokens"] == found["num_answers"] == 6
        assert found["forwards_fused"] < found["forwards_two_pass"]


@pytest.mark.parametrize("name", ["chat", "tasks", "cpu", "fusion", "prepare_data", "tables"])
def test_every_script_has_help(run: Run, name: str) -> None:
    code, out, _err = run(name, "--help")
    assert code == 0
    assert "--" in out


def test_unknown_settings_of_a_sweep_are_named(run: Run, tmp_path: Path, chat_data: Path, tiny_model_dir: Path) -> None:
    sweep = tmp_path / "sweep.json"
    sweep.write_text('[{"slotsize": 4}]')
    code, _out, err = run(
        "chat", "--model", tiny_model_dir, "--base", tiny_model_dir, "--data", chat_data, "--sweep", sweep, "--output", tmp_path / "o.json"
    )
    assert code == 1
    assert "slotsize" in err
    assert err.count("\n") == 1


def test_in_float32_the_batch_changes_no_text(run: Run, tmp_path: Path, chat_data: Path, tiny_model_dir: Path) -> None:
    output = tmp_path / "batches.json"
    options = ["--dtype", "float32", "--data", chat_data, "--max-tokens", 12, "--concurrency", 3]
    code, _, err = run("batches", "--model", tiny_model_dir, *options, "--output", output)
    assert code == 0, err
    for found in read_result(output)["runs"]:
        assert found["figures"]["num_answers"] == 4
        assert found["figures"]["same_answers"] == found["figures"]["same_prefix_share"] == 1.0
        assert found["figures"]["tokens_per_second_together"] > 0
    code, _, err = run("batches", "--model", tiny_model_dir, *options, "--output", output, "--batch-invariant")
    assert (code, err.count("\n")) == (1, 1)
    assert "batch_invariant needs a GPU" in err


def test_diffusion_forwards_times_every_decoder_and_checks_it_against_the_plain_loops(
    run: Run, tmp_path: Path, chat_data: Path, tiny_model_dir: Path
) -> None:
    options = ["--dtype", "float32", "--data", chat_data, "--limit", 2, "--max-tokens", 12, "--concurrency", 2, "--check", 2]
    code, out, err = run("diffusion_forwards", "--model", tiny_model_dir, *options, "--output", tmp_path / "out.json")
    assert code == 0, err
    content = read_result(tmp_path / "out.json")
    assert len(content["runs"]) == len(out.splitlines()) == 8
    checked = [found["figures"]["same_as_plain"] for found in content["runs"] if "same_as_plain" in found["figures"]]
    assert checked == [1.0] * 6


def test_rows_with_an_answer_and_gsm8k_rows_are_judged_by_their_final_answer(run: Run, tmp_path: Path, tiny_model_dir: Path) -> None:
    tasks = runpy.run_path(str(BENCHMARKS / "tasks.py"))
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "How many?", "answer": "4 and 5\n#### 1,009"}, {"family": "gcd", "query": "gcd?", "answer": "3"}]
    write_rows(path, rows)
    found = tasks["problems"](path)
    assert [row["family"] for row in found] == ["gsm8k", "gcd"]
    assert tasks["judge"](found, ["so 1009", "Answer: 3"]) == [True, True]
    assert tasks["judge"](found, ["so 1009.5", "Answer: 4"]) == [False, False]
    output = tmp_path / "tasks.json"
    options = ["--dtype", "float32", "--max-tokens", 8, "--slot-size", 4]
    code, _out, err = run("tasks", "--model", tiny_model_dir, "--data", path, *options, "--output", output)
    assert code == 0, err
    assert {"accuracy", "accuracy_gsm8k", "accuracy_gcd"} <= read_result(output)["figures"].keys()
    write_rows(path, [{"text": "x"}])
    code, _out, err = run("tasks", "--model", tiny_model_dir, "--data", path, *options, "--output", output)
    assert code == 1
    assert "it needs query, family" in err


def test_what_was_measured_before_an_interruption_is_kept(
    run: Run, tmp_path: Path, chat_data: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, output = tmp_path / "sweep.json", tmp_path / "chat.json"
    sweep.write_text(json.dumps([{"decoder": "autoregressive"}, {"slot_size": 4, "block_size": 8}]))
    generate, asked = LLM.generate, []

    def impatient(self: LLM, prompts: list[object], *args: object, **options: object) -> object:
        asked.append(len(prompts))
        if len(asked) == 3:  # a warm-up, the first setting, and now the second
            raise KeyboardInterrupt
        return generate(self, prompts, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LLM, "generate", impatient)
    options = ["--dtype", "float32", "--data", chat_data, "--rows", "0:2", "--max-tokens", 4, "--sweep", sweep, "--output", output]
    code, _, err = run("chat", "--model", tiny_model_dir, "--base", tiny_model_dir, *options)
    assert code == 130
    assert err.strip().splitlines()[-1] == "interrupted"
    content = read_result(output)
    assert [each["label"] for each in content["runs"]] == ["autoregressive"]
    assert content["settings"]["is_complete"] is False


def test_drafts_on_given_text_are_those_of_a_row_of_their_own(run: Run, tmp_path: Path, tiny_model_dir: Path) -> None:
    data, output = tmp_path / "pairs.jsonl", tmp_path / "forced.json"
    rows = [{"query": "who", "response": "some words that stand here"}, {"query": "what", "response": "others"}]
    write_rows(data, rows)
    options = ["--base", tiny_model_dir, "--data", data, "--rows", "0:2", "--dtype", "float32", "--masks", 3]
    code, _, err = run("teacher_forced", "--models", tiny_model_dir, *options, "--mixtures", "1", "0.5", "--output", output)
    assert code == 0, err
    itself, whole, half = (each["figures"] for each in read_result(output)["runs"])
    assert itself["agreement"]["value"] == 1.0  # the model is its own base, and so is half of its change
    assert itself == whole == half
    num_accepted, num_groups = 0, 0
    llm = LLM.from_pretrained(tiny_model_dir, dtype="float32")
    for row in rows:
        prompt, answer = llm.encode([{"role": "user", "content": row["query"]}]), [*llm.encode(row["response"]), llm.eos_ids()[0]]
        known = _best(llm, [*prompt, *answer])[len(prompt) - 1 : -1]
        for start in range(1, len(answer) - 1, 5):
            drafts = _best(llm, [*prompt, *answer[:start], *[llm.config.mask_token_id] * 3])[-3:]
            same = [draft == said for draft, said in zip(drafts, known[start:], strict=False)]
            num_accepted += [*same, False].index(False)
            num_groups += 1
    assert itself["accepted"]["value"] == pytest.approx(num_accepted / num_groups)


def _best(llm: LLM, ids: list[int]) -> list[int]:
    """The argmax behind every token."""
    model = AutoModelForCausalLM.from_pretrained(llm.path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return logits.index_fill(-1, llm.banned_ids(), -torch.inf).argmax(-1).tolist()
