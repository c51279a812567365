"""Attention over flat rows in plain torch: rotation, attention over pages and new rows, commit.

The twins of `refusion.model.kernels.rotary`, `.attention` and `.store`, which tests compare them with, and what runs where there is no
GPU. `prepare` reads the spans on the host, once per forward; its plan says for every seat where its keys lie and who sees whom, and all
layers share it. Nothing here is captured in a CUDA graph.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refusion.model.rows import Rows, Spans, may_see

# T = rows of the forward, M = rows to copy, L = layers, C = columns a row may see: committed tokens, then new rows of its seat
# H = key/value heads, G = query heads per key/value head, D = head dimension

PIECE = 256  # query rows of one product: prompts of thousands of rows never build a square mask
APART_FROM = 512  # committed tokens from which on a second product, over the pages as they lie, is cheaper than copying them


def rotate_and_store(
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
    """Normalise (Qwen3) and rotate queries and keys of qkv [T, (HG + 2H) * D]; returns the queries [T, HG, D].

    Keys and values go to `new_keys`, `new_values` [T, H, D]. The tables `cos`, `sin` [positions, D / 2] are float32 and so is the
    arithmetic; only the results are rounded.
    """
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    place = positions.long()
    turn = cos[place][:, None], sin[place][:, None]  # [T, 1, D / 2]
    new_keys.copy_(_rotate(_normalise(key, k_norm, eps), *turn))
    new_values.copy_(value)
    return _rotate(_normalise(query, q_norm, eps), *turn)


@dataclass(frozen=True, slots=True)
class Piece:
    """Query rows [first, end) of a seat, which see the first `num_new` of its new rows as far as the bias allows."""

    first: int
    end: int
    num_new: int
    bias: Tensor | None  # [G * rows, columns] of 0 and -inf; None: everything is visible


@dataclass(frozen=True, slots=True)
class SeatPlan:
    """What a seat has committed, its new rows (prompt, then decode rows), and the query rows that look at them."""

    committed: slice | Tensor | None  # rows of the page pool: a slice where the pages are neighbours, so that nothing is gathered
    num_joined: int  # committed tokens that are put in front of the new rows; none when they are attended to apart
    new: tuple[slice, ...]
    pieces: tuple[Piece, ...]

    def columns(self, pages: Tensor, new: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keys or values [1, H, columns, D]: what the biases speak of, and the committed ones apart."""
        parts = [new[part] for part in self.new]
        apart = None
        if self.num_joined:
            parts.insert(0, pages[self.committed])
        elif self.committed is not None:
            apart = pages[self.committed].transpose(0, 1)[None]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.transpose(0, 1)[None], apart


@dataclass(frozen=True, slots=True)
class PlainPlan:
    """What all layers of one forward share."""

    seats: tuple[SeatPlan, ...]


def prepare(rows: Rows, spans: Spans, num_groups: int, dtype: torch.dtype) -> PlainPlan:
    """Plan the attention of a forward for `num_groups` query heads per key/value head. One host synchronisation per tensor of `spans`."""
    ends = (spans.cached, spans.prompt_start, spans.prompt_end, spans.row_start, spans.row_end)
    per_seat = torch.stack(ends, dim=1).tolist()  # read once: lengths decide shapes
    seats = []
    for seat, (cached, prompt_start, prompt_end, row_start, row_end) in enumerate(per_seat):
        prompt, decode = slice(prompt_start, prompt_end), slice(row_start, row_end)
        new = tuple(part for part in (prompt, decode) if part.stop > part.start)
        if not new:
            continue
        committed = _committed(spans, seat, cached)
        is_apart = isinstance(committed, slice) and cached >= APART_FROM and rows.seat.device.type == "cpu"
        num_joined = 0 if is_apart else cached
        pieces = _prompt_pieces(rows, prompt) + _decode_pieces(rows, decode, prompt_end - prompt_start)
        folded = tuple(_to_piece(first, visible, num_joined, num_groups, dtype) for first, visible in pieces)
        seats.append(SeatPlan(committed, num_joined, new, folded))
    return PlainPlan(tuple(seats))


def attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    spans: Spans,
    tiles: object = None,
    workspace: object = None,
    plan: PlainPlan | None = None,
) -> Tensor:
    """Attention of the queries [T, HG, D] over the committed tokens and the new rows of their seats -> [T, HG * D]; padding gives 0.

    `new_keys`, `new_values` [T, H, D] are this layer's new rows, `keys`, `values` [cache rows, H, D] its pages. `tiles` and `workspace`
    are the kernel's; `plan` spares all but the first layer the masks.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = new_keys.shape[1]
    if plan is None:
        plan = prepare(rows, spans, num_heads // num_kv_heads, query.dtype)
    mixed = torch.zeros_like(query)
    for seat in plan.seats:
        (seat_keys, keys_apart), (seat_values, values_apart) = seat.columns(keys, new_keys), seat.columns(values, new_values)
        for piece in seat.pieces:
            asked = query[piece.first : piece.end].unflatten(1, (num_kv_heads, -1))  # [rows, H, G, D]
            folded = asked.permute(1, 2, 0, 3).reshape(1, num_kv_heads, -1, head_dim)  # the queries of a group are rows of one product
            seen = slice(0, seat.num_joined + piece.num_new)
            near = seat_keys[:, :, seen], seat_values[:, :, seen]
            if keys_apart is None or values_apart is None:
                part = F.scaled_dot_product_attention(folded, *near, attn_mask=piece.bias)
            else:
                part = _attend_apart(folded, *near, piece.bias, keys_apart, values_apart)
            unfolded = part.view(num_kv_heads, -1, piece.end - piece.first, head_dim).permute(2, 0, 1, 3)
            mixed[piece.first : piece.end] = unfolded.flatten(1, 2)
    return mixed.view(num_rows, -1)


def store_rows(new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy new rows `source` [M] (-1: none) of all layers [L, T, H, D] to the rows `target` of the pages [L, cache rows, H, D]."""
    is_kept = source >= 0
    source, target = source[is_kept].long(), target[is_kept].long()
    keys.index_copy_(1, target, new_keys.index_select(1, source))
    values.index_copy_(1, target, new_values.index_select(1, source))


def _normalise(states: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the head dimension: float32, rounded, then times the weight."""
    if weight is None:
        return states
    wide = states.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(states.dtype) * weight


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves paired as in Hugging Face checkpoints."""
    first, second = states.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(states.dtype)


def _attend_apart(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, far_keys: Tensor, far_values: Tensor) -> Tensor:
    """Attention over two sets of columns, the far ones all visible, without joining them: mixed by the sums of their softmaxes."""
    attend_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what F.scaled_dot_product_attention calls, sums included
    near, near_sum = attend_on_cpu(query, keys, values, attn_mask=bias)
    far, far_sum = attend_on_cpu(query, far_keys, far_values)
    share = torch.sigmoid(far_sum - near_sum).to(query.dtype)  # both are logarithms
    return torch.lerp(near, far, share.unsqueeze(-1))


def _prompt_pieces(rows: Rows, prompt: slice) -> list[tuple[int, Tensor]]:
    """(first row, visible [rows, new rows]) of the prompt rows: causal, so a piece ends at its own last column."""
    pieces = []
    for first in range(prompt.start, prompt.stop, PIECE):
        end = min(first + PIECE, prompt.stop)
        pieces.append((first, rows.rank[None, prompt.start : end] <= rows.rank[first:end, None]))
    return pieces


def _decode_pieces(rows: Rows, decode: slice, num_prompt: int) -> list[tuple[int, Tensor]]:
    """(first row, visible [rows, new rows]) of the decode rows, which see all prompt rows."""
    if decode.stop == decode.start:
        return []
    visible = F.pad(may_see(rows.narrow(decode.start, decode.stop - decode.start)), (num_prompt, 0), value=True)
    return [(decode.start + first, part) for first, part in zip(range(0, len(visible), PIECE), visible.split(PIECE), strict=True)]


def _to_piece(first: int, visible: Tensor, num_joined: int, num_groups: int, dtype: torch.dtype) -> Piece:
    """With a bias that starts with the `num_joined` committed tokens, which everybody sees."""
    num_rows, num_new = visible.shape
    bias = None
    if not bool(visible.all()):  # a host read, which saves every layer the mask of a lone autoregressive row
        bias = torch.zeros(visible.shape, device=visible.device, dtype=dtype).masked_fill_(~visible, -math.inf)
        bias = F.pad(bias, (num_joined, 0)).repeat(num_groups, 1)
    return Piece(first, first + num_rows, num_new, bias)


def _committed(spans: Spans, seat: int, cached: int) -> slice | Tensor | None:
    if cached == 0:
        return None
    pages = spans.page_table[seat, : -(-cached // spans.page_size)].tolist()
    if pages == list(range(pages[0], pages[0] + len(pages))):
        first = pages[0] * spans.page_size
        return slice(first, first + cached)
    place = torch.arange(cached, device=spans.page_table.device)
    return spans.cache_rows(torch.full_like(place, seat), place)
