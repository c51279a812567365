"""How close an answer is to the base model.

Agreement and negative log-likelihood follow the project's definition: each emitted token, the EOS included, is compared with the base
model's argmax given the true prefix (system prompt and all), in float32, pooled over the answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusion.evaluation.statistics import Interval, pooled_ratio
from refusion.model.segments import Segments
from refusion.model.transformer import Transformer

# B = answers, T = tokens of prompt and answer, N = answer tokens of the batch, V = vocabulary

ROWS_PER_HEAD = 2048
"""Answer tokens whose logits exist at the same time."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Agreement in [0, 1] with an interval over answers, and the base model's nats per token."""

    agreement: float
    nll_per_token: float
    num_tokens: int
    agreement_interval: Interval


@torch.inference_mode()
def score_fidelity(
    base_model: Transformer,
    prompt_ids: Sequence[Sequence[int]],
    token_ids: Sequence[Sequence[int]],
    batch_size: int = 8,
    *,
    banned_ids: Iterable[int] = (),
) -> Fidelity:
    """Agreement and NLL of the answers under `base_model`, which should be in float32; `banned_ids` are never its argmax."""
    assert len(prompt_ids) == len(token_ids), f"{len(prompt_ids)} prompts but {len(token_ids)} answers"
    order = [i for i in range(len(token_ids)) if token_ids[i]]
    order.sort(key=lambda i: len(prompt_ids[i]) + len(token_ids[i]))
    banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=base_model.device)
    hits, counts, total_nll = [], [], 0.0
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        is_argmax, nll = _score_batch(base_model, [list(prompt_ids[i]) for i in rows], [list(token_ids[i]) for i in rows], banned)
        total_nll += float(nll.double().sum())  # one host sync a batch
        lengths = [len(token_ids[i]) for i in rows]
        hits += [int(part.sum()) for part in is_argmax.cpu().split(lengths)]
        counts += lengths
    interval = pooled_ratio(hits, counts)
    num_tokens = sum(counts)
    return Fidelity(interval.value, total_nll / num_tokens if num_tokens else math.nan, num_tokens, interval)


def _score_batch(model: Transformer, prompts: list[list[int]], answers: list[list[int]], banned: Tensor) -> tuple[Tensor, Tensor]:
    """Per answer token [N], row after row: is it the argmax, and its negative log-likelihood."""
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    predicts = torch.zeros_like(input_ids, dtype=torch.bool)  # rows whose next token is an answer token
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        length = len(prompt) + len(answer)
        input_ids[i, :length] = torch.tensor(prompt + answer)
        predicts[i, len(prompt) - 1 : length - 1] = True
    hidden = _hidden_states(model, input_ids.to(model.device))[predicts.to(model.device)]  # [N, hidden]
    targets = torch.tensor([token for answer in answers for token in answer], device=model.device)  # [N]
    is_argmax, nll = [], []
    for rows, wanted in zip(hidden.split(ROWS_PER_HEAD), targets.split(ROWS_PER_HEAD), strict=True):
        logits = model.lm_head(rows).float().index_fill_(1, banned, -math.inf)  # [n, V]
        is_argmax.append(logits.argmax(dim=-1) == wanted)
        nll.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(is_argmax), torch.cat(nll)


def _hidden_states(model: Transformer, input_ids: Tensor) -> Tensor:
    """Final hidden states [B, T, hidden] of right-padded rows; padding lies behind what causal attention sees."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    is_token = torch.ones_like(input_ids, dtype=torch.bool)
    return model(input_ids, positions, Segments.causal(is_token), model.new_cache(*input_ids.shape))
