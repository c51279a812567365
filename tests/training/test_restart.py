"""Runs killed with SIGKILL at every kind of moment, and resumed: the weights are those of an unbroken run, bit for bit."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refusion.errors import CheckpointError
from refusion.training import checkpoints as checkpoint_files
from refusion.training import export, trainer
from refusion.training.checkpoints import checkpoints
from refusion.training.recipe import Recipe
from refusion.training.run import train

Build = Callable[..., Recipe]
Weights = Callable[[Path], dict[str, Tensor]]
Patch = Callable[[], None]

NUM_STEPS = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def recipe(small_recipe: Build) -> Recipe:
    """Everything that has a state: dropout draws from the global generator, the schedule moves, validation comes in between."""
    return small_recipe(
        method={"name": "lora", "rank": 4, "dropout": 0.2},
        data={"accumulation": 2, "validation_rows": 5},
        run={"max_steps": NUM_STEPS, "save_steps": 2, "keep_checkpoints": 2, "validate_steps": 3},
        optimizer={"warmup_ratio": 0.3},
    )


@pytest.fixture
def unbroken(runs: Path, recipe: Recipe, final_weights: Weights) -> dict[str, Tensor]:
    if not (runs / "unbroken" / "final").exists():
        train(recipe, output=runs / "unbroken", report=lambda line: None)
    return final_weights(runs / "unbroken")


def _in_a_step() -> None:
    compute_loss = trainer.RefusionTrainer.compute_loss

    def killing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            _kill()
        return compute_loss(self, *args, **kwargs)

    trainer.RefusionTrainer.compute_loss = killing


def _in_the_first_steps() -> None:
    compute_loss = trainer.RefusionTrainer.compute_loss
    trainer.RefusionTrainer.compute_loss = lambda self, *a, **k: _kill() if self.state.global_step == 1 else compute_loss(self, *a, **k)


def _while_writing_the_optimizer() -> None:
    save = torch.save

    def half(value: object, path: Any, *args: Any, **kwargs: Any) -> None:
        save(value, path, *args, **kwargs)
        if "checkpoint-4" in str(path) and str(path).endswith("optimizer.pt"):
            os.truncate(path, os.path.getsize(path) // 2)
            _kill()

    torch.save = half


def _before_the_checkpoint_has_its_name() -> None:
    publish = trainer.publish
    trainer.publish = lambda draft, target: _kill() if target.name == "checkpoint-4" else publish(draft, target)


def _while_deleting_an_old_checkpoint() -> None:
    def half(path: Path, **_: Any) -> None:
        if path.name == ".checkpoint-2.old" and path.exists():
            (path / "optimizer.pt").unlink()
            _kill()

    checkpoint_files.shutil = type("shutil", (), {"rmtree": staticmethod(half)})  # pyright: ignore[reportAttributeAccessIssue]


def _while_writing_the_final_model() -> None:
    export._merged = lambda *_: _kill()  # the adapter is written, final/ is not


KILLS = [
    _in_a_step,
    _in_the_first_steps,
    _while_writing_the_optimizer,
    _before_the_checkpoint_has_its_name,
    _while_deleting_an_old_checkpoint,
    _while_writing_the_final_model,
]


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__.strip("_"))
def test_a_killed_and_resumed_run_has_the_weights_of_an_unbroken_one(
    tmp_path: Path, recipe: Recipe, unbroken: dict[str, Tensor], final_weights: Weights, kill: Patch
) -> None:
    assert _train_in_a_child(recipe, tmp_path, kill) == signal.SIGKILL
    assert not (tmp_path / "final").exists()
    report = train(recipe, output=tmp_path, resume=bool(checkpoints(tmp_path)), report=lambda line: None)
    assert report.steps == NUM_STEPS
    resumed = final_weights(tmp_path)
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == ["checkpoint-6", "checkpoint-8"], "two are kept, no remains"


def test_a_run_killed_again_and_again_at_any_time_ends_with_the_same_weights(
    tmp_path: Path, recipe: Recipe, unbroken: dict[str, Tensor], final_weights: Weights
) -> None:
    started = time.perf_counter()
    assert _train_in_a_child(recipe, tmp_path / "timed", lambda: None) == 0
    whole = time.perf_counter() - started
    delays = (whole * torch.empty(3).uniform_(0.2, 0.9, generator=torch.Generator().manual_seed(0))).tolist()
    tmp_path = tmp_path / "killed"
    signals = [_train_in_a_child(recipe, tmp_path, lambda: None, delay=delay) for delay in delays]
    assert signal.SIGKILL in signals
    if not (tmp_path / "final").exists():
        train(recipe, output=tmp_path, resume=bool(checkpoints(tmp_path)), report=lambda line: None)
    resumed = final_weights(tmp_path)
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


def test_checkpoints_hold_no_pickle_that_is_ever_executed(runs: Path, recipe: Recipe, unbroken: dict[str, Tensor]) -> None:
    found = checkpoints(runs / "unbroken")
    assert found
    for path in [*found[-1].glob("*.pt"), *found[-1].glob("*.pth"), *found[-1].glob("*.bin")]:
        with torch.serialization.safe_globals([*_numpy_globals()]):
            torch.load(path, weights_only=True)


def test_a_disk_that_is_full_when_a_checkpoint_is_complete_but_not_on_disk_loses_nothing(
    tmp_path: Path, recipe: Recipe, unbroken: dict[str, Tensor], final_weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = trainer.publish

    def full(draft: Path, target: Path) -> None:
        if target.name == "checkpoint-4":
            os.truncate(draft / "trainer_state.json", 3)
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(draft, target)

    monkeypatch.setattr(trainer, "publish", full)
    with pytest.raises(
        CheckpointError, match=r"cannot write .*checkpoint-4: No space left on device; free some space and go on with --resume"
    ):
        train(recipe, output=tmp_path, report=lambda line: None)
    assert [p.name for p in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    train(recipe, output=tmp_path, resume=True, report=lambda line: None)
    resumed = final_weights(tmp_path)
    assert all(torch.equal(resumed[key], value) for key, value in unbroken.items())


@pytest.mark.parametrize("limit", [300_000, 500_000], ids=["weights", "optimizer"])
def test_a_write_that_the_system_refuses_is_one_line_and_loses_nothing(tmp_path: Path, small_recipe: Build, limit: int) -> None:
    """The toy model's weights are 411 kB, its optimizer twice that; no file may grow beyond the limit from the second checkpoint on."""
    recipe = small_recipe(run={"save_steps": 2, "max_steps": 6})
    prepare = trainer.remove_leftovers

    def limited(run_dir: Path) -> None:
        prepare(run_dir)
        if checkpoints(run_dir):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    child = os.fork()
    if child == 0:
        trainer.remove_leftovers = limited
        try:
            train(recipe, output=tmp_path, report=lambda line: None)
        except CheckpointError as error:
            os._exit(0 if str(error).startswith(f"cannot write {tmp_path}/checkpoint-4: ") and "\n" not in str(error) else 3)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [p.name for p in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]


