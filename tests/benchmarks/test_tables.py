from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from refusion.evaluation.results import Result, Run, write_result
from refusion.evaluation.statistics import Interval

ROOT = Path(__file__).parents[2]


def tables(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "benchmarks" / "tables.py", *map(str, args)], capture_output=True, text=True)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    figures = {"tokens_per_forward": Interval(2.1234, 2.0, 2.2), "agreement": Interval(0.8765, 0.86, 0.89), "base_nll": 1.25}
    run = Run(label="refusion", settings={}, figures=figures)
    write_result(tmp_path / "results" / "chat.json", Result(name="chat", settings={"dtype": "bfloat16"}, figures=figures, runs=[run]))
    return tmp_path / "results"


def test_a_table_is_written_checked_and_found_stale(tmp_path: Path, results: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('before\n<!-- table:chat chat="our model" -->\nold\n<!-- /table -->\nafter\n')
    assert tables("--check", "--results", results, page).returncode == 1
    assert "old" in page.read_text()
    assert tables("--results", results, page).returncode == 0
    text = page.read_text()
    assert "| our model | 2.12 | 87.6 % | 1.250 | – | – |" in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- /table -->\nafter\n")
    assert tables("--check", "--results", results, page).returncode == 0
    page.write_text(text.replace("2.12", "2.50"))
    stale = tables("--check", "--results", results, page)
    assert (stale.returncode, "stale" in stale.stderr) == (1, True)


def test_training_speed_stands_beside_its_plan_and_parity_term_by_term(tmp_path: Path) -> None:
    speed = {"tokens_per_second": 312345.6, "model_flops_utilisation": 0.2614, "packed_share": 0.9941, "seconds_per_step": 0.2086}
    speed |= {"seconds_per_step_planned": 0.2236, "memory_gb_planned": 43.59}
    apart = {f"{term}_{what}": value for term in ("loss", "loss_ar", "loss_mdm") for what, value in _PARITY.items()}
    runs = [
        Run(label="small flex", settings={}, figures=speed),
        Run(label="parity flex", settings={}, figures={"steps": 500, **apart}, series={"step": [1, 2]}),
    ]
    write_result(tmp_path / "results" / "speed.json", Result(name="training-speed", settings={}, runs=runs))
    page = tmp_path / "page.md"
    page.write_text("<!-- table:training speed -->\n<!-- /table -->\n<!-- table:parity speed -->\n<!-- /table -->\n")
    assert tables("--results", tmp_path / "results", page).returncode == 0
    text = page.read_text()
    assert "| small flex | 312,346 | 26.1 % | 99.4 % | 0.209 | 0.224 | – | 43.6 |" in text
    assert "| parity flex | 500 | `loss_mdm` | 3.250 | 3.251 | 0.03 % | 0.42 % | 0.60 % |" in text
    assert text.count("parity flex") == 3


_PARITY = {"packed": 3.25, "padded": 3.251, "off_mean": 0.0003, "off_worst_fifty_steps": 0.0042, "off_worst_ten_steps": 0.006}


@pytest.mark.parametrize(
    ("marker", "reason"),
    [
        ("<!-- table:chat chat -->\n", "has no <!-- /table -->"),
        ("<!-- table:pie chat -->\n<!-- /table -->", "unknown table pie"),
        ("<!-- table:chat absent -->\n<!-- /table -->", "absent.json"),
        ("<!-- table:chat -->\n<!-- /table -->", "names no result file"),
    ],
)
def test_bad_markers_are_named(tmp_path: Path, results: Path, marker: str, reason: str) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n" + marker + "\n")
    failed = tables("--results", results, page)
    assert failed.returncode == 1
    assert reason in failed.stderr
    assert "Traceback" not in failed.stderr


def test_side_by_side_shows_four_digits_and_large_figures_whole(tmp_path: Path) -> None:
    runs = [Run(label="one", settings={}, figures={"tokens_per_second": 310564.0, "loss": 0.123456, "steps": 9999.4})]
    runs.append(Run(label="two", settings={}, figures={"tokens_per_second": 9999.6, "loss": 4.0}))
    write_result(tmp_path / "results" / "speed.json", Result(name="speed", settings={}, runs=runs))
    page = tmp_path / "page.md"
    page.write_text("<!-- table:side-by-side speed -->\n<!-- /table -->\n")
    assert tables("--results", tmp_path / "results", page).returncode == 0
    text = page.read_text()
    assert "| `tokens_per_second` | 310,564 | 10,000 |" in text
    assert "| `loss` | 0.1235 | 4 |" in text
    assert "| `steps` | 9999 | – |" in text


def test_masked_diffusion_stands_by_the_time_of_an_answer(tmp_path: Path) -> None:
    figures = {"seconds_per_answer": 9.79, "device_ms_per_forward": 19.12, "over_autoregressive": 11.8, "over_refusion": 24.41}
    runs = [Run(label="chat: refusion", settings={}, figures={"tokens_per_second": 435.0})]
    runs.append(Run(label="chat: masked diffusion", settings={}, figures=figures))
    write_result(tmp_path / "results" / "carrier.json", Result(name="eight-billion", settings={}, runs=runs))
    page = tmp_path / "page.md"
    page.write_text("<!-- table:masked-diffusion carrier -->\n<!-- /table -->\n")
    assert tables("--results", tmp_path / "results", page).returncode == 0
    text = page.read_text()
    assert "| chat: masked diffusion | 9.79 | 19.12 | 11.80× | 24.41× |" in text
    assert "chat: refusion" not in text


def test_quantized_weights_stand_with_agreement_right_answers_speed_and_memory(tmp_path: Path) -> None:
    figures = {"argmax_agreement": 0.976, "nll": 0.5293, "task_accuracy": Interval(0.914, 0.869, 0.945), "peak_bytes_decode": 789931520}
    speeds = {"chat_autoregressive": 1215.7, "chat_refusion": 1688.2, "tasks_refusion": 5208.9}
    figures |= {f"tokens_per_second_{name}": value for name, value in speeds.items()}
    write_result(
        tmp_path / "results" / "q.json", Result(name="quantized", settings={}, runs=[Run(label="int8", settings={}, figures=figures)])
    )
    page = tmp_path / "page.md"
    page.write_text("<!-- table:quantized q -->\n<!-- /table -->\n")
    assert tables("--results", tmp_path / "results", page).returncode == 0
    assert "| int8 | 97.6 % | 0.529 | 91.4 % | 86.9–94.5 | 1,216 | 1,688 | 5,209 | 0.8 |" in page.read_text()


def test_every_table_of_the_repository_is_current() -> None:
    checked = tables("--check")
    assert checked.returncode == 0, checked.stderr
