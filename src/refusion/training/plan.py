"""What a run will take before it starts: memory of weights, gradients, optimizer and activations, and time, for the hardware at hand.

Sizes come from the model itself, built without memory on the meta device: parameters are counted, and `activations` records what autograd
keeps. Time is arithmetic at a share of a matrix product's measured speed, and after it memory traffic at the measured speed of a copy.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from refusion.training.activations import activation_bytes, layer_bytes
from refusion.training.base import base_config
from refusion.training.network import computes_in_bfloat16
from refusion.training.objectives import inner_causal_lm
from refusion.training.recipe import Recipe

# R = packed rows of a micro-batch, L = tokens in a row, T = R * L, H = hidden size, V = vocabulary

MATMUL_SHARE = 0.85
"""Speed of a layer's matrix products against a big square one; an assumption, which benchmarks/training_speed.py checks."""
TRAFFIC_PER_KEPT_BYTE = 10
"""Bytes that a step reads and writes outside matrix products for each byte that autograd keeps; likewise."""
STEP_TRAFFIC = {"weight": 18, "trained": 40}
"""Bytes a weight: its cast and its gradient's sum in a micro-batch; norm, clipping and AdamW in a step."""
TYPICAL_DOCUMENT = 512
"""Tokens of a document, for attention that skips what others hold; data is not read for a plan."""
OVERHEAD = 1.05
"""Allocator rounding and fragments."""
RESERVED_BYTES = {"cuda": 1_200_000_000, "cpu": 700_000_000}
"""The CUDA context with its libraries, or the Python process with torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Bytes and seconds of one process of a run."""

    device: str
    num_processes: int
    parameters: int
    trained: int
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    head_bytes: int
    teacher_bytes: int
    total_bytes: int
    available_bytes: int
    tokens_per_step: int
    """Over all processes, padding counted."""
    flops_per_step: float
    seconds_per_step: float
    num_steps: int
    """0 where the recipe counts epochs: that takes reading the data."""

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.available_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What a process may use."""

    device: str
    memory_bytes: int
    flops: float
    """Multiplications and additions a second of a big matrix product in the type that training computes in."""
    bytes_per_second: float
    """Bytes that a copy inside the device's memory reads and writes in a second."""
    num_processes: int = 1


def make_plan(recipe: Recipe, hardware: Hardware, config: Any = None) -> Plan:
    """Estimate one process's memory, and the time of a step on all processes; `config` is that of the base, where it is no checkpoint."""
    config = config or base_config(recipe.model)
    compute_bytes = 2 if computes_in_bfloat16(recipe, hardware.device) else 4
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    trained = _num_trained(model, recipe)
    rows = recipe.data.rows_per_step // (recipe.data.accumulation * hardware.num_processes)
    tokens = rows * recipe.data.pack_length
    weights = int(parameters * (0.6 if recipe.method.name == "qlora" else 4)) + (trained * 4 if recipe.method.name != "full" else 0)
    # The gradient of a weight that is frozen but for a row is formed whole.
    with_gradient = parameters if recipe.method.freeze_embeddings else trained
    activation = activation_bytes(recipe, rows, compute_bytes, config)
    head = _head_bytes(recipe, config, tokens, compute_bytes)
    teacher = parameters * compute_bytes if recipe.objective.distill else 0
    # DeepSpeed's optimizer updates a copy of the weights.
    sizes = (weights, 4 * with_gradient, (12 if recipe.parallel.name == "deepspeed" else 8) * with_gradient)
    weights_here, gradients, optimizer = (int(share * size) for share, size in zip(_shares(recipe, hardware), sizes, strict=True))
    total = int((weights_here + gradients + optimizer + activation + head + teacher) * OVERHEAD) + RESERVED_BYTES[hardware.device]
    flops = flops_per_token(config, _attended(recipe)) * recipe.data.rows_per_step * recipe.data.pack_length
    flops *= 4 / 3 if recipe.model.gradient_checkpointing else 1.0
    traffic = _traffic(recipe, rows, compute_bytes, config, parameters, trained) / hardware.bytes_per_second
    return Plan(
        device=hardware.device,
        num_processes=hardware.num_processes,
        parameters=parameters,
        trained=trained,
        weights_bytes=weights_here,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        activation_bytes=activation,
        head_bytes=head,
        teacher_bytes=teacher,
        total_bytes=total,
        available_bytes=hardware.memory_bytes,
        tokens_per_step=recipe.data.rows_per_step * recipe.data.pack_length,
        flops_per_step=flops,
        seconds_per_step=flops / (MATMUL_SHARE * hardware.flops * hardware.num_processes) + traffic,
        num_steps=recipe.run.max_steps,
    )


