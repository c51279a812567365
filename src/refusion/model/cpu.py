"""The operators of a forward for a CPU: matrices laid out once for oneDNN, few operations, no passes over the logits that can be spared.

A forward of few rows costs what reading its weights costs, plus a few microseconds for every operation, however small. So weights are
reordered once into the blocks that oneDNN multiplies fastest, and residuals are added in the product itself. The plain twins are in
`refusion.model.ops` and `refusion.model.attention_ops`; where this torch has no such products, where the processor has none in bfloat16
or the weights are quantised, products are plain ones.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refusion.model import attention_ops, ops
from refusion.model.config import ModelConfig
from refusion.model.ops import Readout
from refusion.model.quantize import QuantizedWeight
from refusion.model.rows import Rows, Spans, Tiles

# T = rows, K = in features, N = out features, V = vocabulary, H = key/value heads, G = query heads per key/value head
# D = head dimension, C = vocabulary chunks, A = ids asked for: candidates, then the given one

ROWS_AT_ONCE = 256  # rows whose float32 logits exist at the same time
CHUNK = 256  # neighbouring ids whose largest logit is found first
CANDIDATES = 4  # largest logits of a row that are computed again in float32


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the blocks that oneDNN multiplies fastest."""

    data: Tensor
    plain: Tensor  # [N, K], the weight as it was given and not a copy; single rows of a head are read from it

    @property
    def shape(self) -> torch.Size:
        return self.plain.shape


Weight = Tensor | QuantizedWeight | PackedWeight


