"""The dense operators of a transformer layer in plain PyTorch: what the kernels in `refusion.model.kernels` compute, step by step.

They round where Hugging Face's models round (after the norm, after each product); a kernel may round later, never earlier. Weights
are plain tensors or `QuantizedWeight`s; quantised codes are multiplied in the dtype of the activations and scaled afterwards.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refusion.model.quantize import QuantizedWeight

Weight = Tensor | QuantizedWeight

# T = rows, K = in features, N = out features, I = intermediate features, V = vocabulary


class Readout(NamedTuple):
    """What a greedy decoder reads of each row [T]."""

    token_ids: Tensor  # int64, most probable token, the lowest id among equals
    confidence: Tensor  # float32, its probability
    given_probability: Tensor  # float32, probability of the given token; 0 for none and for banned ones
    given_is_argmax: Tensor  # bool
    runner_ups: Tensor  # int64 [T, R], the most probable tokens but the first, falling; R as many as were asked for


def rms_norm(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, in float32; rounded to the dtype of `x` before the weight is applied."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * norm_weight


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """[T, N] = rms_norm(x) @ weight.T (+ bias)."""
    return _linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_gated(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> Tensor:
    """[T, I] = silu(rms_norm(x) @ gate.T) * (rms_norm(x) @ up.T); `weight` [2I, K] holds the rows of gate, then those of up."""
    gate, up = _linear(rms_norm(x, norm_weight, eps), weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_add(x: Tensor, weight: Weight, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, N] = residual + x @ weight.T (+ bias)."""
    return residual + _linear(x, weight, bias)


def readout(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, bias_banned: Tensor, given_ids: Tensor, num_runner_ups: int = 0
) -> Readout:
    """Greedy readout of rms_norm(x) @ weight.T + bias_banned, logits in float32.

    bias_banned [V] float32, 0 or -inf, some 0; given_ids [T] integer, negative where nothing is given.
    """
    normed = rms_norm(x, norm_weight, eps).float()
    data, scale = (weight.data, weight.scale) if isinstance(weight, QuantizedWeight) else (weight, None)
    logits = normed @ data.float().T  # [T, V]; products of rounded operands, summed in float32
    logits = (logits if scale is None else logits * scale) + bias_banned
    best = logits.argmax(dim=1)
    normaliser = logits.logsumexp(dim=1)
    given = logits.gather(1, given_ids.clamp(min=0).long()[:, None])[:, 0]
    given = given.masked_fill(given_ids < 0, -torch.inf)
    confidence = (logits.gather(1, best[:, None])[:, 0] - normaliser).exp()
    return Readout(best, confidence, (given - normaliser).exp(), best == given_ids, next_best(logits, best, num_runner_ups))


def next_best(logits: Tensor, chosen: Tensor, count: int) -> Tensor:
    """[T, count] the most probable tokens but the chosen one [T], falling, the lowest id among equals; `logits` [T, V] are overwritten.

    One argmax after the other: `topk` leaves the order of equals open.
    """
    found: list[Tensor] = []
    last = chosen
    for _ in range(count):
        logits.scatter_(1, last[:, None], -torch.inf)
        last = logits.argmax(dim=1)
        found.append(last)
    # Rows of their own, not columns of a wider tensor: the kernels of the rounds read them one behind the other.
    return torch.stack(found, dim=1) if found else chosen.new_empty(len(chosen), 0)


def _linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, QuantizedWeight):
        return F.linear(x, weight, bias)
    product = F.linear(x.float(), weight.data.to(x.dtype).float()) * weight.scale
    return (product if bias is None else product + bias.float()).to(x.dtype)
