"""The Trainer: `transformers.Trainer` with packed batches, global normalisers, atomic checkpoints and our own log line.

What is learnt is in `objectives`, what is fed in `batches`; a whole run is put together in `run`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from refusion.atomic import atomic_directory
from refusion.errors import ConfigError
from refusion.training.batches import PackedBatches

Batch = dict[str, Any]


class RefusionTrainer(Trainer):
    """Trains a model that `objectives.bind_objective` prepared on the batches of a `PackedBatches`."""

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        batches: PackedBatches,
        frozen_parameters: frozenset[str] = frozenset(),
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=batches, **kwargs)
        self.batches = batches
        self.frozen_parameters = frozen_parameters
        # Our loss is already a mean over the whole step; without these the Trainer would divide it once more.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._sums: Tensor | None = None
        self._num_tokens = 0.0
        self._since = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Batches come ready made and already divided among the processes, so accelerate must not divide them again."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.batches,
            batch_size=None,
            num_workers=workers,
            collate_fn=_to_arrays,
            prefetch_factor=4 if workers else None,
            multiprocessing_context="fork" if workers else None,
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one step, on the device, each with the normalisers of the step over all of them and all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = torch.tensor([sum(batch[name] for batch in batches) for name in ("num_ar", "num_documents", "num_tokens")])
        if self.args.world_size > 1:  # a synchronisation per step; with one process there is none
            counts = self._summed(counts.to(device)).cpu()
        num_ar, num_documents, num_tokens = counts.tolist()
        self._num_tokens += num_tokens
        for batch in batches:
            batch["ar_normaliser"] = torch.tensor(max(num_ar, 1.0))
            batch["mdm_normaliser"] = torch.tensor(max(num_documents, 1.0))
        on_device = [{name: _to_device(value, device) for name, value in batch.items()} for batch in batches]
        return on_device, torch.tensor(num_documents)

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The share of this micro-batch in the loss of the step. DDP averages gradients over processes, hence the factor."""
        terms = model(objective_batch=inputs)
        values = torch.stack([terms["ar"], terms["mdm"]]).detach()
        self._sums = values if self._sums is None else self._sums + values
        loss = terms["loss"] * self.args.world_size
        return (loss, terms) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters of which only a row is trained must not decay."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self.frozen_parameters]

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add both loss terms and the speed to the Trainer's line; a loss that is not finite ends the run."""
        if "loss" in logs:
            if self._sums is not None:
                # One synchronisation per log line.
                sums = self._summed(self._sums)
                steps = max(self.state.global_step - self._last_logged_step, 1)
                logs["loss_ar"], logs["loss_mdm"] = (value / steps for value in sums.tolist())
            now = time.perf_counter()
            logs["tokens_per_second"] = self._num_tokens / (now - self._since)
            self._sums, self._num_tokens, self._since = None, 0.0, now
            self._last_logged_step = self.state.global_step
            if not math.isfinite(logs["loss"]):
                raise ConfigError(f"the loss is {logs['loss']} at step {self.state.global_step}; lower optimizer.learning_rate")
        super().log(logs, start_time)

    def _summed(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        total = self.accelerator.reduce(values, "sum") if self.args.world_size > 1 else values
        assert isinstance(total, Tensor), type(total)
        return total

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._last_logged_step = self.batches.start_step
        self._since = time.perf_counter()
        return super().train(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its place and move it there whole; older ones go only after that."""
        if self.args.world_size > 1:
            super()._save_checkpoint(model, trial)
            return
        run_dir = Path(self._get_output_dir(trial))
        with atomic_directory(run_dir / f"checkpoint-{self.state.global_step}", replace=True) as draft:
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            holder = draft / "holder"
            try:
                self._get_output_dir = lambda trial: str(holder)  # the parent class derives every path from it
                super()._save_checkpoint(model, trial)
            finally:
                del self._get_output_dir
                self.args.save_total_limit = limit
            for path in (holder / f"checkpoint-{self.state.global_step}").iterdir():
                path.rename(draft / path.name)
            shutil.rmtree(holder)
        for old in checkpoints(run_dir)[: -(limit or 1)]:
            shutil.rmtree(old)


class ProgressLine(TrainerCallback):
    """Hands one short line per log entry to `report`."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            speed = f"{logs['tokens_per_second']:,.0f} tokens/s"
            terms = f"loss {logs['loss']:.4f}  ar {logs['loss_ar']:.4f}  mdm {logs['loss_mdm']:.4f}"
            steered = f"lr {logs['learning_rate']:.2e}  norm {logs.get('grad_norm', 0.0):.2f}"
            self.report(f"step {state.global_step}/{state.max_steps}  {terms}  {steered}  {speed}")


class TimeLimit(TrainerCallback):
    """Saves and stops after so many minutes."""

    def __init__(self, minutes: float) -> None:
        self.deadline = time.monotonic() + 60 * minutes

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if time.monotonic() > self.deadline:
            control.should_save = control.should_training_stop = True


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in run_dir.glob("checkpoint-*") if (p / "trainer_state.json").exists() and p.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def _to_arrays(batch: Any) -> Any:
    """Arrays travel from the workers through a pipe; tensors would need shared memory, of which containers often have 64 MB."""
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in batch.items()}


def _to_device(value: Any, device: torch.device) -> Any:
    """Arrays and tensors go to the device, from pinned memory where that lets the copy overlap with the step before."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        return value
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value
