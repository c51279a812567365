"""What a run will take before it starts: memory of weights, gradients, optimizer and activations, and time, for the hardware at hand.

Sizes come from the model itself, built without memory on the meta device: parameters are counted, and the tensors that autograd keeps for
a layer are recorded from a forward pass of one and of two layers. Speed is a measured matrix product times an assumed share of it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from refusion.training.base import base_config
from refusion.training.objectives import inner_causal_lm
from refusion.training.recipe import Recipe

# R = packed rows of a micro-batch, L = tokens in a row, T = R * L, H = hidden size, V = vocabulary

UTILISATION = {"compiled": 0.45, "eager": 0.25}
"""Share of a big matrix product's speed that training reaches; an assumption, which benchmarks/training_speed.py measures."""
OVERHEAD = 1.05
"""Allocator rounding and fragments."""
RESERVED_BYTES = {"cuda": 1_200_000_000, "cpu": 700_000_000}
"""The CUDA context with its libraries, or the Python process with torch."""
_PLAN_ATTENTION = "refusion_plan"


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
    num_processes: int = 1


def make_plan(recipe: Recipe, hardware: Hardware) -> Plan:
    """Estimate one process's memory, and the time of a step on all processes."""
    config = base_config(recipe.model)
    compute_bytes = 2 if _is_bfloat16(recipe, hardware.device) else 4
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    trained = _num_trained(model, recipe)
    shards = hardware.num_processes if recipe.parallel.name == "fsdp" else 1
    rows = recipe.data.rows_per_step // (recipe.data.accumulation * hardware.num_processes)
    tokens = rows * recipe.data.pack_length
    weights = int(parameters * (0.6 if recipe.method.name == "qlora" else 4)) + (trained * 4 if recipe.method.name != "full" else 0)
    # The gradient of a weight that is frozen but for a row is formed whole.
    with_gradient = parameters if recipe.method.freeze_embeddings else trained
    activation = activation_bytes(recipe, rows, compute_bytes, config)
    head = _head_bytes(recipe, config, tokens, compute_bytes)
    teacher = parameters * compute_bytes if recipe.objective.distill else 0
    optimizer = 0 if recipe.parallel.cpu_offload else 8 * with_gradient // shards
    weights_here, gradients = (0, 0) if recipe.parallel.cpu_offload else (weights // shards, 4 * with_gradient // shards)
    total = int((weights_here + gradients + optimizer + activation + head + teacher) * OVERHEAD) + RESERVED_BYTES[hardware.device]
    flops = flops_per_token(config, recipe.data.pack_length) * recipe.data.rows_per_step * recipe.data.pack_length
    flops *= 4 / 3 if recipe.model.gradient_checkpointing else 1.0
    share = UTILISATION["compiled" if recipe.model.compile else "eager"]
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
        seconds_per_step=flops / (share * hardware.flops * hardware.num_processes),
        num_steps=recipe.run.max_steps,
    )


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
        return Hardware(device="cuda", memory_bytes=memory, flops=_matmul_flops("cuda"), num_processes=num_processes)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_processes
    return Hardware(device="cpu", memory_bytes=memory, flops=_matmul_flops("cpu"), num_processes=num_processes)


def flops_per_token(config: Any, length: int) -> float:
    """Forward and backward: 6 per weight of every matrix, the head's included, and causal attention counted half."""
    matrices = matrix_weights(config)
    attention = 6 * config.num_hidden_layers * length * config.num_attention_heads * _head_dim(config)
    return 6 * matrices + attention


def matrix_weights(config: Any) -> int:
    """Weights in matrix products: decoder layers and the head (tied or not), not the embedding's table."""
    hidden, heads, kv_heads, head_dim = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, _head_dim(config)
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size) + config.vocab_size * hidden


def activation_bytes(recipe: Recipe, rows: int, compute_bytes: int, config: Any) -> int:
    """What autograd keeps of the decoder for a backward pass over `rows` packed rows."""
    length = recipe.data.pack_length
    one, two = (_kept_bytes(config, count, rows, length, compute_bytes, recipe) for count in (1, 2))
    per_layer, outside = two - one, 2 * one - two
    mask = rows * length * length * compute_bytes if recipe.model.attention == "sdpa" else 0
    if recipe.model.gradient_checkpointing:
        residual = rows * length * config.hidden_size * 4
        return outside + config.num_hidden_layers * residual + per_layer + mask
    return outside + config.num_hidden_layers * per_layer + mask


def _kept_bytes(config: Any, num_layers: int, rows: int, length: int, compute_bytes: int, recipe: Recipe) -> int:
    """Bytes of distinct tensors that autograd keeps for a decoder of so many layers, its weights left out."""
    small = type(config)(**{**config.to_dict(), "num_hidden_layers": num_layers, "layer_types": None})
    small._attn_implementation = _PLAN_ATTENTION
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
    if compute_bytes == 2:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                _compute_in_half(module)
    if recipe.method.name != "full":
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_()  # stands for the adapter: gradients flow through every layer
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    with kept_storages() as kept:
        # Any mask: the attention of the plan does not look at it.
        model.base_model(input_ids=ids, position_ids=ids, attention_mask=torch.empty(rows, 1, 1, 1, device="meta"), use_cache=False)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(size for storage, (size, _) in kept.items() if storage not in own)


class kept_storages:
    """Records the storages that autograd keeps while it is entered: {identity: (bytes, the tensor, so that it stays)}."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[int, Tensor]] = {}

    def __enter__(self) -> dict[int, tuple[int, Tensor]]:
        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            self.kept[storage._cdata] = (storage.nbytes(), tensor.detach())
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self.kept

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash, memory-efficient and flex attention keep: query, key, value, output and a number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, torch.empty(query.shape[:3], device=query.device))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _plan_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    repeats = query.shape[1] // key.shape[1]  # with a mask, transformers repeats keys and values for SDPA
    key, value = (t.to(value.dtype).repeat_interleave(repeats, 1) if repeats > 1 else t.to(value.dtype) for t in (key, value))
    return _FusedAttention.apply(query.to(value.dtype), key, value).transpose(1, 2).contiguous(), None  # pyright: ignore


AttentionInterface.register(_PLAN_ATTENTION, _plan_attention)


def _compute_in_half(linear: nn.Linear) -> None:
    """What autocast does to a linear layer; the meta device has no autocast."""

    def forward(input: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias.bfloat16()
        return F.linear(input.bfloat16(), linear.weight.bfloat16(), bias)

    linear.forward = forward


def _head_bytes(recipe: Recipe, config: Any, tokens: int, compute_bytes: int) -> int:
    """Chunked cross-entropy: a chunk of logits some times over, the head's gradient, targets in and out."""
    chunk = min(recipe.objective.chunk_size, tokens)
    per_logit = 10 if recipe.model.compile else 18  # float32 logits, probabilities and gradient, and its copy in the computing type
    logits = chunk * config.vocab_size * (per_logit + (8 if recipe.objective.distill else 0))
    head = config.vocab_size * config.hidden_size * (4 + (compute_bytes if compute_bytes == 2 else 0))
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


def _matmul_flops(device: str, seconds: float = 0.2) -> float:
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    left = torch.randn(size, size, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    synchronise: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.mm(left, left)
    synchronise()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        torch.mm(left, left)
        synchronise()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)


def _is_bfloat16(recipe: Recipe, device: str) -> bool:
    return recipe.model.precision == "bfloat16" or (recipe.model.precision == "auto" and device == "cuda")


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
