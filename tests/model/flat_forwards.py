"""Random forwards of flat rows, and attention over them written out in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusion.model.rows import PROMPT, Rows, Spans, may_see
from refusion.model.segments import NO_PARENT, TRUNK


@dataclass(frozen=True)
class Seat:
    """What a seat brings to a forward: committed tokens, prompt rows, and decode rows (segment, rank, parent, visible, is_trunk)."""

    cached: int = 0
    prompt: int = 0
    decode: Sequence[tuple[int, int, int, int, int]] = ()


CHAIN = [(0, rank, NO_PARENT, 0, 1) for rank in range(3)]  # drafts of the chosen slots
PLAN = [(1, rank, TRUNK, 0, 0) for rank in range(4)]  # masks of the next plan, behind all drafts
GROUPS = [(2 + cut, rank, 0, cut, 0) for cut in (1, 2) for rank in range(cut, 4)]  # masks of an infill, behind the first `cut` drafts
TWO_WAY = [(0, 0, NO_PARENT, 0, 0)] * 9  # equal ranks: everything sees everything, as in masked diffusion
BLOCKS = [(0, place // 4, NO_PARENT, 0, 0) for place in range(10)]  # bidirectional inside a block, causal between blocks
LONE = [(0, 0, NO_PARENT, 0, 0)]  # the last token of an autoregressive decoder


@dataclass(frozen=True)
class Forward:
    """The arguments of `attend` before the tiles."""

    query: Tensor
    new_keys: Tensor
    new_values: Tensor
    keys: Tensor
    values: Tensor
    rows: Rows
    spans: Spans

    def to(self, device: str) -> Forward:
        tensors = [getattr(self, name).to(device) for name in ("query", "new_keys", "new_values", "keys", "values")]
        rows = Rows(*(getattr(self.rows, name).to(device) for name in Rows.__dataclass_fields__))
        spans = Spans(*(getattr(self.spans, name).to(device) for name in list(Spans.__dataclass_fields__)[:-1]), self.spans.page_size)
        return Forward(*tensors, rows, spans)

    @property
    def arguments(self) -> tuple:
        return self.query, self.new_keys, self.new_values, self.keys, self.values, self.rows, self.spans


def forward_of(
    seats: Sequence[Seat],
    *,
    num_kv_heads: int = 2,
    num_groups: int = 3,
    head_dim: int = 16,
    page_size: int = 16,
    padding: tuple[int, int] = (1, 2),
    neighbours: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Forward:
    """A forward of these seats with `padding` rows behind the prompt and the decode rows; pages are shuffled unless `neighbours`.

    Rows of the pool and scratch rows that nobody may see are NaN, so that a look at them shows.
    """
    generator = torch.Generator().manual_seed(seed)
    lines: list[tuple[int, int, int, int, int, int]] = []  # seat, segment, rank, parent, visible, is_trunk
    spans: dict[str, list[int]] = {"cached": [seat.cached for seat in seats]}
    for part, gap in (("prompt", padding[0]), ("row", padding[1])):
        starts, ends = [], []
        for index, seat in enumerate(seats):
            starts.append(len(lines))
            prompt = [(PROMPT, rank, NO_PARENT, 0, 0) for rank in range(seat.cached, seat.cached + seat.prompt)]
            lines += [(index, *line) for line in (prompt if part == "prompt" else seat.decode)]
            ends.append(len(lines))
        spans[f"{part}_start"], spans[f"{part}_end"] = starts, ends
        lines += [(-1, 0, 0, NO_PARENT, 0, 0)] * gap
    columns = torch.tensor(lines, dtype=torch.int32).T.contiguous()
    zeros = torch.zeros(len(lines), dtype=torch.int32)
    rows = Rows(zeros, zeros, *columns)

    num_pages = [-(-seat.cached // page_size) for seat in seats]
    order = list(range(1, 1 + sum(num_pages)))
    if not neighbours:
        random.Random(seed).shuffle(order)
    table = torch.zeros(len(seats), max(num_pages) + 1, dtype=torch.int32)
    for seat, count in enumerate(num_pages):
        table[seat, :count] = torch.tensor([order.pop(0) for _ in range(count)], dtype=torch.int32)
    made = Spans(**{name: torch.tensor(value, dtype=torch.int32) for name, value in spans.items()}, page_table=table, page_size=page_size)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    pool = (1 + sum(num_pages)) * page_size
    keys, values = torch.full((2, pool, num_kv_heads, head_dim), math.nan).to(dtype)
    for seat, spec in enumerate(seats):
        live = made.cache_rows(torch.full((spec.cached,), seat), torch.arange(spec.cached))
        keys[live], values[live] = noise(spec.cached, num_kv_heads, head_dim), noise(spec.cached, num_kv_heads, head_dim)
    new_keys, new_values = noise(len(lines), num_kv_heads, head_dim), noise(len(lines), num_kv_heads, head_dim)
    new_keys[rows.seat < 0], new_values[rows.seat < 0] = math.nan, math.nan
    return Forward(noise(len(lines), num_kv_heads * num_groups, head_dim), new_keys, new_values, keys, values, rows, made)


def dense(forward: Forward) -> Tensor:
    """[T, HG * D] float64: every row against its own list of keys; padding rows are zero."""
    query, new_keys, new_values = forward.query.double(), forward.new_keys.double(), forward.new_values.double()
    num_groups = query.shape[1] // new_keys.shape[1]
    visible, seats = may_see(forward.rows), forward.rows.seat.tolist()
    result = torch.zeros_like(query)
    for row, seat in enumerate(seats):
        if seat < 0:
            continue
        cached = int(forward.spans.cached[seat])
        place = torch.arange(cached, device=query.device)
        live = forward.spans.cache_rows(torch.full_like(place, seat), place)
        key = torch.cat((forward.keys[live].double(), new_keys[visible[row]])).repeat_interleave(num_groups, dim=1)  # [C, HG, D]
        value = torch.cat((forward.values[live].double(), new_values[visible[row]])).repeat_interleave(num_groups, dim=1)
        weight = (torch.einsum("hd,chd->hc", query[row], key) / math.sqrt(query.shape[2])).softmax(dim=-1)
        result[row] = torch.einsum("hc,chd->hd", weight, value)
    return result.flatten(1)
