from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from refusion.cli.watch import REDRAFTED, STYLES, SlotBoard
from refusion.decoding.events import Event, Kind
from refusion.tokenizer import Tokenizer

EOS = 2


@pytest.fixture
def tokenizer(byte_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(byte_tokenizer_dir)


def drawn(board: SlotBoard) -> tuple[str, list[tuple[str, str]], str]:
    """The text on show, its pieces with their style names, and the line of totals."""
    text, _, totals = board.render().renderables
    names = {style: name for name, style in STYLES.items()} | {REDRAFTED: "redrafted"}
    names |= {f"bold {STYLES[name]}": f"{name} for good" for name in ("verified", "infilled")}
    pieces = [(text.plain[span.start : span.end], names[str(span.style)]) for span in text.spans]  # type: ignore[union-attr]
    return text.plain, pieces, totals.plain  # type: ignore[union-attr]


def test_every_state_of_a_slot_has_its_own_style(tokenizer: Tokenizer) -> None:
    ids, board = tokenizer.encode, SlotBoard(tokenizer, {EOS}, 64)
    events = [
        Event("planned", 0, 1, 0, 0, tuple(ids("abcd"))),
        Event("planned", 0, 1, 1, 4, tuple(ids("efgh"))),
        Event("planned", 0, 1, 2, 8, tuple(ids("ijkl"))),
        Event("verified", 0, 2, 0, 0, tuple(ids("ab"))),
        Event("infilled", 0, 3, 1, 4, tuple(ids("efg"))),
        Event("committed", 0, 4, 2, 8, tuple(ids("ijkl"))),
    ]
    for event in events:
        board.push(event)
    text, pieces, totals = drawn(board)
    assert text == "abcdefghijkl"
    assert pieces == [("ab", "verified"), ("cd", "planned"), ("efg", "infilled"), ("h", "planned"), ("ijkl", "committed")]
    assert totals.endswith("4 tokens in 4 forwards")
    assert len(set(STYLES.values())) == len(STYLES) == 4


def test_slots_that_slide_show_what_passed_and_the_drafts_behind_it(tokenizer: Tokenizer) -> None:
    ids, board = tokenizer.encode, SlotBoard(tokenizer, {EOS}, 16)

    def push(kind: Kind, forward: int, offset: int, text: str, is_infill: bool = False) -> None:
        board.push(Event(kind, 0, forward, offset, offset, tuple(ids(text)), is_infill=is_infill))

    push("committed", 1, 0, "a")
    push("planned", 1, 1, "bcdx")
    assert drawn(board)[:2] == ("abcdx", [("a", "committed"), ("bcdx", "planned")])
    push("verified", 2, 1, "bcd")
    push("committed", 2, 1, "bcde")
    push("planned", 2, 5, "fy", is_infill=True)
    assert drawn(board)[1] == [("a", "committed"), ("bcd", "verified for good"), ("e", "committed"), ("fy", "redrafted")]
    push("infilled", 3, 5, "f")
    push("committed", 3, 5, "fg")
    push("planned", 3, 7, "h" * 20, is_infill=True)
    text, pieces, totals = drawn(board)
    assert pieces == [("abcde", "committed"), ("f", "infilled for good"), ("g", "committed"), ("h" * 9, "redrafted")]
    assert len(text) == 16, "nothing is drawn behind max_tokens"
    push("infilled", 4, 7, "")  # none of them passed
    push("committed", 4, 7, "i")
    assert drawn(board)[1] == [("abcdefgi", "committed")]
    assert totals.endswith("7 tokens in 3 forwards")


def test_a_character_in_two_pieces_of_one_style_is_drawn_whole(tokenizer: Tokenizer) -> None:
    board, ids = SlotBoard(tokenizer, {EOS}, 64), tokenizer.encode("é")
    assert len(ids) == 2
    for place, token in enumerate(ids):
        board.push(Event("committed", 0, place + 1, place, place, (token,)))
    assert drawn(board)[0] == "é"


def test_what_lies_behind_a_committed_end_or_max_tokens_is_not_drawn(tokenizer: Tokenizer) -> None:
    board = SlotBoard(tokenizer, {EOS}, 8)
    board.push(Event("planned", 0, 1, 2, 8, tuple(tokenizer.encode("past"))))
    board.push(Event("planned", 0, 1, 1, 4, tuple(tokenizer.encode("gone"))))
    board.push(Event("committed", 0, 2, 0, 0, (*tokenizer.encode("ab"), EOS)))
    assert drawn(board)[0] == "ab"


def test_the_board_draws_what_looks_like_markup_as_it_is(tokenizer: Tokenizer) -> None:
    board = SlotBoard(tokenizer, {EOS}, 64)
    board.push(Event("committed", 0, 1, 0, 0, tuple(tokenizer.encode("a[bold]b[/x]"))))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(board.render())
    assert "a[bold]b[/x]" in console.export_text()