def _shares(recipe: Recipe, hardware: Hardware) -> tuple[float, float, float]:
    """What a process's device holds of weights, gradients and optimizer."""
    stage = {"fsdp": 3, "deepspeed": recipe.parallel.zero_stage}.get(recipe.parallel.name, 0)
    share = 1 / hardware.num_processes
    weights, gradients, optimizer = (share if stage >= needed else 1.0 for needed in (3, 2, 1))
    if not recipe.parallel.cpu_offload:
        return weights, gradients, optimizer
    return (0.0, 0.0, 0.0) if stage == 3 else (weights, gradients, 0.0)


def format_plan(recipe: Recipe, plan: Plan, advice: list[str]) -> str:
    """The plan as a few lines to read."""
    parts = {
        "weights": plan.weights_bytes,
        "gradients": plan.gradient_bytes,
        "optimizer": plan.optimizer_bytes,
        "activations": plan.activation_bytes,
        "output head": plan.head_bytes,
        "teacher": plan.teacher_bytes,
        "in all, with overhead": plan.total_bytes,
        "there is": plan.available_bytes,
    }
    lines = [
        f"{recipe.model.base}: {plan.parameters:,} weights, {plan.trained:,} trained; {plan.num_processes} process(es) on {plan.device}",
        f"memory of a process, for {recipe.data.pack_length} tokens a row:",
        *(f"  {name:<22}{size / 1e9:9.2f} GB" for name, size in parts.items() if size),
        f"time: {plan.seconds_per_step:.3g} s a step of {plan.tokens_per_step:,} tokens, "
        f"{plan.tokens_per_step / plan.seconds_per_step:,.0f} tokens/s, padding counted",
    ]
    if plan.num_steps:
        lines.append(f"      {plan.num_steps * plan.seconds_per_step / 3600:.2f} h for {plan.num_steps:,} steps")
    if not plan.fits:
        lines.append("this does not fit; what would help:" if advice else "this does not fit, whatever is lowered: take a smaller model")
        lines += [f"  {line}" for line in advice]
    return "\n".join(lines)


def _attended(recipe: Recipe) -> int:
    """Tokens that attention computes for a token, doubled, for causal attention counts half: dense masks skip nothing."""
    length = recipe.data.pack_length
    return min(length, TYPICAL_DOCUMENT) if recipe.model.attention == "flex" else 2 * length


def _traffic(recipe: Recipe, rows: int, compute_bytes: int, config: Any, parameters: int, trained: int) -> float:
    """Bytes that a process moves in a step, all micro-batches together."""
    per_layer, outside = layer_bytes(recipe, rows, compute_bytes, config)
    kept = (config.num_hidden_layers * per_layer + outside) * (4 / 3 if recipe.model.gradient_checkpointing else 1.0)
    weights = STEP_TRAFFIC["weight"] * parameters
    return recipe.data.accumulation * (TRAFFIC_PER_KEPT_BYTE * kept + weights) + STEP_TRAFFIC["trained"] * trained


def memory_advice(recipe: Recipe, hardware: Hardware) -> list[str]:
    """Settings to change, the mildest first, each with the memory that it would need; those that fit end the list."""
    lines: list[str] = []
    for name, changed in _lighter_recipes(recipe, hardware.num_processes):
        plan = make_plan(changed, hardware)
        lines.append(f"{name}: {plan.total_bytes / 1e9:.1f} GB" + (", which fits" if plan.fits else ""))
        if plan.fits:
            return lines
    return lines


def hardware_at_hand() -> Hardware:
    """The GPU, or the CPU and its memory, that this process would train on; a matrix product of a fraction of a second is timed."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return _measured("cuda", memory, num_processes)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_processes
    return _measured("cpu", memory, num_processes)


def flops_per_token(config: Any, length: int) -> float:
    """Forward and backward: 6 per weight of every matrix, the head's included, and causal attention counted half."""
    matrices = matrix_weights(config)
    attention = 6 * config.num_hidden_layers * length * config.num_attention_heads * head_dim(config)
    return 6 * matrices + attention


