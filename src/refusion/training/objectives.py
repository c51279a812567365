"""Objectives: the loss over a packed batch, computed inside the model's own forward so that DDP, FSDP and PEFT wrap it like any other.

An objective is a row layout (`refusion.slots`) plus what is here: AR and MDM terms as weighted sums over global normalisers.
`hybrid_loss` is the plain form of the same loss on whole logits.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refusion.slots import AR_TERM, MDM_TERM
from refusion.training.attention import FLEX_NAME, block_mask, dense_mask
from refusion.training.cross_entropy import linear_cross_entropy

# B = sequences, T = tokens, V = vocabulary, R = packed rows, L = tokens in a row, N = targets, H = hidden size


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Hybrid loss of one batch; `total` is what backward sees."""

    total: Tensor
    ar: Tensor
    mdm: Tensor
    num_ar_tokens: Tensor
    num_masked_tokens: Tensor


def hybrid_loss(logits: Tensor, labels: Tensor, is_masked: Tensor, p_mask: Tensor, answer_lengths: Tensor) -> LossTerms:
    """AR + MDM over whole logits: logits [B, T, V], labels [B, T] with -100, is_masked [B, T] bool, p_mask [B], answer_lengths [B].

    AR is the mean over all clean targets, MDM is 1/B sum_b sum_masked CE / (p_b |answer_b|). A term without targets is 0. Labels are
    aligned with the logits; nothing is shifted.
    """
    has_target = labels != -100
    is_masked = is_masked.bool() & has_target
    is_clean = ~is_masked & has_target
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(labels.shape)
    ar = torch.where(is_clean, losses, 0.0).sum() / is_clean.sum().clamp(min=1)
    weights = 1.0 / (p_mask.float() * answer_lengths)  # [B]
    mdm = (torch.where(is_masked, losses, 0.0).sum(-1) * weights).sum() / len(labels)
    return LossTerms(ar + mdm, ar, mdm, is_clean.sum(), is_masked.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """How the loss of a packed batch is computed; what is learnt stands in the batch."""

    chunk_size: int = 4096
    distill: float = 0.0
    ar_weight: float = 1.0
    only_row: int | None = None
    """The one row of the output head that is trained; None = all of them or none."""
    compiled: bool = False
    is_bound: bool = False
    """Whether `bind_objective` has taught the head to run the loss as its own forward."""


def bind_objective(model: nn.Module, settings: LossSettings, teacher: nn.Module | None = None) -> None:
    """Let `model(objective_batch=batch)` return {"loss", "ar", "mdm"}; called in any other way it stays the causal LM it was.

    `model` is a transformers causal LM or a PEFT wrapper around one. `teacher` stays outside: it is neither saved nor trained.
    """
    causal_lm = inner_causal_lm(model)
    plain_forward = causal_lm.forward

    def forward(self: nn.Module, *args: Any, objective_batch: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        if objective_batch is None:
            return plain_forward(*args, **kwargs)
        return packed_loss(self, objective_batch, bound, teacher)

    bound = dataclasses.replace(settings, is_bound=True)
    causal_lm.forward = types.MethodType(forward, causal_lm)
    _let_head_apply(causal_lm.get_output_embeddings())


def _let_head_apply(head: Any) -> None:
    """Let `head(x, apply=f)` return f(): FSDP gathers a module's sharded weights for the time of its forward, and only then."""
    plain_forward = head.forward

    def forward(self: nn.Module, hidden: Tensor, *args: Any, apply: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return plain_forward(hidden, *args, **kwargs) if apply is None else apply()

    head.forward = types.MethodType(forward, head)


def packed_loss(model: Any, batch: Mapping[str, Any], settings: LossSettings, teacher: Any = None) -> dict[str, Tensor]:
    """Loss of a packed batch (see `batches.pack_batch`), over the normalisers `ar_normaliser` and `mdm_normaliser` it carries."""
    dtype = _compute_dtype(model, batch["input_ids"].device.type)
    hidden = _last_hidden(model, batch["input_ids"], batch["position_ids"], batch["start"], batch["visible"], batch["group"], dtype)
    targets = hidden.flatten(0, 1)[batch["target_index"]]  # [N, H]
    terms = batch["target_terms"]
    normaliser = torch.where(terms == AR_TERM, batch["ar_normaliser"], batch["mdm_normaliser"])
    term_weights = torch.where(terms == AR_TERM, settings.ar_weight, 1.0)
    scales = batch["target_weights"] * term_weights / normaliser
    teacher_arguments = {} if teacher is None else _teacher_arguments(teacher, batch, settings)

    def head_loss() -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(
            targets,
            head_weight(model),
            batch["target_labels"],
            scales,
            chunk_size=settings.chunk_size,
            dtype=dtype,
            only_row=settings.only_row,
            compiled=settings.compiled,
            **teacher_arguments,
        )

    total, losses = model.get_output_embeddings()(targets, apply=head_loss) if settings.is_bound else head_loss()
    weighted = losses * scales / term_weights
    ar, mdm = (torch.where(terms == term, weighted, 0.0).sum() for term in (AR_TERM, MDM_TERM))
    return {"loss": total, "ar": ar, "mdm": mdm}


def head_weight(model: Any) -> Tensor:
    """Weight [V, H] of the output head as the forward pass uses it, PEFT's trained token rows included."""
    head = model.get_output_embeddings()
    adapter = getattr(head, "token_adapter", None)
    if adapter is not None:
        return adapter.get_merged_weights(adapter.active_adapters)
    return head.weight


def inner_causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _last_hidden(
    model: Any, input_ids: Tensor, position_ids: Tensor, start: Tensor, visible: Tensor, group: Tensor, dtype: torch.dtype
) -> Tensor:
    """Last hidden states [R, L, H] under the visibility of a packed batch."""
    if model.config._attn_implementation == FLEX_NAME:
        mask = block_mask(start, visible, group)
    else:
        mask = dense_mask(start, visible, group, dtype)
    return model.base_model(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False).last_hidden_state


def _teacher_arguments(teacher: Any, batch: Mapping[str, Any], settings: LossSettings) -> dict[str, Tensor]:
    """Hidden states of the frozen base model for the targets that have a teacher; those come first, in whole chunks."""
    num_targets = batch.get("num_teacher_chunks", 0) * settings.chunk_size
    if num_targets == 0:  # nothing to distil, or rows that are only scored
        return {}
    rows = batch["target_teacher"][:num_targets]
    ids, start = batch["teacher_input_ids"], batch["teacher_start"]
    visible = torch.arange(1, ids.shape[1] + 1, device=ids.device).expand_as(ids)
    weight = head_weight(teacher)
    with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
        hidden = _last_hidden(teacher, ids, batch["teacher_position_ids"], start, visible, torch.zeros_like(ids), weight.dtype)
    return {
        "teacher_hidden": hidden.flatten(0, 1)[rows.clamp(min=0)],
        "teacher_weight": weight,
        "distill": (rows >= 0).float() * settings.distill,
    }


def _compute_dtype(model: Any, device_type: str) -> torch.dtype:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else model.dtype