def has_packed_products(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's products on reordered weights, and this processor computes in `dtype`."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16)


class CpuOps:
    """The operations of `refusion.engine.network.Ops` on a CPU. One forward at a time: rotations are kept for its layers."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.num_groups, self.dtype = config.num_attention_heads // config.num_key_value_heads, dtype
        self.is_packing = has_packed_products(dtype)
        self._turn: tuple[Tensor, Tensor] | None = None
        self._banned: tuple[Tensor, Tensor] | None = None

    def prepare(self, weight: Tensor | QuantizedWeight) -> Weight:
        """The weight as the products below want it; a reordered copy where that pays."""
        if isinstance(weight, QuantizedWeight) or not self.is_packing:
            return weight
        return PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight.detach()), weight)

    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """[T, N] = rms_norm(x) @ weight.T (+ bias)."""
        return _linear(self._norm(x, norm_weight, eps), weight, bias)

    def norm_gated(self, x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> Tensor:
        """[T, I] = silu(rms_norm(x) @ gate.T) * (rms_norm(x) @ up.T); `weight` [2I, K] holds the rows of gate, then those of up."""
        gate, up = _linear(self._norm(x, norm_weight, eps), weight).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def linear_add(self, x: Tensor, weight: Weight, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, N] = residual + x @ weight.T (+ bias)."""
        if isinstance(weight, PackedWeight):
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight.data, bias, "add")
        return ops.linear_add(x, weight, residual, bias)

    def paid(self, hidden: Tensor) -> Tensor:
        """Nothing is owed here."""
        return hidden

    def rotate_and_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        new_keys: Tensor,
        new_values: Tensor,
    ) -> Tensor:
        """Normalise (Qwen3) and rotate queries and keys of qkv [T, (HG + 2H) * D]; returns the queries [T, HG, D], stores the rest."""
        if self._turn is None:
            place = positions.long()
            half_cos, half_sin = cos[place][:, None], sin[place][:, None]  # [T, 1, D / 2]
            self._turn = torch.cat((half_cos, half_cos), dim=-1), torch.cat((-half_sin, half_sin), dim=-1)
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        turning, value = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
        if q_norm is not None and k_norm is not None:
            query, key = turning.split((num_heads, num_kv_heads), dim=1)
            turning = torch.cat((ops.rms_norm(query, q_norm, eps), ops.rms_norm(key, k_norm, eps)), dim=1)
        wide = turning.float()
        turned = (wide * self._turn[0]).addcmul_(wide.roll(head_dim // 2, -1), self._turn[1])
        new_keys.copy_(turned[:, num_heads:])
        new_values.copy_(value)
        return turned[:, :num_heads].to(qkv.dtype)

    def plan_attention(self, rows: Rows, spans: Spans, tiles: Tiles) -> attention_ops.PlainPlan:
        """Masks and places of keys, for all layers of one forward."""
        self._turn = None
        return attention_ops.prepare(rows, spans, self.num_groups, self.dtype)

    def attend(
        self,
        query: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Rows,
        spans: Spans,
        tiles: Tiles,
        plan: attention_ops.PlainPlan,
    ) -> Tensor:
        """Attention over pages and new rows -> [T, HG * D]; a lone request with its pages in a row is spared many small operations."""
        alone = _alone(plan)
        if alone is not None:
            (committed, piece), num_rows = alone, query.shape[0]
            new = slice(0, piece.end)
            joined_keys = torch.cat((keys[committed], new_keys[new]))
            joined_values = torch.cat((values[committed], new_values[new]))
            mixed = _attend_alone(query[new], joined_keys, joined_values, piece.bias)
            return mixed if piece.end == num_rows else F.pad(mixed, (0, 0, 0, num_rows - piece.end))
        return attention_ops.attend(query, new_keys, new_values, keys, values, rows, spans, plan=plan)

    def readout(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        weight: Weight,
        bias_banned: Tensor,
        given_ids: Tensor,
        num_runner_ups: int = 0,
    ) -> Readout:
        """Greedy readout of rms_norm(x) @ weight.T + bias_banned; probabilities in float32."""
        banned = self._banned_ids(bias_banned)
        parts = [
            _read(self._norm(part, norm_weight, eps), weight, banned, given, num_runner_ups)
            for part, given in zip(x.split(ROWS_AT_ONCE), given_ids.split(ROWS_AT_ONCE), strict=True)
        ]
        return parts[0] if len(parts) == 1 else Readout(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def store_rows(self, new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy rows worth keeping to their pages."""
        attention_ops.store_rows(new_keys, new_values, keys, values, source, target)

    def _norm(self, x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
        """Two operations fewer than `ops.rms_norm`, and rounded once; in float32 they agree to the last bits."""
        return F.rms_norm(x, norm_weight.shape, norm_weight, eps)

    def _banned_ids(self, bias_banned: Tensor) -> Tensor:
        """Ids of the -inf entries, remembered for the tensor that comes with every forward."""
        if self._banned is None or self._banned[0] is not bias_banned:
            self._banned = bias_banned, bias_banned.isinf().nonzero()[:, 0]
        return self._banned[1]


def _alone(plan: attention_ops.PlainPlan) -> tuple[slice, attention_ops.Piece] | None:
    """Committed tokens and query rows of a plan whose only rows, from the first one on, are those of one request.

    A bias leaves out committed tokens that are attended to apart, so joining them is right only without one.
    """
    if len(plan.seats) != 1 or len(plan.seats[0].pieces) != 1:
        return None
    seat, piece = plan.seats[0], plan.seats[0].pieces[0]
    if not isinstance(seat.committed, slice) or piece.first != 0:
        return None
    is_whole = piece.bias is None or seat.num_joined == seat.committed.stop - seat.committed.start
    return (seat.committed, piece) if is_whole else None


def _attend_alone(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """[T, HG * D] of queries [T, HG, D] that all look at the same keys and values [C, H, D]; the queries of a group share one product."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    if num_rows == 1:
        folded = query.view(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
    else:
        folded = query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).reshape(1, num_kv_heads, -1, head_dim)  # [1, H, G * T, D]
    mixed = F.scaled_dot_product_attention(folded, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], attn_mask=bias)
    return mixed.reshape(num_heads, num_rows, head_dim).transpose(0, 1).reshape(num_rows, -1)


def _linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, PackedWeight):
        return torch.ops.mkldnn._linear_pointwise(x, weight.data, bias, "none", [], "")
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else ops._linear(x, weight, bias)


def _read(normed: Tensor, weight: Weight, banned_ids: Tensor, given_ids: Tensor, num_runner_ups: int) -> Readout:
    """Readout of normed @ weight.T. In bfloat16 a logit of 20 is rounded to eighths: those that decide are computed again in float32."""
    logits = _linear(normed, weight).index_fill_(1, banned_ids, -torch.inf)
    given = given_ids.clamp(min=0).long()[:, None]
    asked = torch.cat((_largest(logits), given), dim=1)  # [T, A]
    rounded = logits.gather(1, asked).float()
    shares = logits.float().softmax(dim=1).gather(1, asked)
    exact = rounded
    if isinstance(weight, PackedWeight) and logits.dtype != torch.float32:
        exact = torch.bmm(weight.plain[asked].float(), normed.float()[:, :, None])[:, :, 0].masked_fill_(rounded.isinf(), -torch.inf)
        factor = (exact - rounded).exp_().nan_to_num_(0.0)  # banned ids: -inf - -inf
        corrected = shares * factor
        total = 1.0 + (corrected - shares)[:, :-1].sum(dim=1, keepdim=True)
        shares = corrected / total
    place = exact[:, :-1].argmax(dim=1, keepdim=True)
    best = asked.gather(1, place)[:, 0]
    given_share = shares[:, -1].masked_fill(given_ids < 0, 0.0)
    runner_ups = asked.gather(1, ops.next_best(exact[:, :-1].clone(), place[:, 0], num_runner_ups))
    return Readout(best, shares.gather(1, place)[:, 0], given_share, best == given_ids, runner_ups)


def _largest(logits: Tensor) -> Tensor:
    """Ids of the CANDIDATES largest logits [T, CANDIDATES], growing. Whole chunks are sieved first, which unlike `topk` is vectorised."""
    vocab_size = logits.shape[1]
    width = math.gcd(vocab_size, CHUNK)
    peaks = logits.unflatten(1, (-1, width)).amax(dim=2)  # [T, C]
    chunks = peaks.topk(min(CANDIDATES, peaks.shape[1]), dim=1).indices
    ids = (chunks[:, :, None] * width + torch.arange(width, device=logits.device)).flatten(1)
    found = logits.gather(1, ids).topk(min(CANDIDATES, ids.shape[1]), dim=1).indices
    return ids.gather(1, found).sort(dim=1).values
