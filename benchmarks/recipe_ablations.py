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
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import harness
import torch
from recipe_arms import UNTRAINED, Arm, arms
from recipe_bench import NOT_COMPARED, Bench
from recipe_training import Training

from refusion.atomic import atomic_file
from refusion.errors import ConfigError, RefusionError
from refusion.evaluation.results import Result, Run, num_cores, to_plain, write_result
from refusion.training.checkpoints import checkpoints
from refusion.training.recipe import changed_settings, load_recipe, recipe_from_table

KILL_SECONDS = 3.0
"""Before the end of --seconds: what still runs then is ended without a checkpoint."""
SAVING_SECONDS = 10.0
"""For trainings to save after Ctrl-C."""
LAST_ONES = 0.6
"""What the last trainings take over what the one before took, with fewer of them at a time."""


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


def shown(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())


if __name__ == "__main__":
    harness.script(main)
