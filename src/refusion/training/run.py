"""A training run from recipe to finished model: `train`. It puts data, model, objective and Trainer together and saves the result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from refusion.atomic import atomic_file, make_directory
from refusion.errors import ConfigError
from refusion.training.arguments import training_arguments
from refusion.training.base import BaseModel, load_base
from refusion.training.batches import Corruption, PackedBatches, make_schedule, validation_schedule
from refusion.training.checkpoints import checkpoints, remove_leftovers
from refusion.training.data import Examples, load_examples, split_validation
from refusion.training.export import push_to_hub, save_final_model
from refusion.training.interrupt import SaveOnInterrupt
from refusion.training.network import num_trained_weights, prepare_model
from refusion.training.recipe import Recipe, changed_settings, recipe_from_table
from refusion.training.trainer import Probe, ProbeCallback, ProgressLine, RefusionTrainer, TimeLimit

ProbeFactory = Callable[[Recipe, BaseModel, Examples], Probe]
"""Makes a probe from the recipe, the base as it was before training and the validation examples."""

_FREE_TO_CHANGE = {
    "run.output",
    "run.time_limit_minutes",
    "run.log_steps",
    "run.save_steps",
    "run.keep_checkpoints",
    "run.final_dtype",
    "run.tensorboard",
    "run.validate_steps",
    "run.probe_steps",
    "run.probe_rows",
    "data.num_workers",
    "data.cache",
}
"""Settings that a resumed run may change: they leave the weights as they would have been."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingReport:
    """What a run did; also written to report.json."""

    output: str
    model: str
    """Directory of the final model, empty if the run stopped before its last step."""
    is_interrupted: bool
    """Whether Ctrl-C stopped it before its last step."""
    steps: int
    max_steps: int
    examples: int
    too_long: int
    skipped: int
    excluded: int
    loss: float
    loss_ar: float
    loss_mdm: float
    tokens_per_second: float
    """Tokens of the last log interval, padding not counted."""
    seconds: float
    packed_share: float
    """Share of the packed rows that holds documents; the rest is padding."""
    peak_memory_gb: float | None = None
    """GPU memory that the first process's allocator took at most, None on a CPU; `--plan` adds what the driver takes."""
    validation_ar: float | None = None
    """AR loss of the validation rows at the end, None without such rows."""
    validation_mdm: float | None = None
    """Their MDM loss."""
    pushed_to: str = ""
    """Address of the model on the hub, where it was asked for."""


def train(
    recipe: Recipe,
    *,
    output: Path | None = None,
    resume: bool = False,
    push: str = "",
    probe_factory: ProbeFactory | None = None,
    report: Callable[[str], None] = print,
) -> TrainingReport:
    """Train as the recipe says and leave the model in `output`/final, in hub layout.

    With `resume` the newest checkpoint under `output` is taken up; there must be one, and its recipe and data must agree. Ctrl-C ends the
    run at the end of the step, with a checkpoint. `push` names a repository of the hub that gets the finished model.
    """
    started = time.perf_counter()
    run_dir = Path(output or recipe.run.output)
    checkpoint = _prepare_run_dir(run_dir, recipe, resume)
    with _enough_memory():
        base = load_base(recipe.model, in_4_bit=recipe.method.name == "qlora")
    report(f"reading {len(recipe.data.sources)} source(s)")
    examples, validation = load_data(recipe, base, report)
    _check_data(run_dir, examples, is_resumed=checkpoint is not None)
    with _enough_memory():
        trainer = build_trainer(recipe, base, examples, run_dir, checkpoint, report, validation=validation, probe_factory=probe_factory)
    interrupt = SaveOnInterrupt(report)
    trainer.add_callback(interrupt)
    steps_done = trainer.batches.start_step
    num_steps = trainer.batches.schedule.num_steps
    report(_describe(recipe, examples, trainer, steps_done))
    if steps_done < num_steps:
        with interrupt.watched(), _enough_memory():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        steps_done = trainer.state.global_step
    else:
        trainer._load_from_checkpoint(str(checkpoint))
    is_finished = steps_done >= num_steps
    with _enough_memory():
        scores = trainer.evaluate() if is_finished and validation is not None else {}
    if is_finished:
        save_final_model(trainer, base, recipe, run_dir)
    is_interrupted = interrupt.is_asked and not is_finished
    result = _summarise(trainer, run_dir, examples, steps_done, is_finished, is_interrupted, time.perf_counter() - started)
    result = replace(result, validation_ar=scores.get("eval_loss_ar"), validation_mdm=scores.get("eval_loss_mdm"))
    if trainer.is_world_process_zero():
        if push and is_finished:
            result = replace(result, pushed_to=push_to_hub(run_dir / "final", push))
        with atomic_file(run_dir / "report.json") as draft:
            draft.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    return result


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Say what to lower where memory runs out; the checkpoints before that stay."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        raise ConfigError(
            "out of memory: raise data.accumulation (the loss stays the same), lower objective.chunk_size, set "
            "model.gradient_checkpointing = true, or use method.name = 'lora'; `--plan` shows what each would take"
        ) from error


