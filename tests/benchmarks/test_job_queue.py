"""The queue of jobs: who waits for whom, who is alone, and what is told of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "job_queue.sh"
pytestmark = pytest.mark.skipif(shutil.which("flock") is None, reason="the script locks files with flock")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def start(work: Path, jobs: str, *gpus: str) -> subprocess.Popen[bytes]:
    file = work.parent / f"jobs-{abs(hash(jobs))}"
    file.write_text(jobs)
    return subprocess.Popen(["bash", str(SCRIPT), str(file), *gpus], env={**os.environ, "WORK": str(work)})


def told(work: Path) -> list[str]:
    """What the log says, without times and seconds."""
    lines = (work / "logs" / "queue.log").read_text().splitlines()
    return [re.sub(r" after \d+ s$", "", line.split(" ", 1)[1]) for line in lines]


def test_jobs_run_in_order_on_the_gpu_they_are_given_and_a_failure_stops_nobody(work: Path) -> None:
    jobs = "# first\nafterwards after=bad,good | echo late\nbad | exit 3\nnot a job\ngood | echo $CUDA_VISIBLE_DEVICES | tr 0-9 a-j\n"
    assert start(work, jobs, "7").wait(timeout=30) == 0
    assert told(work) == [
        "GPU 7: bad begins", "GPU 7: bad ended with 3", "not a job: not a job", "GPU 7: good begins", "GPU 7: good ended with 0",
        "GPU 7: afterwards begins", "GPU 7: afterwards ended with 0",
    ]  # fmt: skip
    assert (work / "logs" / "good.log").read_text() == "h\n"
    assert start(work, jobs, "7").wait(timeout=30) == 0  # nothing is run again
    assert len(told(work)) == 7


def test_a_job_with_a_word_that_nobody_knows_does_not_begin(work: Path) -> None:
    lines = ("early afer=good | true", "apart after=good, late | true", "lone alnoe | true")
    assert start(work, "\n".join((*lines, "good | true", "last  after=good\talone| true")), "0").wait(timeout=30) == 0
    assert told(work) == [
        *(f"not a job: {line}" for line in lines),
        "GPU 0: good begins", "GPU 0: good ended with 0", "GPU 0: last begins", "GPU 0: last ended with 0",
    ]  # fmt: skip


def test_who_is_to_be_alone_waits_and_lets_nobody_in(work: Path) -> None:
    jobs = "short | sleep 0.2\nlong | sleep 1\nalone alone | sleep 0.5\nnext | true\n"
    assert start(work, jobs, "0", "0").wait(timeout=30) == 0
    order = told(work)
    begins, ends = order.index("GPU 0: alone begins"), order.index("GPU 0: alone ended with 0")
    assert order.index("GPU 0: long ended with 0") < begins
    assert ends == begins + 1
    assert order.index("GPU 0: next begins") > ends


def test_another_file_joins_in_and_what_was_done_elsewhere_counts(work: Path) -> None:
    waiting = start(work, "second after=first,outside | true\n", "1")
    assert start(work, "first | true\n", "0").wait(timeout=30) == 0
    time.sleep(1.5)
    assert "GPU 1: second begins" not in told(work)
    (work / "queue" / "outside.ended").touch()
    assert waiting.wait(timeout=30) == 0
    assert told(work)[-1] == "GPU 1: second ended with 0"
