from __future__ import annotations

import torch
from flat_forwards import BLOCKS, CHAIN, GROUPS, PLAN, TWO_WAY, Seat, forward_of
from hypothesis import given, settings
from hypothesis import strategies as st

from refusion.model.rows import PADDING, PROMPT, Rows, may_see, plain_tiles
from refusion.model.segments import NO_PARENT, TRUNK, Segments

TOKEN = st.tuples(
    st.integers(-1, 3), st.integers(0, 4), st.sampled_from([NO_PARENT, TRUNK, 0, 1, 2, 3]), st.integers(0, 4), st.integers(0, 1)
)


def rows_of(segments: Segments) -> Rows:
    """The tokens of all requests, one after the other."""
    columns = (segments.segment, segments.rank, segments.parent, segments.visible, segments.is_trunk)
    seat = torch.arange(segments.segment.shape[0])[:, None].expand_as(segments.segment)
    seat = torch.where(segments.segment >= 0, seat, PADDING)
    nothing = torch.zeros_like(seat)
    return Rows(*(column.flatten().int() for column in (nothing, nothing, seat, *columns)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12).flatmap(lambda length: st.lists(st.lists(TOKEN, min_size=length, max_size=length), min_size=1, max_size=3)))
def test_decode_rows_see_what_the_padded_mask_shows(requests: list[list[tuple[int, ...]]]) -> None:
    table = torch.tensor(requests)  # [B, T, 5]
    segments = Segments(*table[..., :4].unbind(-1), table[..., 4].bool())
    masks = segments.attn_mask()
    is_token = segments.segment >= 0
    # A token sees itself by the rule of its segment; that padding sees itself, too, is the padded mask's own business.
    expected = torch.block_diag(*(mask & is_real[:, None] for mask, is_real in zip(masks, is_token, strict=True)))
    assert torch.equal(may_see(rows_of(segments)), expected)


def test_prompt_rows_see_each_other_causally_and_decode_rows_see_them_all() -> None:
    forward = forward_of([Seat(5, 3, CHAIN[:2])], padding=(1, 1))
    picture = ["".join("x" if cell else "." for cell in row) for row in may_see(forward.rows).tolist()]
    assert picture == ["x......", "xx.....", "xxx....", ".......", "xxx.x..", "xxx.xx.", "......."]


def test_rows_of_equal_rank_see_one_another() -> None:
    forward = forward_of([Seat(2, 0, TWO_WAY[:3]), Seat(0, 0, BLOCKS[2:7])], padding=(0, 1))
    picture = ["".join("x" if cell else "." for cell in row) for row in may_see(forward.rows).tolist()]
    assert picture == ["xxx......"] * 3 + ["...xx...."] * 2 + ["...xxxxx."] * 3 + ["........."]


def test_seats_never_see_each_other() -> None:
    forward = forward_of([Seat(0, 2, CHAIN + PLAN), Seat(3, 1, CHAIN + GROUPS)])
    seat = forward.rows.seat
    assert not (may_see(forward.rows) & (seat[:, None] != seat[None, :])).any()


def test_rows_narrow_to_views_and_start_as_padding() -> None:
    rows = Rows.empty(4, torch.device("cpu"))
    rows.narrow(1, 2).seat.fill_(7)
    assert rows.seat.tolist() == [PADDING, 7, 7, PADDING]


def test_tiles_cover_every_row_once_and_mix_neither_seats_nor_kinds() -> None:
    forward = forward_of([Seat(3, 5, CHAIN), Seat(), Seat(0, 0, CHAIN + PLAN), Seat(9, 4)])
    tiles = plain_tiles(forward.spans, block=4, num_tiles=9)
    owner = torch.full((forward.rows.num_rows,), PADDING)
    for seat, first, end in zip(tiles.seat.tolist(), tiles.first.tolist(), tiles.end.tolist(), strict=True):
        assert 0 <= end - first <= 4
        assert (end > first) == (seat != PADDING)
        assert (owner[first:end] == PADDING).all()
        assert len({segment == PROMPT for segment in forward.rows.segment[first:end].tolist()}) <= 1
        owner[first:end] = seat
    assert torch.equal(owner.int(), forward.rows.seat)
    assert (tiles.seat == PADDING).sum() == 9 - 6  # 5 = 4 + 1, 3, 7 = 4 + 3, 4
