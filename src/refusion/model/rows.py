"""New tokens of one forward, flat: the rows of all seats side by side, and where the rows and the cache of each seat are.

A *seat* is the place of a running request in the tensors of a batch. The rows of a forward are prompt rows (built on the host) followed
by decode rows (laid out from decode state); in both parts the rows of a seat are neighbours and seats come in order. Who sees whom:
every row sees the committed tokens of its seat; decode rows see all prompt rows of their seat, prompt rows see each other causally; among
decode rows the rules of `refusion.model.segments` hold. Rows of different seats never see each other.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from refusion.model.segments import NO_PARENT, TRUNK

# T = rows of the forward, B = seats, N = tiles, M = pages of a seat

PROMPT = -3  # segment of prompt rows
PADDING = -1  # seat of rows that belong to nobody


@dataclass(frozen=True, slots=True)
class Rows:
    """What the network needs to know of each row. Every tensor [T] int32."""

    token_ids: Tensor
    positions: Tensor  # where the token stands in the text, prompt included
    seat: Tensor  # PADDING: nobody's row
    segment: Tensor
    rank: Tensor  # place inside the segment; rows of equal rank see one another
    parent: Tensor  # NO_PARENT, TRUNK or a segment
    visible: Tensor  # how many tokens of the parent are seen
    is_trunk: Tensor  # 0 or 1

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> "Rows":
        """Rows that are all padding."""
        made = {field.name: torch.zeros(num_rows, dtype=torch.int32, device=device) for field in fields(cls)}
        made["seat"].fill_(PADDING)
        return cls(**made)

    def narrow(self, start: int, length: int) -> "Rows":
        """Views of `length` rows from `start` on."""
        return Rows(**{field.name: getattr(self, field.name).narrow(0, start, length) for field in fields(self)})

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[0]


@dataclass(frozen=True, slots=True)
class Spans:
    """Where the tokens of each seat are. Every tensor int32, [B] but for the page table."""

    cached: Tensor  # committed tokens, in pages
    prompt_start: Tensor  # prompt rows of this forward, [start, end)
    prompt_end: Tensor
    row_start: Tensor  # decode rows of this forward, [start, end)
    row_end: Tensor
    page_table: Tensor  # [B, M]
    page_size: int

    def cache_rows(self, seat: Tensor, place: Tensor) -> Tensor:
        """Rows of the page pool that hold the committed tokens `place` of `seat` (same shape, int64)."""
        page = self.page_table[seat, place // self.page_size].long()
        return page * self.page_size + place % self.page_size


@dataclass(frozen=True, slots=True)
class Tiles:
    """Query tiles of the attention kernel: at most `block` neighbouring rows of one seat, prompt and decode rows apart. [N] int32."""

    seat: Tensor  # PADDING: unused
    first: Tensor
    end: Tensor  # exclusive
    block: int
    is_long: bool = False
    """Contexts are long: reading them is what counts."""


def plain_tiles(spans: Spans, block: int, num_tiles: int, is_long: bool = False) -> Tiles:
    """Cut the prompt rows, then the decode rows of every seat into tiles; `num_tiles` must be enough."""
    start = torch.cat((spans.prompt_start, spans.row_start)).long()  # [2B]
    end = torch.cat((spans.prompt_end, spans.row_end)).long()
    count = (end - start + block - 1) // block
    last = count.cumsum(0)
    index = torch.arange(num_tiles, device=start.device)
    owner = torch.searchsorted(last, index, right=True).clamp(max=len(start) - 1)  # [N]
    is_used = index < last[-1]
    first = start[owner] + (index - (last - count)[owner]) * block
    stop = torch.minimum(first + block, end[owner])
    nothing = torch.zeros_like(first)
    return Tiles(
        seat=torch.where(is_used, owner % len(spans.cached), PADDING).int(),
        first=torch.where(is_used, first, nothing).int(),
        end=torch.where(is_used, stop, nothing).int(),
        block=block,
        is_long=is_long,
    )


def may_see(rows: Rows) -> Tensor:
    """[T, T] bool: row i may see row j; the rule that every attention implementation follows."""
    seat, segment, rank = rows.seat, rows.segment, rows.rank
    same_seat = (seat[:, None] == seat[None, :]) & (seat >= 0)[:, None]
    is_prompt = segment == PROMPT
    of_prompt = is_prompt[None, :] & (~is_prompt[:, None] | (rank[None, :] <= rank[:, None]))
    own = (segment[:, None] == segment[None, :]) & ~is_prompt[None, :] & (rank[None, :] <= rank[:, None])
    parent = (rows.parent[:, None] == segment[None, :]) & (rows.parent != NO_PARENT)[:, None] & (rank[None, :] < rows.visible[:, None])
    trunk = (rows.parent == TRUNK)[:, None] & (rows.is_trunk != 0)[None, :] & ~is_prompt[None, :]
    return same_seat & (of_prompt | own | ((parent | trunk) & ~is_prompt[:, None]))
