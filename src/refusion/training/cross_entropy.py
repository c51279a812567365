"""Linear cross-entropy without the logits of a whole batch: output head, softmax and both gradients, one chunk of targets at a time.

The gradients are formed in the forward pass, where a chunk's logits exist anyway; nothing is recomputed. Softmax and sums are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# N = targets, C = targets in a chunk, H = hidden size, V = vocabulary


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scales: Tensor,
    *,
    chunk_size: int,
    dtype: torch.dtype | None = None,
    only_row: int | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    distill: Tensor | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum of scales * loss as a scalar to differentiate, and the losses [N] themselves (float32, detached).

    hidden [N, H], weight [V, H], labels [N] int64, scales [N] float32. The matrix products run in `dtype` (default: hidden's). With
    `only_row` the weight's gradient is formed for that row alone. The first rows of the batch may have a teacher: with
    teacher_hidden [M, H'], M <= N, teacher_weight [V, H'] and distill [M] in [0, 1] their loss is
    (1 - distill) * CE(label) + distill * CE(teacher's softmax).
    """
    settings = (chunk_size, dtype or hidden.dtype, only_row, compiled)
    teacher = None
    if teacher_hidden is not None:
        assert teacher_weight is not None, "a teacher has hidden states and a head"
        assert distill is not None, "a teacher has shares"
        teacher = (teacher_hidden, teacher_weight, distill)
    return _LinearCrossEntropy.apply(hidden, weight, labels, scales, teacher, settings)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scales: Tensor, teacher: Any, settings: Any
    ) -> tuple[Tensor, Tensor]:
        chunk_size, dtype, only_row, compiled = settings
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.detach().to(dtype)
            losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            run = _compiled_chunk() if compiled else _chunk
            teacher_head: Any = None if teacher is None else teacher[1].to(dtype)
            for begin in range(0, len(labels), chunk_size):
                span = slice(begin, begin + chunk_size)
                inputs = hidden[span].to(dtype)
                soft = None
                if teacher is not None and begin < len(teacher[0]):
                    soft = (teacher[0][span].to(dtype), teacher_head, teacher[2][span])
                    assert len(soft[0]) == len(inputs), (len(soft[0]), len(inputs))
                losses[span], grad_logits = run(inputs, head, labels[span], scales[span], soft)
                if grad_hidden is not None:
                    grad_hidden[span] = grad_logits @ head
                if grad_weight is not None and only_row is None:
                    grad_weight += grad_logits.T @ inputs
                elif grad_weight is not None:
                    grad_weight[only_row] += grad_logits[:, only_row] @ inputs
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * scales).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_total).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def _chunk(
    inputs: Tensor, head: Tensor, labels: Tensor, scales: Tensor, soft: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Losses [C] of one chunk, and the gradient of sum(scales * loss) by the logits [C, V] in the inputs' type."""
    logits = (inputs @ head.T).float()
    log_normaliser = logits.logsumexp(-1)
    target_logits = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    is_target = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    probabilities = (logits - log_normaliser.unsqueeze(-1)).exp()
    if soft is None:
        losses = log_normaliser - target_logits
        grad = probabilities - is_target.float()
    else:
        teacher_inputs, teacher_head, share = soft
        teacher = (teacher_inputs @ teacher_head.T).float().softmax(-1)
        losses = log_normaliser - (1 - share) * target_logits - share * (teacher * logits).sum(-1)
        share = share.unsqueeze(-1)
        grad = probabilities - torch.where(is_target, 1 - share, 0.0) - share * teacher
    return losses, (grad * scales.unsqueeze(-1)).to(inputs.dtype)


_compiled: Any = None


def _compiled_chunk() -> Any:
    """Compiled once per process; the chunks of a run all have one shape."""
    global _compiled
    if _compiled is None:
        _compiled = torch.compile(_chunk, dynamic=False)
    return _compiled
