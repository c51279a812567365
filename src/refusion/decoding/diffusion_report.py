"""The line of numbers in which a forward of the diffusion rounds tells the host what it did to a seat."""

# torch and numpy leave the types of tolist open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.rounds import IS_DONE, NUM_COMMON, NUM_FORWARDS, NUM_ROWS, OVERFLOW, SeatReport, SlotNews

# B = seats, K = tokens of a block, R = report columns

CACHED, NEXT_ROWS, PLACE, TOKENS = range(NUM_COMMON, NUM_COMMON + 4)
"""Columns of a report behind the common ones, as `DiffusionReport` has them."""


@dataclass(frozen=True, slots=True)
class DiffusionReport:
    """What a forward did to every seat, on the device, in the order of the columns. All [B] but the tokens."""

    is_done: Tensor
    num_forwards: Tensor
    overflow: Tensor  # rows that did not fit
    num_rows: Tensor
    cached: Tensor  # tokens in the cache now
    next_rows: Tensor  # of the next forward
    place: Tensor  # in the answer, of the block that was read
    token_ids: Tensor  # [B, K] what became final, -1 for the other tokens of the block

    def columns(self) -> Tensor:
        """[B, R] int32."""
        scalars = (self.is_done, self.num_forwards, self.overflow, self.num_rows, self.cached, self.next_rows, self.place)
        return torch.cat((torch.stack([each.int() for each in scalars], dim=1), self.token_ids.int()), dim=1)


def seat_report(line: np.ndarray, block_size: int) -> SeatReport:
    """Read one line [R]."""
    assert line[OVERFLOW] == 0, f"{line[OVERFLOW]} rows of a seat did not fit into its forward"
    place = int(line[PLACE])
    return SeatReport(
        is_done=bool(line[IS_DONE]),
        num_forwards=int(line[NUM_FORWARDS]),
        num_rows=int(line[NUM_ROWS]),
        committed=_runs(line[TOKENS:].tolist(), place, place // block_size),
        verified=[],
        infilled=[],
        planned=[],
    )


def _runs(token_ids: list[int], place: int, block: int) -> list[SlotNews]:
    """Neighbouring final tokens of a block as one piece of news each."""
    news: list[SlotNews] = []
    run: list[int] = []
    for index, token in enumerate([*token_ids, -1]):
        if token >= 0:
            run.append(token)
        elif run:
            news.append(SlotNews(block, place + index - len(run), tuple(run)))
            run = []
    return news
