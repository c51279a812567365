"""Running benchmarks: questions to the engine in large groups, answers scored and logged one by one, figures from the log.

Prompts, filters and metrics are lm-evaluation-harness's own task objects; what is done here and not by its `simple_evaluate` is what a
long run needs: a log that grows with the run and is continued, a scorer that may fail on one answer, costs per benchmark.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from refusion.decoding.diffusion_params import DiffusionParams
from refusion.decoding.params import SlotParams
from refusion.errors import ConfigError, DataError
from refusion.evaluation.answer_scoring import Question, Row, score_all
from refusion.evaluation.benchmarks import Benchmark, as_asked, choose, load_tasks
from refusion.evaluation.results import Figure, Result, Run, write_result
from refusion.evaluation.sample_log import SampleLog
from refusion.evaluation.statistics import Interval, pooled_ratio, wilson

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

    from refusion.evaluation.harness import ReFusionLM
    from refusion.llm import LLM, RequestOutput

OnProgress = Callable[[Benchmark, int, int], None]
"""Called with a benchmark, how many of its questions are answered, and how many there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteSettings:
    """What is run, and how it is decoded."""

    suite: str = "paper"
    tasks: tuple[str, ...] = ()
    """Benchmarks of the suite; empty: all."""
    data: Path | None = None
    """Folder of the rows; None: the hub."""
    limit: int | None = None
    """Questions per benchmark, >= 1; those of its parts (subjects, categories) in turn."""
    decoder: str = "refusion"
    setting: Literal["paper", "one"] = "paper"
    """Slot settings: the paper's of each benchmark, or the same `slots` for all."""
    slots: SlotParams = field(default_factory=SlotParams)
    """With setting="one"; what is left out is the checkpoint's own for the device."""
    diffusion: DiffusionParams | None = None
    """Settings of a diffusion decoder, for all benchmarks."""
    batch_size: int | None = None
    """Questions decoded together, for which the engine should be made (`EngineSettings.max_num_seqs`): it gets eight times as many at once,
    which is how many a crash can lose. None: 64 on a GPU, 1 on a CPU."""
    seed: int = 0

    def __post_init__(self) -> None:
        choose(self.suite, self.tasks)
        if self.setting not in ("paper", "one"):
            raise ConfigError(f"setting is {self.setting!r}; it must be 'paper' or 'one'")
        if self.setting == "paper" and self.slots != SlotParams():
            raise ConfigError("setting is 'paper', which brings its own slot settings; leave them out or choose 'one'")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")


