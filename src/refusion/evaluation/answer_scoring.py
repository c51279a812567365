"""Answers of a benchmark and their scores: by the filters and metrics of lm-evaluation-harness's task, in several processes where it pays.

One odd answer must not end a run of hours: a scorer that raises, and one that ends its process, is recorded and the run goes on.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from refusion.evaluation.benchmarks import Benchmark
from refusion.evaluation.results import num_cores

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

    from refusion.llm import RequestOutput

Row = dict[str, Any]
MOST_SCORERS = 16
"""Processes that score at once; each begins as a copy of this one."""
ANSWERS_AT_ONCE = 8
"""Answers that a process takes at a time."""
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_to_score: list[tuple[Question, RequestOutput]] = []
"""What the copies of this process find in their memory."""


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a benchmark as it is put to the model."""

    task: ConfigurableTask
    doc_id: int
    instance: Instance

    @property
    def key(self) -> tuple[str, int]:
        return str(self.task.task_name), self.doc_id

    @property
    def prompt(self) -> str:
        return str(_args(self.instance)[0])

    @property
    def options(self) -> dict[str, Any]:
        return _args(self.instance)[1]


def score_all(benchmark: Benchmark, answers: list[tuple[Question, RequestOutput]]) -> list[Row]:
    """Programs are processes already, so threads wait for them. The scorer of MATH sets alarms, which only a main thread may."""
    if benchmark.is_code:
        with ThreadPoolExecutor(num_cores()) as threads:
            return list(threads.map(lambda answer: _scored(*answer), answers))
    num_workers = min(num_cores(), MOST_SCORERS, len(answers) // ANSWERS_AT_ONCE)
    if not benchmark.is_algebra or num_workers < 2 or sys.platform != "linux":
        return [_scored(*answer) for answer in answers]
    _to_score[:] = answers  # the copies have them: tasks cannot be sent
    try:
        with _copies(num_workers) as processes:
            return list(processes.map(_score_at, range(len(answers)), chunksize=ANSWERS_AT_ONCE))
    except BrokenProcessPool:
        return [_score_apart(index) for index in range(len(answers))]
    finally:
        _to_score.clear()


def _copies(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, get_context("fork"), initializer=_become_scorer)


def _score_apart(index: int) -> Row:
    """Slow, but an answer that ends the process which scores it (for want of memory, say) is found and recorded like one that raises."""
    try:
        with _copies(1) as process:
            return process.submit(_score_at, index).result()
    except BrokenProcessPool as error:
        return _failed(error)


def _score_at(index: int) -> Row:
    return _scored(*_to_score[index])


def _become_scorer() -> None:
    """What a copy must do otherwise than its parent, to whom it leaves interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Without it the copies of a killed run wait for ever for the next answer, and hold what the run had of the GPU.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    gc.freeze()  # garbage of the parent is never collected here: a copy cannot free what is on a GPU
    # Past a progress bar, which prints under a lock: one that its thread held at the moment of the copy is never released here.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def _scored(question: Question, output: RequestOutput) -> Row:
    """Filtered answers and scores. A scorer that fails is recorded, whatever the reason: one odd answer must not end a run of hours."""
    task, instance = question.task, question.instance
    instance.resps = [output.text]
    filtered: dict[str, Any] = {}
    scores: dict[str, float] = {}
    try:
        for ensemble in task._filters:
            ensemble.apply([instance])
            filtered[ensemble.name] = instance.filtered_resps[ensemble.name]
            found = task.process_results(instance.doc, [filtered[ensemble.name]])
            scores |= {f"{metric},{ensemble.name}": float(value) for metric, value in found.items()}
    except Exception as error:
        return _failed(error, filtered, scores)
    return {"filtered": filtered, "scores": scores, "error": None}


def _failed(error: Exception, filtered: Row | None = None, scores: Row | None = None) -> Row:
    return {"filtered": filtered or {}, "scores": scores or {}, "error": f"{type(error).__name__}: {error}"}


def _args(instance: Instance) -> tuple[Any, ...]:
    return instance.args