def load_data(recipe: Recipe, base: BaseModel, report: Callable[[str], None]) -> tuple[Examples, Examples | None]:
    """Training examples and, where the recipe asks for them, those that are only scored."""

    def load(settings: Any) -> Examples:
        return load_examples(
            settings,
            tokenizer=base.tokenizer,
            mask_token_id=base.mask_token_id,
            vocab_size=base.model.get_input_embeddings().num_embeddings,
            context_length=base.context_length,
            objective=recipe.objective,
            report=report,
        )

    examples = load(recipe.data)
    if recipe.data.validation:
        return examples, load(replace(recipe.data, sources=recipe.data.validation, validation=()))
    if recipe.data.validation_rows:
        return split_validation(examples, recipe.data.validation_rows, recipe.run.seed)
    return examples, None


def build_trainer(
    recipe: Recipe,
    base: BaseModel,
    examples: Examples,
    run_dir: Path,
    checkpoint: Path | None,
    report: Callable[[str], None],
    *,
    validation: Examples | None = None,
    probe_factory: ProbeFactory | None = None,
) -> RefusionTrainer:
    """Everything of a run up to the point where it starts."""
    arguments = training_arguments(recipe, run_dir, base.model)
    rows_at_once = recipe.data.accumulation * arguments.world_size
    if recipe.data.rows_per_step % rows_at_once:
        raise ConfigError(
            f"data.rows_per_step = {recipe.data.rows_per_step} must be a multiple of accumulation x processes = "
            f"{recipe.data.accumulation} x {arguments.world_size}"
        )
    _check_shards(checkpoint, arguments.world_size)
    corruption = Corruption(
        examples=examples,
        objective=recipe.objective,
        mask_token_id=base.mask_token_id,
        seed=recipe.run.seed,
        pack_length=recipe.data.pack_length,
    )
    schedule = make_schedule(corruption, rows_per_step=recipe.data.rows_per_step, max_steps=recipe.run.max_steps, epochs=recipe.run.epochs)
    arguments.max_steps = schedule.num_steps
    place = {"process": arguments.process_index, "num_processes": arguments.world_size, "chunk_size": recipe.objective.chunk_size}
    batches = PackedBatches(schedule, start_step=_checkpoint_step(checkpoint), accumulation=recipe.data.accumulation, **place)
    scored = None
    if validation is not None:
        rows_per_step = recipe.data.rows_per_step // recipe.data.accumulation
        scored = PackedBatches(validation_schedule(replace(corruption, examples=validation), rows_per_step=rows_per_step), **place)
    probe = _make_probe(recipe, base, validation, probe_factory)
    model, frozen = prepare_model(base, recipe, arguments.device)
    trainer = RefusionTrainer(
        model=model, args=arguments, batches=batches, validation=scored, frozen_parameters=frozen, callbacks=[ProgressLine(report)]
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if recipe.run.time_limit_minutes:
        trainer.add_callback(TimeLimit(recipe.run.time_limit_minutes))
    if recipe.run.tensorboard and arguments.process_index == 0:
        trainer.add_callback(_tensorboard(run_dir))
    if probe is not None:
        trainer.add_callback(ProbeCallback(probe, recipe.run.probe_steps, trainer.log))
    return trainer


def _make_probe(recipe: Recipe, base: BaseModel, validation: Examples | None, factory: ProbeFactory | None) -> Probe | None:
    if not recipe.run.probe_steps:
        return None
    if factory is None:
        raise ConfigError("run.probe_steps needs a probe; `refusion train` brings one, a Python call must pass probe_factory")
    if validation is None:
        raise ConfigError("run.probe_steps needs rows to answer; set data.validation_rows or data.validation")
    return factory(recipe, base, validation.select(torch.arange(min(recipe.run.probe_rows, len(validation))).numpy()))


def _tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("run.tensorboard needs tensorboard; `pip install tensorboard`, or set it to false") from None
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(run_dir / "tensorboard")))


