"""What the training benchmarks train: shapes with random weights, rows in lengths like those of chat pairs, and what watches a run."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from refusion.training.base import BaseModel, toy_config
from refusion.training.batches import Batch, PackedBatches, pack_batch
from refusion.training.data import Examples
from refusion.training.recipe import Recipe

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QWEN3_1_7B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
MASK_ID = 2


def shape_config(shape: dict[str, Any], *, is_tiny: bool) -> Any:
    """The configuration of a shape, or of the toy model in its place."""
    return toy_config() if is_tiny else Qwen3Config(**shape) if "head_dim" in shape else LlamaConfig(**shape)


def random_base(config: Any) -> BaseModel:
    """A model of this shape with random weights, made where it is trained."""
    with torch.random.fork_rng(), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return BaseModel(model=model, path=None, tokenizer=None, mask_token_id=MASK_ID)


def random_examples(recipe: Recipe, vocab_size: int) -> Examples:
    """Prompts and answers in lengths like those of chat pairs (median 30 and 150, log-normal), enough for the run."""
    generator = np.random.default_rng(0)
    needed = recipe.run.max_steps * recipe.data.rows_per_step * recipe.data.pack_length
    count = max(64, int(needed / 150 / 4))
    longest = recipe.data.pack_length // 2 - 8
    scale = min(1.0, longest / 400)
    prompt, answer = (np.clip(generator.lognormal(np.log(m * scale), 0.7, count), 2, longest).astype(np.int64) for m in (30, 150))
    ends = np.cumsum(prompt + answer)
    return Examples(
        tokens=generator.integers(8, vocab_size, int(ends[-1]), dtype=np.int64).astype(np.int32),
        starts=ends - prompt - answer,
        answers=ends - answer,
        ends=ends,
        weights=np.ones(count),
        is_distilled=np.zeros(count, dtype=bool),
    )


class PaddedBatches(PackedBatches):
    """The documents of the same steps, one a row, padded to the longest: what training without packing computes."""

    def micro_batch(self, step: int, part: int) -> Batch:
        rows = self.schedule.rows(step, self.process * self.accumulation + part, self.accumulation * self.num_processes)
        corruption = self.schedule.corruption
        documents = [[corruption.row(epoch, int(i))] for epoch, ids in rows for i in ids]
        length = max(len(document[0].input_ids) for document in documents)
        return pack_batch(documents, -(-length // 8) * 8, pad_id=corruption.mask_token_id, chunk_size=self.chunk_size)


class Deadline(TrainerCallback):
    """Ends a run after so many seconds from its second step on; the first one compiles."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started: float | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.started is None:
            self.started = time.perf_counter()
        elif time.perf_counter() - self.started > self.seconds:
            control.should_training_stop = True


class KernelProfile(TrainerCallback):
    """Records the device's kernels over three steps: which take the time, and how much of it the device is busy."""

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        self.kernel_ms: dict[str, float] = {}
        self.busy_share = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.first_step:
            torch.cuda.synchronize()
            self.started = time.perf_counter()
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.first_step + 3:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - self.started
            self.profiler.__exit__(None, None, None)
            kernels = sorted(self.profiler.key_averages(), key=lambda event: -event.self_device_time_total)
            self.busy_share = sum(event.self_device_time_total for event in kernels) / 1e6 / seconds
            self.kernel_ms = {event.key: event.self_device_time_total / 3e3 for event in kernels[:40]}
