"""What autograd keeps of a decoder for its backward pass, found without memory or data: from a forward pass on torch's meta device.

A forward pass of one and of two layers is recorded; the difference is a layer. Attention is a stand-in that keeps what fused kernels keep.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from refusion.training.recipe import Recipe

COMPILED_SHARE = 0.58
"""A compiled layer keeps so much of what an eager one keeps: the partitioner recomputes norms, rotations and activation functions."""
_PLAN_ATTENTION = "refusion_plan"


def activation_bytes(recipe: Recipe, rows: int, compute_bytes: int, config: Any) -> int:
    """What autograd keeps of the decoder for a backward pass over `rows` packed rows."""
    length = recipe.data.pack_length
    per_layer, outside = layer_bytes(recipe, rows, compute_bytes, config)
    mask = rows * length * length * compute_bytes if recipe.model.attention == "sdpa" else 0
    if recipe.model.gradient_checkpointing:
        residual = rows * length * config.hidden_size * (2 if recipe.model.residual == "bfloat16" else 4)
        return outside + config.num_hidden_layers * residual + per_layer + mask
    return outside + config.num_hidden_layers * per_layer + mask


def layer_bytes(recipe: Recipe, rows: int, compute_bytes: int, config: Any) -> tuple[int, int]:
    """Kept bytes of one decoder layer, its weights cast to the computing type included, and of what lies outside the layers."""
    one, two = (_kept_bytes(config, count, rows, recipe.data.pack_length, compute_bytes, recipe) for count in (1, 2))
    per_layer, outside = two - one, 2 * one - two
    if recipe.model.compile:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 2 * config.hidden_size * head_dim * (config.num_attention_heads + config.num_key_value_heads)
        casts = (attention + 3 * config.hidden_size * config.intermediate_size) * compute_bytes if compute_bytes == 2 else 0
        per_layer = int(COMPILED_SHARE * (per_layer - casts)) + casts
    return per_layer, outside


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
    if recipe.model.residual == "bfloat16":
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.bfloat16())
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
