"""Prompts join the cache in pieces, in the forwards in which others decode."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from refusion.engine.requests import Request
from refusion.engine.runner import PromptRows


@dataclass(frozen=True, slots=True)
class Piece:
    """Prompt tokens [first, end) of a request that join the cache in a forward."""

    request: Request
    first: int
    end: int


def pieces_of(requests: Sequence[Request], most_rows: int, *, whole_rows: int = 1) -> Iterator[Piece]:
    """The next prompt tokens of those who came first, `most_rows` of them at most.

    whole_rows: a piece of fewer is cut off only where the prompt ends.
    """
    left = most_rows
    for request in sorted(requests, key=lambda request: request.arrival):
        missing = len(request.prefill_ids) - request.num_prefilled
        if missing > 0 and left > 0:
            count = min(missing, left)
            if count < min(missing, whole_rows):
                return
            left -= count
            yield Piece(request, request.num_prefilled, request.num_prefilled + count)


def prompt_rows(pieces: Sequence[Piece], page_size: int) -> PromptRows:
    """The rows of these pieces, seat by seat."""
    pieces = sorted(pieces, key=lambda piece: piece.request.seat)
    positions = [np.arange(piece.first, piece.end, dtype=np.int32) for piece in pieces]
    ends = list(accumulate(map(len, positions)))
    return PromptRows(
        token_ids=np.concatenate([piece.request.prompt_ids[piece.first : piece.end] for piece in pieces]),
        positions=np.concatenate(positions),
        targets=np.concatenate([_cache_rows(piece, mine, page_size) for piece, mine in zip(pieces, positions, strict=True)]),
        spans=[(piece.request.seat, end - len(mine), end) for piece, mine, end in zip(pieces, positions, ends, strict=True)],
    )


def _cache_rows(piece: Piece, positions: np.ndarray, page_size: int) -> np.ndarray:
    pages = np.array(piece.request.pages, dtype=np.int32)
    return pages[positions // page_size] * page_size + positions % page_size