def _prepare_run_dir(run_dir: Path, recipe: Recipe, resume: bool) -> Path | None:
    """The checkpoint to resume from, if any. Refuses to mix two different runs in one directory."""
    table = recipe.to_table()
    found = checkpoints(run_dir)
    recipe_file = run_dir / "recipe.json"
    if resume and not found:
        raise ConfigError(f"{run_dir} holds no checkpoint to resume from; leave --resume out to start a new run")
    if found and not resume:
        if (run_dir / "final").exists():
            raise ConfigError(f"{run_dir} holds a finished run; choose another --output, or remove it")
        raise ConfigError(f"{run_dir} holds an unfinished run ({found[-1].name}); use --resume to go on, or another --output")
    if found and recipe_file.exists():
        before = recipe_from_table(json.loads(recipe_file.read_text(encoding="utf-8")))  # settings that are new since have their defaults
        changed = changed_settings(before.to_table(), table)
        changed = [name for name in changed if name not in _FREE_TO_CHANGE]
        if changed:
            raise ConfigError(
                f"cannot resume {run_dir}: the recipe has changed in {', '.join(changed)}; restore it or use another --output"
            )
    make_directory(run_dir)
    if _is_first_process():
        remove_leftovers(run_dir)
        with atomic_file(recipe_file) as draft:
            draft.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return found[-1] if found else None


def _check_data(run_dir: Path, examples: Examples, *, is_resumed: bool) -> None:
    """A resumed run must see the token ids that it began with, whatever its files are called."""
    file = run_dir / "data.json"
    now = {"examples": len(examples), "tokens": examples.num_tokens, "checksum": examples.checksum}
    if is_resumed and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
        if changed:
            raise ConfigError(f"cannot resume {run_dir}: the data has changed ({', '.join(changed)}); restore it or use another --output")
    elif _is_first_process():
        with atomic_file(file) as draft:
            draft.write_text(json.dumps(now) + "\n", encoding="utf-8")


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _check_shards(checkpoint: Path | None, num_processes: int) -> None:
    """DeepSpeed's shards of the optimizer belong to as many processes as wrote them."""
    num_shards = 0 if checkpoint is None else len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if num_shards not in (0, num_processes):
        raise ConfigError(f"cannot resume {checkpoint}: DeepSpeed wrote it from {num_shards} process(es), this run has {num_processes}")


def _checkpoint_step(checkpoint: Path | None) -> int:
    if checkpoint is None:
        return 0
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _describe(recipe: Recipe, examples: Examples, trainer: RefusionTrainer, steps_done: int) -> str:
    trained = num_trained_weights(trainer.model, trainer.frozen_parameters)
    left_out = [
        f"{count} {reason}"
        for count, reason in (
            (examples.num_too_long, "too long for a packed row or the model's context"),
            (examples.num_skipped, "malformed"),
            (examples.num_excluded, "excluded"),
        )
        if count
    ]
    return (
        f"{len(examples):,} examples, {examples.num_tokens:,} tokens"
        + (f" (left out: {', '.join(left_out)})" if left_out else "")
        + f"; {trainer.batches.schedule.num_steps:,} steps of {recipe.data.rows_per_step} x {recipe.data.pack_length} tokens, "
        + f"{100 * trainer.batches.schedule.packed_share:.1f} % of them no padding; {trained:,} weights trained"
        + (f"; resuming after step {steps_done}" if steps_done else "")
    )


def _summarise(
    trainer: RefusionTrainer,
    run_dir: Path,
    examples: Examples,
    steps_done: int,
    is_finished: bool,
    is_interrupted: bool,
    seconds: float,
) -> TrainingReport:
    last = next((entry for entry in reversed(trainer.state.log_history) if "loss_ar" in entry), {})
    return TrainingReport(
        output=str(run_dir),
        model=str(run_dir / "final") if is_finished else "",
        is_interrupted=is_interrupted,
        steps=steps_done,
        max_steps=trainer.batches.schedule.num_steps,
        examples=len(examples),
        too_long=examples.num_too_long,
        skipped=examples.num_skipped,
        excluded=examples.num_excluded,
        loss=last.get("loss", 0.0),
        loss_ar=last.get("loss_ar", 0.0),
        loss_mdm=last.get("loss_mdm", 0.0),
        tokens_per_second=last.get("tokens_per_second", 0.0),
        seconds=seconds,
        packed_share=trainer.batches.schedule.packed_share,
        peak_memory_gb=torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else None,
    )
