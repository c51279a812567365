"""What each token of a packed row sees, from (start, visible, group): as a dense mask for SDPA, or as block masks for FlexAttention.

Groups are runs of neighbours, so a token sees two ranges of keys: its document's beginning and its own group. The dense form is the plain
one; the block form skips tiles that no document needs, and finds them from the ends of the ranges without ever forming the [L, L] mask.
transformers uses a ready 4-D mask as it is, which also keeps it from inferring packed sequences out of permuted position ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

# R = packed rows, L = tokens in a row, Q = tiles of queries, K = tiles of keys, G = queries in a tile

FLEX_NAME = "refusion_flex"
TILE = 128
"""Queries and keys in a tile of FlexAttention; its kernels are tuned for this size."""


class KeyRanges(NamedTuple):
    """[R, L] int32 each: token i sees the keys j with start <= j < visible, and those with first <= j < last."""

    start: Tensor
    visible: Tensor
    first: Tensor
    last: Tensor


def key_ranges(start: Tensor, visible: Tensor, group: Tensor) -> KeyRanges:
    """Token i sees j if start[i] <= j and (j < visible[i], or both are in one group: > 0 and j <= i, or < 0). Groups are contiguous.

    int32, because a tile's mask is integer arithmetic on every pair, as dear as its matrix product with 64-bit integers.
    """
    index = torch.arange(group.shape[1], device=group.device).expand_as(group)
    is_border = torch.ones_like(group, dtype=torch.bool)
    is_border[:, 1:] = group[:, 1:] != group[:, :-1]
    first = torch.where(is_border, index, 0).cummax(-1).values
    ends = torch.where(is_border.roll(-1, -1), index + 1, group.shape[1])  # [:, 0] is a border, so the roll marks the last token
    end = ends.flip(-1).cummin(-1).values.flip(-1)
    last = torch.where(group > 0, index + 1, torch.where(group < 0, end, first))
    return KeyRanges(*(t.to(torch.int32) for t in (start, visible, first, last)))


def visibility(start: Tensor, visible: Tensor, group: Tensor) -> Tensor:
    """[R, L, L] bool: whether token i sees token j."""
    key = torch.arange(start.shape[1], device=start.device, dtype=torch.int32)
    start, visible, first, last = (t.unsqueeze(-1) for t in key_ranges(start, visible, group))
    return ((start <= key) & (key < visible)) | ((first <= key) & (key < last))


def dense_mask(start: Tensor, visible: Tensor, group: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1, L, L] additive mask in `dtype`, built once so that SDPA need not turn a boolean one into it in every layer."""
    seen = visibility(start, visible, group)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf")).unsqueeze(1)


def block_mask(start: Tensor, visible: Tensor, group: Tensor) -> BlockMask:
    """The same visibility as FlexAttention block masks."""
    ranges = key_ranges(start, visible, group)
    start, visible, first, last = ranges

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_document = (start[row, query] <= key) & (key < visible[row, query])
        return in_document | ((first[row, query] <= key) & (key < last[row, query]))

    is_needed, is_full = _tiles(ranges)
    length = start.shape[1]
    return BlockMask.from_kv_blocks(
        *_ordered(is_needed & ~is_full), *_ordered(is_full), BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(length, length)
    )


def _tiles(ranges: KeyRanges) -> tuple[Tensor, Tensor]:
    """[R, Q, K] bool: tiles in which a query sees a key, and those in which every query sees every key.

    A tile that only both ranges together fill does not count as full; it goes through the mask and loses nothing.
    """
    length = ranges.start.shape[1]
    border = torch.arange(0, length, TILE, device=ranges.start.device, dtype=torch.int32)
    # Queries past the row's end see nothing, so the last tile of a row that is cut short is never full.
    padded = (torch.nn.functional.pad(t, (0, -length % TILE)).unflatten(1, (-1, TILE)).unsqueeze(-1) for t in ranges)
    start, visible, first, last = padded  # [R, Q, G, 1]
    is_needed = _overlaps(start, visible, border) | _overlaps(first, last, border)  # [R, Q, G, K]
    is_full = ((start <= border) & (visible >= border + TILE)) | ((first <= border) & (last >= border + TILE))
    return is_needed.any(2), is_full.all(2)


def _overlaps(begin: Tensor, end: Tensor, border: Tensor) -> Tensor:
    return (begin < border + TILE) & (end > border) & (begin < end)


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each tile of queries needs [R, 1, Q], and the key tiles with those in front [R, 1, Q, K]."""
    ordered = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32).unsqueeze(1), ordered.int().unsqueeze(1)


def flex_attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """FlexAttention in the form transformers calls: query [R, heads, L, D] and fewer key heads in, [R, L, heads, D] out.

    Autocast does not reach FlexAttention: rotary embeddings leave query and key in float32, so they are brought to value's type here.
    """
    attend = flex_attention if torch.compiler.is_compiling() or query.device.type == "cpu" else _compiled_flex_attention()
    output = attend(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor), type(output)
    return output.transpose(1, 2).contiguous(), None


_compiled: Any = None


def _compiled_flex_attention() -> Any:
    """Uncompiled FlexAttention would build the whole score matrix."""
    global _compiled
    if _compiled is None:
        _compiled = torch.compile(flex_attention, dynamic=False)
    return _compiled


AttentionInterface.register(FLEX_NAME, flex_attention_forward)
