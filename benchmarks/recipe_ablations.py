"""What of the training recipe raises tokens per forward and fidelity at 135M: one thing changed at a time, trained alike, measured alike.

    python benchmarks/recipe_ablations.py --device cuda --work WORK --data heldout.jsonl.gz --train selfwritten_train-00.jsonl.gz \
        --steps 200 --jobs 4 --seconds 290 --output recipe-ablations.json
    python benchmarks/recipe_ablations.py ... --arms base 'serial*' 'LoRA*'          # some of them, in this order

An arm is a list of overrides of one recipe. Each is trained by `refusion train` in a process of its own, --jobs of them at a time, for the
same steps on the same rows, and then measured here: held-out chat by slots and one by one (`chat.py`, one setting for all), and both losses
of other held-out rows in the base recipe's layout, whatever the arm was trained in. The model before training stands beside them.

The result file is written after every arm. After --seconds it is there: shortly before, trainings are interrupted, which saves them. The
same command with the same --work goes on from there; what is trained or measured already is not repeated. Every training's log with the
time of each line is WORK/ARM.log; where the time went is also in the result file (`series`). Trainings share the GPU, so none of these
times is a speed. --seconds count from when everything is imported.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import chat
import comparison
import harness
import torch

from refusion import LLM, SamplingParams, SlotParams, hub
from refusion.atomic import atomic_directory, atomic_file
from refusion.decoding.params import SlotSettings
from refusion.errors import ConfigError, RefusionError
from refusion.evaluation.results import Figure, Result, Run, num_cores, to_plain, write_result
from refusion.llm import EngineSettings
from refusion.training.base import load_base, load_weights
from refusion.training.batches import Corruption, PackedBatches, validation_schedule
from refusion.training.checkpoints import checkpoints
from refusion.training.objectives import LossSettings, packed_loss
from refusion.training.recipe import Recipe, Source, changed_settings, load_recipe, recipe_from_table
from refusion.training.run import load_data

UNTRAINED = "before training"
MEASURING_SECONDS = 12.0
"""An arm's measurement, until one has been timed."""
KILL_SECONDS = 3.0
"""Before the end of --seconds: what still runs then is ended without a checkpoint."""
SAVING_SECONDS = 10.0
"""For trainings to save after Ctrl-C."""
LAST_ONES = 0.6
"""What the last trainings take over what the one before took, with fewer of them at a time."""
NOT_COMPARED = {"run.output", "data.num_workers", "data.cache"}
"""Settings in which two runs of the same arm may differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One change of the base recipe."""

    label: str
    changes: tuple[str, ...] = ()
    """Overrides as `--set` takes them."""
    against: str = "base"
    """The arm from which it differs in one thing."""
    length: float = 1.0
    """Steps over those of the others."""

    @property
    def name(self) -> str:
        """The label as a name of files."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-")


def arms() -> list[Arm]:
    """All of them, one of each kind first. LoRA has the learning rate of its own recipe, and alpha / rank stays 2."""
    paper = ("objective.serial_share=0",)
    lora = ("method.name=lora", "method.freeze_embeddings=false", "optimizer.learning_rate=1e-3")
    return [
        Arm(label="base"),
        Arm(label="distilled, 0.7", changes=("objective.distill=0.7",)),
        Arm(label="no border targets", changes=("objective.serial_borders=false",)),
        Arm(label="the paper's rows alone", changes=paper),
        Arm(label="the paper's rows, cosine noise", changes=(*paper, "objective.noise=cosine"), against="the paper's rows alone"),
        Arm(label="slots of 16", changes=("objective.slot_sizes=[16]",)),
        Arm(label="AR weight 4", changes=("objective.ar_weight=4.0",)),
        Arm(label="learning rate 1.2e-3", changes=("optimizer.learning_rate=1.2e-3",)),
        Arm(label="LoRA, rank 64", changes=(*lora, "method.rank=64", "method.alpha=128")),
        Arm(label="serial rows alone", changes=("objective.serial_share=1",)),
        Arm(label="slots of 4, 8, 16 and 32", changes=("objective.slot_sizes=[4, 8, 16, 32]",)),
        Arm(label="learning rate 3e-4", changes=("optimizer.learning_rate=3e-4",)),
        Arm(label="LoRA, rank 256", changes=(*lora, "method.rank=256", "method.alpha=512"), against="LoRA, rank 64"),
        Arm(label="LoRA, rank 16", changes=(*lora, "method.rank=16", "method.alpha=32"), against="LoRA, rank 64"),
        Arm(label="half the steps", length=0.5),
        Arm(label="slots of 4", changes=("objective.slot_sizes=[4]",)),
        Arm(label="AR weight 1", changes=("objective.ar_weight=1.0",)),
        Arm(label="the paper's rows, clipped noise", changes=(*paper, "objective.noise=clipped"), against="the paper's rows alone"),
        Arm(label="twice the steps", length=2.0),
    ]


def main() -> None:
    args = flags()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first, and so would the trainings
        signal.signal(number, interrupt_once)
    campaign = Campaign(args, [Arm(label=UNTRAINED), *chosen_arms(args.arms)])
    with harness.written_at_any_end(campaign.write, campaign.runs):
        campaign.run()
    for label, words in campaign.failures.items():
        print(f"{label} failed: {words}", file=sys.stderr)
    if campaign.failures:
        sys.exit(1)


def interrupt_once(*_: object) -> None:
    """`timeout` signals a process and then its group: the second one must not end the saving."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=harness.ROOT / "recipes" / "comparison" / "refusion.toml", help="what is changed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the recipe for every arm")
    parser.add_argument("--train", nargs="+", type=Path, required=True, help="files to train on")
    parser.add_argument("--data", type=Path, default=None, help="JSONL rows with `query`; by default the shared held-out ones")
    parser.add_argument("--rows", default="256:320", help="rows FIRST:LAST of them")
    parser.add_argument("--validation-rows", type=int, default=256, help="first so many of --data, whose losses are scored")
    parser.add_argument("--arms", nargs="+", default=["*"], metavar="PATTERN", help="labels with wildcards, in the order wanted")
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps of an arm")
    parser.add_argument("--jobs", type=int, default=3, help="trainings at a time")
    parser.add_argument("--apart", type=float, default=8.0, help="seconds between two starts: trainings in step would all wait at once")
    parser.add_argument("--seconds", type=float, default=3600, help="the result file is there after them")
    parser.add_argument("--work", type=Path, required=True, help="folder of trainings and measurements, written and continued")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "recipe-ablations.json", help="result file")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="by default what the device computes in")
    parser.add_argument("--max-tokens", type=int, default=160, help="new tokens at most")
    parser.add_argument("--batch-size", type=int, default=None, help="prompts decoded together; by default 4 on a CPU, 64 on a GPU")
    parser.add_argument("--slots", type=json.loads, default=None, help="slot settings as JSON instead of what serves ReFusion best")
    parser.add_argument("--notes", default="", help="a sentence for the result file")
    args = parser.parse_args()
    for name in ("steps", "jobs", "validation_rows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    return args


def chosen_arms(patterns: Sequence[str]) -> list[Arm]:
    """Arms that a pattern names, those of the first pattern first. Raises ConfigError for a pattern that names none."""
    found: dict[str, Arm] = {}
    for pattern in patterns:
        named = {arm.label: arm for arm in arms() if fnmatchcase(arm.label, pattern)}
        if not named:
            raise ConfigError(f"no arm is named {pattern!r}; known are {', '.join(arm.label for arm in arms())}")
        found = found | {label: arm for label, arm in named.items() if label not in found}
    return list(found.values())


class Campaign:
    """Trains and measures all arms within the time there is."""

    def __init__(self, args: argparse.Namespace, chosen: Sequence[Arm]) -> None:
        self.args, self.began = args, time.monotonic()
        args.work.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(args.work.resolve() / "inductor"))
        self.recipes = {arm.label: load_recipe(args.recipe, self.overrides(arm)) for arm in chosen}
        self.bench = Bench(args, self.recipes[UNTRAINED])
        self.order = [arm.label for arm in chosen]
        self.runs: list[Run] = []
        self.failures: dict[str, str] = {}
        self.running: list[Training] = []
        self.waiting: list[Arm] = []
        self.trained: list[Arm] = []
        self.training_seconds: list[float] = []
        self.is_stopped, self.next_start = False, 0.0
        for arm in chosen:
            self.sort_in(arm)

    def overrides(self, arm: Arm) -> list[str]:
        """The arm's `--set`, behind those that all share."""
        args = self.args
        data = args.data or harness.chat_prompts()
        listed = {"data.sources": args.train, "data.exclude": [data]}
        files = [f"{key}={json.dumps([str(path.resolve()) for path in paths])}" for key, paths in listed.items()]
        workers = max(num_cores() // (args.jobs + 1), 1)
        numbers = {
            "data.validation_rows": 0,  # scored here, for all arms alike
            "data.cache": json.dumps(str(args.work.resolve() / "cache")),
            "data.num_workers": min(workers, 8),
            "run.max_steps": max(round(args.steps * arm.length), 1),
            "run.save_steps": 0,  # an interrupted run is saved all the same
            "run.validate_steps": 0,
            "run.tensorboard": "false",
        }
        return [*files, *(f"{key}={value}" for key, value in numbers.items()), *args.set, *arm.changes]

    def sort_in(self, arm: Arm) -> None:
        """What is measured already becomes a run, what is trained is to be measured, all else is to be trained."""
        known = self.bench.known(self.measured_file(arm), self.recipes[arm.label])
        if known is not None:
            self.runs.append(known)
            self.say(f"{arm.label}: measured before")
        elif arm.label == UNTRAINED or self.is_trained(arm):
            self.trained.append(arm)
        else:
            self.waiting.append(arm)

    def is_trained(self, arm: Arm) -> bool:
        """Whether this very recipe was trained to its end. Raises ConfigError if another one was begun in its place."""
        run_dir = self.run_dir(arm)
        if not (run_dir / "recipe.json").exists():
            return False
        before = recipe_from_table(json.loads((run_dir / "recipe.json").read_text(encoding="utf-8")))
        changed = set(changed_settings(before.to_table(), self.recipes[arm.label].to_table())) - NOT_COMPARED
        if changed and (checkpoints(run_dir) or (run_dir / "final").exists()):
            raise ConfigError(f"{run_dir} was trained with another {', '.join(sorted(changed))}; choose another --work")
        return (run_dir / "final").exists() and (run_dir / "report.json").exists()

    def run_dir(self, arm: Arm) -> Path:
        return self.args.work / arm.name

    def measured_file(self, arm: Arm) -> Path:
        return self.args.work / f"{arm.name}.json"

    def run(self) -> None:
        """Start, wait and measure in turns, in this one thread."""
        try:
            while True:
                self.start()
                if self.trained and self.has_time_to_measure():
                    self.measure(self.trained.pop(0))
                elif self.running or self.is_waiting():
                    time.sleep(0.2)
                else:
                    break
                self.collect()
                if self.left() < self.reserve():
                    self.stop()
        except KeyboardInterrupt:
            self.stop()
            ends = time.monotonic() + SAVING_SECONDS
            while time.monotonic() < ends and any(training.code is None for training in self.running):
                time.sleep(0.1)
            raise
        finally:
            for training in self.running:
                training.kill()
        left_out = [arm.label for arm in (*self.trained, *self.waiting)]
        if left_out:
            self.say(f"out of time for {', '.join(left_out)}; the same command goes on from here")

    def is_waiting(self) -> bool:
        """Whether the next training only has to keep its distance from the last."""
        return bool(self.waiting) and time.monotonic() < self.next_start and not self.is_stopped

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.began)

    def reserve(self) -> float:
        """Seconds before the end at which trainings are interrupted: they save, and what is trained is measured."""
        return 1.5 * self.bench.seconds * max(len(self.trained), 1) + 3 * KILL_SECONDS

    def has_time_to_measure(self) -> bool:
        return self.left() > self.bench.seconds + KILL_SECONDS

    def start(self) -> None:
        """The next training, if one more may run and is likely to end in time; with fewer beside it, it is faster than the last."""
        needed = LAST_ONES * self.training_seconds[-1] if self.training_seconds else 0.0
        is_time = time.monotonic() >= self.next_start and self.left() - self.reserve() > needed
        if self.waiting and len(self.running) < self.args.jobs and is_time and not self.is_stopped:
            arm = self.waiting.pop(0)
            self.next_start = time.monotonic() + self.args.apart
            overrides = [word for override in self.overrides(arm) for word in ("--set", override)]
            resume = ["--resume"] if checkpoints(self.run_dir(arm)) else []
            command = [str(self.args.recipe), "--output", str(self.run_dir(arm)), *overrides, *resume]
            self.running.append(Training(arm, command, self.args.work / f"{arm.name}.log"))
            self.say(f"{arm.label}: training{' goes on' if resume else ''}")

    def collect(self) -> None:
        """Trainings that have ended, by what became of them."""
        for training in [each for each in self.running if each.code is not None]:
            self.running.remove(training)
            arm = training.arm
            if training.code == 0:
                if not training.is_resumed:
                    self.training_seconds.append(training.seconds)
                self.trained.append(arm)
                with atomic_file(self.args.work / f"{arm.name}.seconds") as draft:
                    draft.write_text(json.dumps(training.parts()), encoding="utf-8")
                self.say(f"{arm.label}: trained in {training.seconds:.1f} s: {shown(training.parts())}")
            elif self.is_stopped:
                self.waiting.append(arm)
                self.say(f"{arm.label}: {training.last_words()}")
            else:
                self.fail(arm, f"ended with {training.code}: {training.last_words()} (see {training.log})")

    def stop(self) -> None:
        """Interrupt the trainings, once; end them where they take too long to save."""
        if not self.is_stopped:
            self.is_stopped = True
            if self.running:
                self.say(f"stopping {len(self.running)} training(s)")
            for training in self.running:
                training.interrupt()
        elif self.left() < KILL_SECONDS:
            for training in self.running:
                training.kill()

    def measure(self, arm: Arm) -> None:
        began = time.perf_counter()
        try:
            figures, seconds = self.bench.measure(arm, self.run_dir(arm) / "final")
        except (RefusionError, RuntimeError) as error:  # the other arms are worth having where one runs out of memory, for example
            self.fail(arm, f"{type(error).__name__}: {error}")
            if isinstance(error, torch.AcceleratorError):  # this process can use its GPU no more; the same command goes on from here
                self.trained.clear()
                self.stop()
            return
        run = Run(label=arm.label, settings=self.described(arm), figures=figures, series=self.series(arm, seconds))
        identity = self.bench.identity(self.recipes[arm.label])
        with atomic_file(self.measured_file(arm)) as draft:
            draft.write_text(json.dumps(to_plain({"identity": identity, "run": run})), encoding="utf-8")
        self.runs.append(run)
        self.write(is_complete=False)
        self.say(f"{arm.label}: measured in {time.perf_counter() - began:.1f} s: {shown(seconds)}")
        print(json.dumps({"label": arm.label} | to_plain(figures)), flush=True)

    def described(self, arm: Arm) -> dict[str, Any]:
        """What an arm is, for the result file."""
        is_changed = arm.label not in (UNTRAINED, "base")
        steps = 0 if arm.label == UNTRAINED else self.recipes[arm.label].run.max_steps
        return {"changes": list(arm.changes), "against": arm.against if is_changed else None, "steps": steps}

    def series(self, arm: Arm, measuring: dict[str, float]) -> dict[str, dict[str, float]]:
        """Where the time went."""
        file = self.args.work / f"{arm.name}.seconds"
        training = {"seconds_of_training": json.loads(file.read_text(encoding="utf-8"))} if file.exists() else {}
        return training | {"seconds_of_measuring": measuring}

    def fail(self, arm: Arm, words: str) -> None:
        self.failures[arm.label] = words
        self.say(f"{arm.label} failed: {words}")

    def write(self, is_complete: bool = True) -> None:
        """The result file of what is measured by now, in the order of the arms."""
        args = self.args
        named = {name: getattr(args, name) for name in ("rows", "steps", "jobs", "max_tokens")}
        missing = [label for label in self.order if label not in {run.label for run in self.runs}]
        recipe = {"recipe": args.recipe, "base_recipe": self.bench.identity(self.bench.recipe)["recipe"]}
        settings = named | self.bench.settings | recipe | {"failed": list(self.failures)}
        settings |= {"is_complete": is_complete and not missing, "missing": missing}
        runs = sorted(self.runs, key=lambda run: self.order.index(run.label))
        write_result(args.output, Result(name="recipe-ablations", settings=settings, runs=runs, notes=args.notes, device=args.device))

    def say(self, words: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {words}", file=sys.stderr, flush=True)


class Training:
    """One `refusion train` in a process of its own, its lines with their times in a log."""

    def __init__(self, arm: Arm, options: Sequence[str], log: Path) -> None:
        self.arm, self.log, self.began = arm, log, time.perf_counter()
        self.is_resumed = "--resume" in options
        self.lines: list[tuple[float, str]] = []
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(harness.ROOT / "src"), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "refusion", "train", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            process_group=0,  # a terminal's Ctrl-C is for us; a second one would end it without a checkpoint
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None, "it is a pipe"
        with open(self.log, "a", encoding="utf-8", buffering=1) as file:
            for line in self.process.stdout:
                self.lines.append((time.perf_counter() - self.began, line.rstrip()))
                file.write(f"{self.lines[-1][0]:7.1f} s  {line.rstrip()}\n")

    @property
    def code(self) -> int | None:
        """None while it runs."""
        code = self.process.poll()
        if code is not None and not hasattr(self, "seconds"):
            self.seconds = time.perf_counter() - self.began
            self.reader.join(timeout=2.0)  # a grandchild may still hold the pipe
        return code

    def interrupt(self) -> None:
        """Let it finish the step under way and save."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """With the loader and compile processes it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def last_words(self) -> str:
        return next((line for _, line in reversed(self.lines) if line.strip()), "without a word")

    def parts(self) -> dict[str, float]:
        """Seconds from one kind of line to the next: reading the data, the first step (which compiles), the other steps, the end."""
        steps = [at for at, line in self.lines if line.startswith("step ") and "tokens/s" in line]
        marks = {
            "start": next((at for at, line in self.lines if line.startswith("reading ")), None),
            "data": next((at for at, line in self.lines if "weights trained" in line), None),
            "first step": steps[0] if steps else None,
            "other steps": steps[-1] if steps else None,
            "end": self.seconds,
        }
        found, before = {}, 0.0
        for name, at in marks.items():
            if at is not None:
                found[name], before = at - before, at
        return found


class Bench:
    """Everything an arm is measured by."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe) -> None:
        self.args, self.recipe = args, recipe
        self.is_cuda = args.device.startswith("cuda")
        self.data = args.data or harness.chat_prompts()
        self.rows = harness.rows_of(self.data, args.rows)
        if not self.rows:
            raise ConfigError(f"--rows {args.rows} names no row of {self.data}")
        self.batch_size = args.batch_size or (64 if self.is_cuda else 4)
        self.slots = SlotParams(**args.slots) if args.slots else comparison.SLOTS
        self.sampling = SamplingParams(max_tokens=args.max_tokens)
        self.is_warm = not self.is_cuda
        self.seconds = MEASURING_SECONDS
        """What the last measurement took."""

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for measurements to stand in one file."""
        counts = {
            "num_prompts": len(self.rows),
            "validation_rows": self.args.validation_rows,
            "batch_size": self.batch_size,
            "dtype": self.args.dtype or ("bfloat16" if self.is_cuda else None),
        }
        return counts | {"base": Path(self.recipe.model.base).name, "data": self.data, "slots": self.slots, "sampling": self.sampling}

    def identity(self, recipe: Recipe) -> dict[str, Any]:
        """Recipe and measurement, without the places of files."""
        table = recipe.to_table()
        for name in NOT_COMPARED:
            section, _, key = name.partition(".")
            del table[section][key]
        sources = [{**source, "path": Path(source["path"]).name} for source in table["data"]["sources"]]
        table["data"] |= {"sources": sources, "exclude": [Path(path).name for path in table["data"]["exclude"]]}
        table["model"]["base"] = Path(table["model"]["base"]).name
        return to_plain({"recipe": table, "measured": {**self.settings, "rows": self.args.rows}})

    def known(self, file: Path, recipe: Recipe) -> Run | None:
        """The run of an earlier measurement; None if there is none, or of something else."""
        if not file.exists():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return Run(**found["run"]) if found["identity"] == self.identity(recipe) else None

    def measure(self, arm: Arm, final: Path) -> tuple[dict[str, Figure], dict[str, float]]:
        """Figures of a model, and how long each part of measuring them took."""
        clock = Clock()
        path = self.untrained if arm.label == UNTRAINED else final
        llm = self.load(path)
        clock.lap("load")
        if not self.is_warm:  # compiles on all cores, together; trainings have their own compiling to do at that time
            llm.warm_up(("refusion",), batch_size=self.seats, sampling=self.sampling, slots=self.whole(llm), prompt_tokens=256)
            llm.warm_up(("autoregressive",), batch_size=self.batch_size, sampling=self.sampling, prompt_tokens=256)
            self.is_warm = True
            clock.lap("warm-up")
        figures: dict[str, Figure] = {}
        by_slots = self.answers(llm, "refusion", self.seats)
        clock.lap("slots")
        one_by_one = self.answers(llm, "autoregressive", self.batch_size)
        clock.lap("one by one")
        names = ("tokens_per_forward", "agreement", "base_nll", "mean_tokens", "repetitive_share", "stopped_share")
        found = chat.figures(llm, self.base, by_slots, self.score_batch)
        figures |= {name: found[name] for name in names}
        found = chat.figures(llm, self.base, one_by_one, self.score_batch)
        figures |= {f"{name}_one_by_one": found[name] for name in names[1:]}
        clock.lap("agreement")
        del llm
        self.free()
        figures |= self.losses(path)
        self.free()
        clock.lap("losses")
        if arm.label != UNTRAINED:
            figures |= report_figures(final.parent / "report.json")
        self.seconds = sum(seconds for part, seconds in clock.parts.items() if part != "warm-up")
        return figures, clock.parts

    def load(self, path: Path) -> LLM:
        rows = comparison.ROOM * comparison.DECODE_ROWS if self.is_cuda else None
        room = self.batch_size * comparison.ROOM  # trainings share the memory
        engine = EngineSettings(max_num_seqs=self.batch_size, cache_tokens=room, max_decode_rows=rows, prefix_caching=False)
        return LLM.from_pretrained(path, device=self.args.device, dtype=self.args.dtype, engine=engine)

    @property
    def seats(self) -> int:
        """Prompts of slot decoding together: so many can prepare all their lengths in every forward."""
        return min(self.batch_size, comparison.SLOT_SEATS)

    @property
    def score_batch(self) -> int:
        return 32 if self.is_cuda else 4

    def whole(self, llm: LLM) -> SlotParams:
        """The slots with every length prepared, so that tokens per forward do not depend on what forwards cost."""
        settings: SlotSettings = llm.resolve_slots(self.slots)
        return replace(self.slots, max_candidates=settings.candidates())

    def answers(self, llm: LLM, decoder: str, batch_size: int) -> harness.Outcome:
        prompts: list[Any] = [harness.chat(row["query"]) for row in self.rows]
        slots, began = self.whole(llm), time.perf_counter()
        outputs = llm.generate(prompts, self.sampling, slots, decoder, batch_size=batch_size)
        return harness.Outcome(harness.Setting(decoder=decoder, slots=slots), outputs, time.perf_counter() - began)

    def losses(self, path: Path) -> dict[str, Figure]:
        """Both terms over the validation rows, corrupted as in the base recipe; in the type that answers are made in."""
        batches, dtype = self.validation, torch.bfloat16 if self.is_cuda else torch.float32
        model = load_weights(path, dtype=dtype).to(self.args.device).eval()
        settings = LossSettings(chunk_size=self.recipe.objective.chunk_size)
        sums, counts = {"ar": 0.0, "mdm": 0.0}, {"ar": 0.0, "mdm": 0.0}
        for batch in batches:
            moved = {name: value.to(self.args.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
            moved |= {f"{term}_normaliser": torch.tensor(1.0, device=self.args.device) for term in sums}
            with torch.no_grad():
                terms = packed_loss(model, moved, settings)
            for term, count in (("ar", "num_ar"), ("mdm", "num_units")):
                sums[term] += terms[term].item()  # one synchronisation a batch
                counts[term] += batch[count]
        return {f"validation_{term}": sums[term] / max(counts[term], 1.0) for term in sums}

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        """Batches of the rows whose losses are scored."""
        base = load_base(self.recipe.model)
        rows = replace(self.recipe.data, sources=(Source(path=str(self.data), limit=self.args.validation_rows),), exclude=())
        held_out, _ = load_data(replace(self.recipe, data=rows), base, lambda line: None)
        corruption = Corruption(
            examples=held_out,
            objective=self.recipe.objective,
            mask_token_id=base.mask_token_id,
            seed=self.recipe.run.seed,
            pack_length=self.recipe.data.pack_length,
        )
        schedule = validation_schedule(corruption, rows_per_step=4)
        return list(PackedBatches(schedule, chunk_size=self.recipe.objective.chunk_size))

    @cached_property
    def base(self) -> LLM:
        """The judge of agreement."""
        return LLM.from_pretrained(self.recipe.model.base, device=self.args.device, dtype="float32")

    @cached_property
    def untrained(self) -> Path:
        """The base with the mask token it is trained with."""
        found, target = hub.resolve(self.recipe.model.base), self.args.work / "untrained"
        if not target.exists():
            with atomic_directory(target) as draft:
                for file in found.iterdir():
                    if file.is_file():
                        shutil.copyfile(file, draft / file.name)
                config = json.loads((found / "config.json").read_text(encoding="utf-8"))
                config["mask_token_id"] = load_base(self.recipe.model).mask_token_id
                (draft / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return target

    def free(self) -> None:
        """Engines hold themselves in cycles; graphs and caches go with them."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


class Clock:
    """Seconds of the parts of something."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part], self._since = now - self._since, now


def report_figures(path: Path) -> dict[str, Figure]:
    """What the training itself said."""
    report = json.loads(path.read_text(encoding="utf-8"))
    names = ("examples", "loss_ar", "loss_mdm", "peak_memory_gb")
    return {f"training_{name}": report[name] for name in names if report[name] is not None}


def shown(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())


if __name__ == "__main__":
    harness.script(main)
