from __future__ import annotations

import torch

from refusion.model.segments import NO_PARENT, TRUNK, Segments


def segments(*rows: tuple[int, int, int, int, int]) -> Segments:
    """One request; per token (segment, rank, parent, visible, is_trunk)."""
    columns = [torch.tensor([[row[column] for row in rows]]) for column in range(5)]
    return Segments(*columns[:4], columns[4].bool())


def picture(found: Segments) -> list[str]:
    return ["".join("x" if cell else "." for cell in row) for row in found.attn_mask()[0].tolist()]


def test_a_segment_is_causal_by_rank_whatever_the_order_of_its_tokens() -> None:
    assert picture(segments((0, 1, NO_PARENT, 0, 0), (0, 0, NO_PARENT, 0, 0), (0, 2, NO_PARENT, 0, 0))) == ["xx.", ".x.", "xxx"]


def test_tokens_of_equal_rank_see_one_another() -> None:
    assert picture(segments(*[(0, 0, NO_PARENT, 0, 0)] * 3)) == ["xxx"] * 3
    blocks = [(0, rank, NO_PARENT, 0, 0) for rank in (4, 4, 5)]  # bidirectional inside a block, causal between blocks
    assert picture(segments(*blocks)) == ["xx.", "xx.", "xxx"]


def test_segments_do_not_see_one_another_without_a_parent() -> None:
    assert picture(segments((0, 0, NO_PARENT, 0, 0), (1, 0, NO_PARENT, 0, 0))) == ["x.", ".x"]


def test_a_child_sees_the_visible_part_of_its_parent_and_itself() -> None:
    # A slot of three drafts and the masks that replace it from token 1 on: they see only draft 0.
    slot = [(0, rank, NO_PARENT, 0, 0) for rank in range(3)]
    masks = [(5, rank, 0, 1, 0) for rank in (1, 2)]
    assert picture(segments(*slot, *masks)) == ["x....", "xx...", "xxx..", "x..x.", "x..xx"]


def test_a_child_of_the_trunk_sees_every_trunk_token_and_nothing_else() -> None:
    rows = [(0, 0, NO_PARENT, 0, 1), (1, 0, NO_PARENT, 0, 0), (2, 0, NO_PARENT, 0, 1), (3, 0, TRUNK, 0, 0), (3, 1, TRUNK, 0, 0)]
    assert picture(segments(*rows)) == ["x....", ".x...", "..x..", "x.xx.", "x.xxx"]


def test_padding_sees_itself_and_is_seen_by_nobody() -> None:
    rows = [(0, 0, NO_PARENT, 0, 1), (-1, 0, NO_PARENT, 0, 1), (1, 0, TRUNK, 0, 0), (-1, 0, TRUNK, 0, 0)]
    found = picture(segments(*rows))
    assert found[0] == "x..."
    assert found[2] == "x.x."
    for padding in (1, 3):
        assert found[padding][padding] == "x"
        assert all(row[padding] == "." for index, row in enumerate(found) if index != padding)


def test_causal_is_one_segment_per_request_with_padding_at_the_end() -> None:
    found = Segments.causal(torch.tensor([[True, True, True], [True, False, False]]))
    masks = found.attn_mask()
    assert masks[0].tolist() == torch.ones(3, 3).tril().bool().tolist()
    assert masks[1].tolist() == torch.eye(3).bool().tolist()
