"""The needed cells of a forward side by side: padded, one line a request, or flat, the rows of all requests on one axis.

`Placement` remembers where each grid went, so that a readout can be folded back.
"""

# torch leaves the types of tolist and split open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refusion.decoding.forward import ForwardBatch
from refusion.decoding.layout import Grids
from refusion.decoding.sampling import Draw
from refusion.model.rows import PADDING, Rows, Spans, Tiles, plain_tiles
from refusion.model.segments import Segments

# B = requests, N = cells, T = tokens of the forward


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the grids of a forward went."""

    window: Tensor  # [B, W] slots being verified or infilled
    plan_slots: Tensor  # [B, W] slots the plan rows belong to
    is_planned: Tensor  # [B, W]
    rows: dict[str, Tensor]  # grid -> [B, N] index of each cell among the T rows (anything valid where not needed)
    shapes: dict[str, tuple[int, ...]]
    num_rows: Tensor  # [B] rows each request needs

    def fold(self, name: str, values: Tensor) -> Tensor:
        """Values of a readout, [B, T] or flat [T], on the cells of a grid."""
        rows = self.rows[name]
        cells = values[rows] if values.dim() == 1 else values.gather(1, rows)
        return cells.view(-1, *self.shapes[name])

    def fold_each(self, name: str, values: Tensor) -> Tensor:
        """The same of several values a row, [B, T, R] or flat [T, R]."""
        return torch.stack([self.fold(name, each) for each in values.unbind(-1)], dim=-1)


def pack_padded(grids: Grids, draw: Draw, num_runner_ups: int) -> tuple[ForwardBatch, Placement]:
    """Every request on its own line, packed to the left; padding has segment -1."""
    is_needed = _whole(grids, "is_needed")  # [B, N]
    num_needed = is_needed.sum(dim=1)
    most = max(int(num_needed.max()), 1)  # the one host synchronisation of a layout: the width of the forward
    row = (is_needed.cumsum(dim=1) - 1).clamp(min=0)  # [B, N]
    cell = (~is_needed).to(torch.int8).sort(dim=1, stable=True).indices[:, :most]  # [B, T]
    is_token = torch.arange(most, device=row.device) < num_needed[:, None]

    def packed(name: str) -> Tensor:
        return _whole(grids, name).gather(1, cell)

    segments = Segments(
        segment=torch.where(is_token, packed("segment"), -1),
        rank=packed("rank"),
        parent=packed("parent"),
        visible=packed("visible"),
        is_trunk=packed("is_trunk") & is_token,
    )
    is_read = packed("is_read") & is_token
    batch = ForwardBatch(packed("token_ids"), packed("positions"), segments, is_read, packed("given_ids"), draw, num_runner_ups)
    return batch, _placement(grids, row, num_needed)


def pack_flat(grids: Grids, rows: Rows, spans: Spans, given_ids: Tensor, start: int) -> tuple[Placement, Tensor]:
    """Fill `rows` and `given_ids` [T] with the rows of one request after the other, then padding; `spans` gets them as start + index.

    Nothing waits for the device. Rows beyond T are left out; their cells point at the last row. Also returns the row [B, N] of every cell,
    T where it has none.
    """
    is_needed, num_rows = _whole(grids, "is_needed"), rows.num_rows
    num_needed = is_needed.sum(dim=1)
    end = num_needed.cumsum(dim=0)  # [B]
    row = (end - num_needed)[:, None] + is_needed.cumsum(dim=1) - 1  # [B, N]
    # Cells that are not needed or do not fit are written to one row more than there are.
    target = torch.where(is_needed, row, num_rows).clamp(max=num_rows).flatten()

    for name in ("token_ids", "positions", "segment", "rank", "parent", "visible", "is_trunk"):
        put_rows(getattr(rows, name), target, _whole(grids, name), 0)
    put_rows(given_ids, target, _whole(grids, "given_ids"), 0)
    put_rows(rows.seat, target, torch.arange(len(num_needed), device=row.device)[:, None].expand_as(row), PADDING)
    spans.row_start.copy_((end - num_needed).clamp(max=num_rows) + start)
    spans.row_end.copy_(end.clamp(max=num_rows) + start)
    return _placement(grids, row.clamp(min=0, max=num_rows - 1), num_needed), target.view_as(row)


def put_rows(into: Tensor, target: Tensor, values: Tensor, padding: int) -> None:
    """Fill `into` [T]: values go to the row `target` names (same number of elements, T = nowhere), all other rows are `padding`."""
    whole = torch.full((len(into) + 1,), padding, dtype=into.dtype, device=into.device)
    into.copy_(whole.scatter_(0, target, values.flatten().to(into.dtype))[: len(into)])


def put_tiles(spans: Spans, tiles: Tiles, tile_start: int) -> None:
    """Cut the decode rows of every seat into the tiles from `tile_start` on."""
    nobody = torch.zeros_like(spans.row_start)
    made = plain_tiles(replace(spans, prompt_start=nobody, prompt_end=nobody), tiles.block, len(tiles.seat) - tile_start)
    for name in ("seat", "first", "end"):
        getattr(tiles, name)[tile_start:].copy_(getattr(made, name))


def _whole(grids: Grids, name: str) -> Tensor:
    """[B, N] one property of all cells."""
    return torch.cat([getattr(grid, name) for grid in grids.cells.values()], dim=1)


def _placement(grids: Grids, row: Tensor, num_rows: Tensor) -> Placement:
    sizes = [grid.is_needed.shape[1] for grid in grids.cells.values()]
    rows = dict(zip(grids.cells, row.split(sizes, dim=1), strict=True))
    return Placement(grids.window, grids.plan_slots, grids.is_planned, rows, grids.shapes, num_rows)
