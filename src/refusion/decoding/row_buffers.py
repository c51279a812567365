"""Tensors at fixed addresses through which rounds and the runner of a forward speak, row by row."""

import torch
from torch import Tensor

from refusion.model.rows import Spans

# B = seats, M = rows a seat may keep of one forward


class RowBuffers:
    """What every kind of rounds hands out at fixed addresses."""

    def __init__(self, num_seats: int, num_kept: int, report_width: int, max_rows: int, device: torch.device) -> None:
        self.given_ids = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.attempts = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.source = torch.full((num_seats * num_kept,), -1, dtype=torch.int32, device=device)
        self.target = torch.full((num_seats * num_kept,), -1, dtype=torch.int32, device=device)
        self.report = torch.zeros(num_seats, report_width, dtype=torch.int32, device=device)


def cache_targets(spans: Spans, place: Tensor, is_kept: Tensor) -> Tensor:
    """Cache rows of the committed tokens `place` [B, M] of every seat, -1 where nothing is kept."""
    seat = torch.arange(place.shape[0], device=place.device)[:, None].expand_as(place)
    last = spans.page_table.shape[1] * spans.page_size - 1
    return torch.where(is_kept, spans.cache_rows(seat, place.clamp(max=last)), -1)
