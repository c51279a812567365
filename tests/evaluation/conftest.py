"""A tiny model with room for real prompts, and a folder of a few hand-made rows per benchmark."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from benchmark_rows import CATEGORIES, QUESTION, SUBJECTS, edit_json, write_rows


@pytest.fixture(scope="session")
def roomy_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context of 2048 tokens; its weights do not know the difference."""
    path = tmp_path_factory.mktemp("roomy") / "tiny"
    shutil.copytree(tiny_model_dir, path)
    edit_json(path / "config.json", max_position_embeddings=2048)
    return path


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Rows in the layout of --data: two questions each of GSM8K, ARC, HumanEval, MBPP and GPQA, one per subject of MATH and MMLU-Pro."""
    path = tmp_path / "data"
    write_rows(path / "gsm8k" / "test.jsonl", [{"question": f"{QUESTION} ({i})", "answer": f"It is {i}.\n#### {i}"} for i in (2, 3)])
    choices = {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]}
    write_rows(path / "arc_challenge" / "test.jsonl", [{"question": QUESTION, "choices": choices, "answerKey": key} for key in "BC"])
    options = ["zero", "one", "two"]
    mmlu = [{"question": QUESTION, "options": options, "answer": "C", "category": name} for name in CATEGORIES]
    write_rows(path / "mmlu_pro" / "test.jsonl", mmlu)
    math = [{"problem": QUESTION, "solution": "It is $\\boxed{2}$.", "type": name, "level": "Level 1"} for name in SUBJECTS]
    write_rows(path / "math" / "test.jsonl", math)
    wrong = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    write_rows(path / "gpqa" / "train.jsonl", [{"Question": f"{QUESTION} {i}", "Correct Answer": "two"} | wrong for i in (1, 2)])
    stub = 'def double(x):\n    """Twice x."""\n'
    test = "def check(candidate):\n    assert candidate(2) == 4\n"
    human = {"task_id": "HumanEval/0", "prompt": stub, "test": test, "entry_point": "double", "canonical_solution": "    return 2 * x\n"}
    write_rows(path / "humaneval" / "test.jsonl", [human, human])
    mbpp = {"text": "Write a function to double.", "test_list": ["assert double(2) == 4"] * 3, "test_setup_code": "", "code": "double = 0"}
    write_rows(path / "mbpp" / "test.jsonl", [mbpp, mbpp])
    return path
