"""The Trainer: `transformers.Trainer` with packed batches, global normalisers, atomic checkpoints and our own log line.

What is learnt is in `objectives`, what is fed in `batches`; a whole run is put together in `run`.
"""

from __future__ import annotations

import ctypes
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from refusion.errors import ConfigError
from refusion.training.batches import PackedBatches
from refusion.training.checkpoints import checkpoints, publish, remove_checkpoint, remove_leftovers, saving

Batch = dict[str, Any]
Probe = Callable[[nn.Module], dict[str, float]]
"""Figures of a transformers causal LM in evaluation mode, PEFT wrapper and all."""


_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class RefusionTrainer(Trainer):
    """Trains a model that `objectives.bind_objective` prepared on the batches of a `PackedBatches`."""

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        batches: PackedBatches,
        validation: PackedBatches | None = None,
        frozen_parameters: frozenset[str] = frozenset(),
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=batches, eval_dataset=validation, **kwargs)
        self.batches = batches
        self.validation = validation
        self.frozen_parameters = frozen_parameters
        # Our loss is already a mean over the whole step; without these the Trainer would divide it once more.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        if self.is_fsdp_enabled and args.bf16:
            _keep_float32_outside_layers(self.accelerator.state.fsdp_plugin)
        self._sums: Tensor | None = None
        self._num_tokens = 0.0
        self._since = time.perf_counter()

    @property
    def network(self) -> Any:
        """The model under its wrappers; the parent class allows for none."""
        assert self.model is not None, "a RefusionTrainer is made with its model"
        return self.model

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Batches come ready made and already divided among the processes, so accelerate must not divide them again."""
        return self._loader(self.batches)

    def _loader(self, batches: PackedBatches) -> DataLoader[Batch]:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            collate_fn=_to_arrays,
            prefetch_factor=4 if workers else None,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_end_with_parent,
            generator=torch.Generator(),  # a loader draws a seed; drawn from the global generator, a resumed run's dropout would differ
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one step, on the device, each with the normalisers of the step over all of them and all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = torch.tensor([sum(batch[name] for batch in batches) for name in ("num_ar", "num_units", "num_tokens")])
        if self.args.world_size > 1:  # a synchronisation per step; with one process there is none
            counts = self._summed(counts.to(device)).cpu()
        num_ar, num_units, num_tokens = counts.tolist()
        self._num_tokens += num_tokens
        for batch in batches:
            batch["ar_normaliser"] = torch.tensor(max(num_ar, 1), dtype=torch.float32)
            batch["mdm_normaliser"] = torch.tensor(max(num_units, 1), dtype=torch.float32)
        on_device = [{name: _to_device(value, device) for name, value in batch.items()} for batch in batches]
        return on_device, torch.tensor(num_units)

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights of a checkpoint; those of FSDP are written by accelerate beside the optimizer, in a form of their own."""
        if self.is_deepspeed_enabled:
            state = self.gathered_state_dict()
            if self.args.should_save:
                self._save(output_dir, state_dict=state)
        elif not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)

    def gathered_state_dict(self) -> dict[str, Any] | None:
        """The whole weights on the CPU of the first process where they are sharded, None where every process has them."""
        if self.is_fsdp_enabled:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            return get_model_state_dict(self.network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if any(hasattr(parameter, "ds_id") for parameter in self.network.parameters()):  # ZeRO-3
            return self._gathered_by_deepspeed()
        return None

    def _gathered_by_deepspeed(self) -> dict[str, Any]:
        """One weight after the other, so that no process holds two of them in its accelerator's memory."""
        from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]  (an extra)

        state: dict[str, Any] = {}
        for name, value in self.network.state_dict(keep_vars=True).items():
            with GatheredParameters([value] if isinstance(value, nn.Parameter) else []):
                if self.is_world_process_zero():
                    state[name] = value.detach().to("cpu", copy=True)
        return state

    def compute_loss_context_manager(self) -> Any:
        """DeepSpeed's autocast covers its engine alone; validation rows go past it."""
        if self.is_deepspeed_enabled and self.args.hf_deepspeed_config.get_value("torch_autocast.enabled"):
            return torch.autocast(self.args.device.type, dtype=torch.bfloat16)
        return super().compute_loss_context_manager()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Both loss terms over the validation rows, corrupted in the same way each time; labels alone, no teacher."""
        assert self.validation is not None, "a Trainer without validation rows is never asked to evaluate"
        started = time.perf_counter()
        self.network.eval()
        sums = torch.zeros(4, dtype=torch.float64)  # AR loss, MDM loss, AR targets, MDM units
        for batch in self._loader(self.validation):
            counts = [float(batch["num_ar"]), float(batch["num_units"])]
            batch |= {"ar_normaliser": torch.tensor(1.0), "mdm_normaliser": torch.tensor(1.0)}
            with torch.no_grad(), self.compute_loss_context_manager():
                terms = self.network(objective_batch={name: _to_device(value, self.args.device) for name, value in batch.items()})
            sums += torch.tensor([terms["ar"].item(), terms["mdm"].item(), *counts], dtype=torch.float64)  # one synchronisation a batch
        ar, mdm, num_ar, num_units = self._summed(sums.float().to(self.args.device)).tolist()
        metrics = {"eval_loss_ar": ar / max(num_ar, 1.0), "eval_loss_mdm": mdm / max(num_units, 1.0)}
        metrics = {"eval_loss": sum(metrics.values()), **metrics}
        self.network.train()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - started  # tokens per second are those of training alone
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its place and move it there whole; older ones go only after that.

        Several processes write into one draft and none goes on before it has become the checkpoint. A process that cannot write ends, and
        its launcher ends the others; what was complete stays.
        """
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        draft = run_dir / f".{name}.tmp"
        if self.is_world_process_zero():
            remove_leftovers(run_dir)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with saving(run_dir / name):
            try:
                self._get_output_dir = lambda trial: str(draft)  # the parent class derives every path from it
                super()._save_checkpoint(model, trial)
            finally:
                del self._get_output_dir
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                (draft / name / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                publish(draft / name, run_dir / name)
                for old in checkpoints(run_dir)[: -(limit or 1)]:
                    remove_checkpoint(old)
        self.accelerator.wait_for_everyone()


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
        elif state.is_world_process_zero and logs:
            figures = [f"{name} {logs[name]:.4f}" for name in logs if name.startswith(("eval_loss_", "probe_"))]
            if figures:
                self.report(f"step {state.global_step}/{state.max_steps}  {'  '.join(figures)}")


class ProbeCallback(TrainerCallback):
    """Measures the model every so many steps by a function from above `training`, such as tokens per forward of its answers.

    Only the first process measures; the others wait for it at their next step.
    """

    def __init__(self, probe: Probe, every: int, log: Callable[[dict[str, float]], None]) -> None:
        self.probe = probe
        self.every = every
        self.log = log

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            self.log(measure(self.probe, kwargs["model"]))


def measure(probe: Probe, model: nn.Module) -> dict[str, float]:
    """What a probe says about the model, under names that begin with `probe_`; the random state is as before."""
    was_training = model.training
    with torch.random.fork_rng(), torch.no_grad():
        figures = probe(model.eval())
    model.train(was_training)
    return {f"probe_{name}": value for name, value in figures.items()}


class TimeLimit(TrainerCallback):
    """Saves and stops after so many minutes."""

    def __init__(self, minutes: float) -> None:
        self.deadline = time.monotonic() + 60 * minutes

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if time.monotonic() > self.deadline:
            control.should_save = control.should_training_stop = True


def _keep_float32_outside_layers(fsdp_plugin: Any) -> None:
    """Weights are gathered in bfloat16 and nothing else changes its type: by default accelerate also rounds a batch's weights and
    normalisers, the loss, and the gradients before they are summed."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def _end_with_parent(_: int) -> None:
    """Loader processes of a killed run would wait for ever on a pipe that nobody reads; Linux can end them with their parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


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
