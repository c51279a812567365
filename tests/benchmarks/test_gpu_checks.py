"""The checks for a GPU, as far as they go without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refusion.evaluation.results import read_result


def test_a_check_that_fails_is_named_and_the_others_count(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu_checks  # type: ignore[import-not-found]  # a script of the benchmarks folder

    data, output = tmp_path / "chat.jsonl", tmp_path / "checks.json"
    data.write_text("".join(json.dumps({"query": f"question {i}", "response": "x"}) + "\n" for i in range(2)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu_checks, "SANITIZER", ["no-such-sanitizer"])
    options = {"--model": tiny_model_dir, "--device": "cpu", "--data": data, "--output": output, "--max-tokens": 9, "--num-prompts": 2}
    argv = [str(part) for option in options.items() for part in option]
    monkeypatch.setattr("sys.argv", ["gpu_checks.py", *argv, "--only", "texts", "small"])
    with pytest.raises(SystemExit) as stop:
        gpu_checks.main()
    assert stop.value.code == 1
    texts, small = read_result(output)["runs"]
    assert texts["figures"] | {"seconds": 0} == {"exit_code": 0, "seconds": 0, "num_answers": 6, "num_same": 6, "num_tokens": 54}
    assert small["figures"]["exit_code"] == 127  # the kernels ran, the sanitizer is not there
    assert small["figures"]["num_cases"] == 2
    assert "no-such-sanitizer" in small["settings"]["tail"]
    assert "WRONG (127)" in capsys.readouterr().out