def test_a_disk_too_full_for_the_final_model_is_one_line_and_loses_nothing(tmp_path: Path, small_recipe: Build) -> None:
    recipe = small_recipe(run={"save_steps": 2})
    write = export._write_final

    def limited(*args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        write(*args)

    child = os.fork()
    if child == 0:
        export._write_final = limited
        try:
            train(recipe, output=tmp_path, report=lambda line: None)
        except CheckpointError as error:
            os._exit(0 if str(error).startswith(f"cannot write {tmp_path}/final: ") and "\n" not in str(error) else 3)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [p.name for p in tmp_path.iterdir() if "final" in p.name] == []
    assert train(recipe, output=tmp_path, resume=True, report=lambda line: None).model == str(tmp_path / "final")


def test_loader_processes_of_a_killed_run_end_with_it(tmp_path: Path, small_recipe: Build) -> None:
    def note_workers() -> None:
        compute_loss = trainer.RefusionTrainer.compute_loss

        def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
            (tmp_path / "workers").write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
            if self.state.global_step == 1:
                _kill()
            return compute_loss(self, *args, **kwargs)

        trainer.RefusionTrainer.compute_loss = noting

    assert _train_in_a_child(small_recipe(data={"num_workers": 2}), tmp_path / "run", note_workers) == signal.SIGKILL
    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert workers
    deadline = time.monotonic() + 5
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "a loader process outlives its run"
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _train_in_a_child(recipe: Recipe, run_dir: Path, patch: Patch, delay: float | None = None) -> int:
    """Train in a forked process; returns the signal that ended it, 0 if none did."""
    child = os.fork()
    if child == 0:
        try:
            patch()
            train(recipe, output=run_dir, resume=bool(checkpoints(run_dir)), report=lambda line: None)
            os._exit(0)
        finally:
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the child failed for another reason"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _kill() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _numpy_globals() -> list[Any]:
    import numpy as np

    return [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