def run_suite(
    llm: LLM,
    settings: SuiteSettings,
    output: Path,
    *,
    model_name: str = "",
    resume: bool = False,
    on_progress: OnProgress = lambda *_: None,
    on_missing: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the benchmarks and write the result file; returns its content. Answers are logged in OUTPUT's `.samples` folder as they come.

    A benchmark whose rows are missing is told to `on_missing` and left out. Raises DataError if that leaves none.
    """
    from refusion.evaluation.harness import ReFusionLM

    _quiet()
    diffusion = {} if settings.diffusion is None else asdict(settings.diffusion)
    lm = ReFusionLM(llm, decoder=settings.decoder, batch_size=settings.batch_size, seed=settings.seed, **diffusion)
    loaded, missing = _load(settings)
    if not loaded:
        raise DataError("; ".join(missing))
    for reason in missing:
        on_missing(reason)
    log = SampleLog(samples_directory(output), _identity(llm, settings, model_name), resume=resume)
    runs = []
    for benchmark, tasks in loaded:
        asked = questions(tasks, lm, settings.limit)
        rows = answer_all(lm, benchmark, asked, log, settings, lambda done, total, b=benchmark: on_progress(b, done, total))
        runs.append(summary(benchmark, rows, _run_settings(lm, asked, settings)))
    made_up = [benchmark.name for benchmark, _ in loaded if benchmark.is_made_up]
    notes = [f"{name}: made-up questions in the layout of the benchmark, no score of it and in no mean." for name in made_up]
    notes += ["Left out: " + "; ".join(missing)] if missing else []
    described = _identity(llm, settings, model_name) | {"limit": settings.limit, "batch_size": settings.batch_size, "num_fewshot": 0}
    described["lm_eval"] = importlib.metadata.version("lm_eval")
    figures, device = _means(runs), str(llm.model.device)
    result = Result(name=settings.suite, settings=described, figures=figures, runs=runs, notes=" ".join(notes), device=device)
    return write_result(output, result)


def _load(settings: SuiteSettings) -> tuple[list[tuple[Benchmark, list[ConfigurableTask]]], list[str]]:
    """Benchmarks with their rows, and why others have none: all of it is known before the first question is asked."""
    loaded, missing = [], []
    for benchmark in choose(settings.suite, settings.tasks):
        try:
            tasks = load_tasks(benchmark, settings.data)
            loaded.append((as_asked(benchmark, tasks), tasks))
        except DataError as error:
            missing.append(str(error))
    return loaded, missing


def samples_directory(output: Path) -> Path:
    return output.with_name(f"{output.name.removesuffix('.json')}.samples")


def questions(tasks: Sequence[ConfigurableTask], lm: ReFusionLM, limit: int | None) -> list[Question]:
    """The first `limit` rows, those of several tasks in turn, as rendered chats."""
    rows = [[(task, *row) for row in enumerate(task.eval_docs)] for task in tasks]  # the harness makes them anew whenever it is asked
    in_turn = (row for rank in itertools.zip_longest(*rows) for row in rank if row is not None)
    return [_question(task, doc_id, doc, lm) for task, doc_id, doc in itertools.islice(in_turn, limit)]


def answer_all(
    lm: ReFusionLM,
    benchmark: Benchmark,
    asked: Sequence[Question],
    log: SampleLog,
    settings: SuiteSettings,
    on_progress: Callable[[int, int], None],
) -> list[Row]:
    """Rows of all questions: those that the log holds already, then new ones, which go there group by group."""
    from refusion.evaluation.harness import chunk_size

    wanted = {question.key: question for question in asked}
    rows = [row for row in log.rows(benchmark.name) if (row["task"], row["doc_id"]) in wanted]
    for row in rows:
        if row["prompt_hash"] != _hash(wanted[row["task"], row["doc_id"]].prompt):
            raise DataError(f"{log.path(benchmark.name)} holds another question {row['doc_id']} of {row['task']}; choose another --output")
    known = {(row["task"], row["doc_id"]) for row in rows}
    left = [question for question in asked if question.key not in known]
    on_progress(len(rows), len(asked))
    size = chunk_size(lm)
    for start in range(0, len(left), size):
        group = left[start : start + size]
        new = _answer(lm, benchmark, group, settings)
        log.append(benchmark.name, new)
        rows += new
        on_progress(len(rows), len(asked))
    return rows


def summary(benchmark: Benchmark, rows: Sequence[Row], settings: dict[str, Any]) -> Run:
    """Figures of a benchmark. An answer whose scorer failed counts as wrong; a standard error is the one of a mean."""
    num_tokens = [row["num_tokens"] for row in rows]
    seconds = math.fsum(row["seconds"] for row in rows)
    main = [float(row["scores"].get(benchmark.score, 0.0)) for row in rows]
    figures: dict[str, Figure] = {
        "score": wilson(round(sum(main)), len(main)),
        "standard_error": _standard_error(main),
        "num_samples": len(rows),
        "num_scorer_errors": sum(row["error"] is not None for row in rows),
        "tokens_per_forward": pooled_ratio(num_tokens, [row["num_forwards"] for row in rows]),
        "tokens_per_second": sum(num_tokens) / seconds if seconds else math.nan,
        "tokens_per_answer": sum(num_tokens) / len(rows),
        "share_cut_by_length": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
    }
    for name in sorted({name for row in rows for name in row["scores"]} - {benchmark.score}):
        others = [float(row["scores"].get(name, 0.0)) for row in rows]
        figures[name] = sum(others) / len(others)
    about = {"title": benchmark.title, "score": benchmark.score} | ({"is_made_up": True} if benchmark.is_made_up else {})
    return Run(label=benchmark.name, settings=about | settings, figures=figures)


def _question(task: ConfigurableTask, doc_id: int, doc: Any, lm: ReFusionLM) -> Question:
    context = task.fewshot_context(
        doc,
        num_fewshot=0,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        chat_template=lm.apply_chat_template,
        gen_prefix=task.doc_to_prefix(doc),
    )
    instance = task.construct_requests(doc=doc, ctx=context, metadata=(task.task_name, doc_id, 1), apply_chat_template=True)
    assert not isinstance(instance, list), f"{task.task_name} is no generative task"
    return Question(task, doc_id, instance)


def _answer(lm: ReFusionLM, benchmark: Benchmark, group: Sequence[Question], settings: SuiteSettings) -> list[Row]:
    """Decode a group and score it. Its wall-clock time is shared out evenly: only the sum over many answers means something."""
    options = group[0].options
    assert all(question.options == options for question in group), f"{benchmark.name} asks for several ways of decoding"
    if settings.setting == "one":
        options = {name: value for name, value in options.items() if name not in _slot_fields()} | _given(settings.slots)
    started = time.perf_counter()
    outputs = lm.answer([question.prompt for question in group], options)
    seconds = (time.perf_counter() - started) / len(group)
    scored = score_all(benchmark, list(zip(group, outputs, strict=True)))
    return [_row(benchmark, question, output, seconds) | scores for question, output, scores in zip(group, outputs, scored, strict=True)]


def _row(benchmark: Benchmark, question: Question, output: RequestOutput, seconds: float) -> Row:
    task, doc_id = question.key
    asked: Row = {} if benchmark.is_confidential else {"prompt": question.prompt}
    return {
        "task": task,
        "doc_id": doc_id,
        "prompt_hash": _hash(question.prompt),
        **asked,
        "target": question.task.doc_to_target(question.instance.doc),
        "response": output.text,
        "finish_reason": output.finish_reason,
        "num_tokens": output.stats.num_tokens,
        "num_forwards": output.stats.num_forwards,
        "seconds": seconds,
    }


def _identity(llm: LLM, settings: SuiteSettings, model_name: str) -> dict[str, Any]:
    """What must be the same for a log to be continued: limit, tasks and batch size may grow."""
    return {
        "model": model_name or llm.path.name,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "device": llm.model.device.type,
        "suite": settings.suite,
        "decoder": settings.decoder,
        "setting": settings.setting,
        "slots": _given(settings.slots),
        "seed": settings.seed,
    } | ({} if (diffusion := llm.resolve_diffusion(settings.decoder, settings.diffusion)) is None else {"diffusion": asdict(diffusion)})


def _run_settings(lm: ReFusionLM, asked: Sequence[Question], settings: SuiteSettings) -> dict[str, Any]:
    """The slot settings a benchmark was decoded with, and how long answers may get."""
    sampling, slots = lm.settings(asked[0].options)
    if settings.setting == "one":
        slots = settings.slots
    if lm.diffusion is not None:
        return {"decoder": settings.decoder, "max_tokens": sampling.max_tokens, "diffusion": asdict(lm.diffusion)}
    shown = lm.llm.resolve_slots(slots) if settings.decoder == "refusion" else _given(slots)
    return {"decoder": settings.decoder, "max_tokens": sampling.max_tokens} | (
        {} if settings.decoder == "autoregressive" else {"slots": shown}
    )


def _means(runs: Sequence[Run]) -> dict[str, Figure]:
    """Unweighted mean over the benchmarks, as in the paper's table; made-up rows are none."""
    runs = [run for run in runs if not run.settings.get("is_made_up")]
    if not runs:
        return {"mean_score": math.nan, "mean_score_standard_error": math.nan, "num_benchmarks": 0}
    scores = [run.figures["score"] for run in runs]
    values = [score.value for score in scores if isinstance(score, Interval)]
    errors = [float(error) for run in runs if not isinstance(error := run.figures["standard_error"], Interval)]
    return {
        "mean_score": sum(values) / len(values),
        "mean_score_standard_error": math.sqrt(math.fsum(error**2 for error in errors)) / len(errors),
        "num_benchmarks": len(runs),
    }


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _slot_fields() -> tuple[str, ...]:
    from refusion.evaluation.harness import SLOT_FIELDS

    return SLOT_FIELDS


def _given(slots: SlotParams) -> dict[str, Any]:
    return {name: value for name in _slot_fields() if (value := getattr(slots, name)) is not None}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _quiet() -> None:
    """The harness, `datasets` and the parser of answers tell much that is not for the user of a command."""
    import datasets

    warnings.simplefilter("ignore", SyntaxWarning)

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