def matrix_weights(config: Any) -> int:
    """Weights in matrix products: decoder layers and the head (tied or not), not the embedding's table."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = hidden * head_dim(config) * (2 * heads + 2 * kv_heads)
    return config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size) + config.vocab_size * hidden


def _head_bytes(recipe: Recipe, config: Any, tokens: int, compute_bytes: int) -> int:
    """Chunked cross-entropy: a chunk of logits some times over, the head's gradient, targets in and out."""
    chunk = min(recipe.objective.chunk_size, tokens)
    # Eager: float32 logits, probabilities and gradient, and its copy in the computing type. Compiled: logits and gradient in that type.
    per_logit, per_teacher_logit = (2 * compute_bytes, compute_bytes) if recipe.model.compile else (18, 8)
    logits = chunk * config.vocab_size * (per_logit + (per_teacher_logit if recipe.objective.distill else 0))
    # The gradient of the head as the forward pass sums it and as the backward pass hands it on, and the head in the computing type.
    head = config.vocab_size * config.hidden_size * (8 + (compute_bytes if compute_bytes == 2 else 0))
    return logits + head + 2 * tokens * config.hidden_size * 4


def _num_trained(model: Any, recipe: Recipe) -> int:
    causal_lm = inner_causal_lm(model)
    embedding = causal_lm.get_input_embeddings().weight
    head = causal_lm.get_output_embeddings().weight
    total = sum(p.numel() for p in causal_lm.parameters())
    if recipe.method.name != "full":
        linears = [m for m in causal_lm.base_model.modules() if isinstance(m, nn.Linear)]
        return sum(recipe.method.rank * (m.in_features + m.out_features) for m in linears) + embedding.shape[1]
    if recipe.method.freeze_embeddings:
        return total - embedding.numel() + embedding.shape[1] - (0 if head is embedding else head.numel())
    return total


def _lighter_recipes(recipe: Recipe, num_processes: int) -> list[tuple[str, Recipe]]:
    """Recipes that train the same with less memory first; then the same with fewer weights or shards."""

    def change(recipe: Recipe, section: str, **values: Any) -> Recipe:
        return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})

    found: list[tuple[str, Recipe]] = []
    rows = recipe.data.rows_per_step
    parts = recipe.data.accumulation
    while parts * 2 * num_processes <= rows and rows % (parts * 2 * num_processes) == 0:
        parts *= 2
        found.append((f"data.accumulation = {parts}", change(recipe, "data", accumulation=parts)))
    lighter = found[-1][1] if found else recipe
    if recipe.objective.chunk_size > 1024:
        lighter = change(lighter, "objective", chunk_size=1024)
        found.append(("and objective.chunk_size = 1024", lighter))
    if not recipe.model.gradient_checkpointing:
        lighter = change(lighter, "model", gradient_checkpointing=True)
        found.append(("and model.gradient_checkpointing = true", lighter))
    if num_processes > 1 and recipe.parallel.name == "ddp" and recipe.method.name == "full" and not recipe.method.freeze_embeddings:
        found.append(("and parallel.name = 'fsdp'", change(lighter, "parallel", name="fsdp")))
    if recipe.method.name == "full" and recipe.parallel.name == "ddp":
        adapted = change(lighter, "method", name="lora", freeze_embeddings=False)
        found.append(("and method.name = 'lora'", adapted))
        if not recipe.objective.distill:
            found.append(("and method.name = 'qlora'", change(adapted, "method", name="qlora")))
    return found


def _measured(device: str, memory_bytes: int, num_processes: int) -> Hardware:
    """A matrix product and a copy, each timed for a fraction of a second."""
    size, dtype, copied = (8192, torch.bfloat16, 2**29) if device == "cuda" else (1024, torch.float32, 2**26)
    left = torch.randn(size, size, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    return Hardware(
        device=device,
        memory_bytes=memory_bytes,
        flops=2 * size**3 * _calls_per_second(device, lambda: torch.mm(left, left)),
        bytes_per_second=2 * copied * _calls_per_second(device, lambda: target.copy_(source)),
        num_processes=num_processes,
    )


def _calls_per_second(device: str, call: Callable[[], object], seconds: float = 0.2) -> float:
    synchronise: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    synchronise()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        call()
        synchronise()
        count += 1
    return count / (time.perf_counter() - started)


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
