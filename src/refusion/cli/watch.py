"""The slots of one answer in the terminal, drawn from decode events: planned, verified, infilled and committed look different."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from refusion.decoding.events import Event
from refusion.tokenizer import Tokenizer

STYLES = {"planned": "dim italic", "verified": "yellow", "infilled": "cyan", "committed": "bold green"}
REDRAFTED = "dim italic cyan"
"""Drafts of masks behind a draft that failed, not of a plan: what passes of them is infilled."""

Piece = tuple[str, tuple[int, ...]]  # a style, and what is drawn in it


@dataclass(slots=True)
class _Slot:
    """What is on show of one slot: tokens that stand, in the style of how they came to, then drafts."""

    kind: str
    standing: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()
    is_infill: bool = False
    judged_in: int = 0  # forward
    judged_as: str = ""
    num_passed: int = 0  # tokens that stood when it was judged last


class SlotBoard:
    """The answer as slots in text order; what lies behind a committed end or max_tokens is not shown.

    What passed in the newest forward has the colour of how it came to, final or not; what is final is bold.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int], max_tokens: int) -> None:
        self.tokenizer, self.end_ids, self.max_tokens = tokenizer, end_ids, max_tokens
        self.slots: dict[int, _Slot] = {}  # place of the first token in the answer -> slot
        self.num_forwards = 0

    def push(self, event: Event) -> None:
        """Take note of an event."""
        if event.kind == "finished":
            return
        self.num_forwards = event.forward
        slot = self.slots.setdefault(event.offset, _Slot("planned"))
        if event.kind == "planned":
            slot.kind, slot.standing, slot.drafts, slot.is_infill = "planned", (), event.token_ids, event.is_infill
            return
        slot.kind, slot.standing = event.kind, event.token_ids
        if event.kind == "committed":
            slot.drafts = ()
        else:
            slot.judged_in, slot.judged_as, slot.num_passed = event.forward, event.kind, len(event.token_ids)

    def render(self) -> Group:
        """The slots as styled text over a line of totals."""
        shown, num_committed = self._shown()
        text = Text()
        for style, pieces in groupby(filter(_has_tokens, shown), key=_style):  # decoded together: a character may lie in two of them
            text.append(self.tokenizer.decode([token for _, token_ids in pieces for token in token_ids]), style)
        legend = Text("  ").join(Text(kind, style) for kind, style in STYLES.items())
        totals = Text(f"   {num_committed} tokens in {self.num_forwards} forwards", "dim")
        return Group(text, Text(), Text.assemble(legend, totals))

    def _shown(self) -> tuple[list[Piece], int]:
        """What is drawn, in text order, and how much of it is final."""
        shown: list[Piece] = []
        num_committed = 0
        for offset, slot in sorted(self.slots.items()):
            if offset >= self.max_tokens:
                break
            shown += self._pieces(slot, self.max_tokens - offset)
            if slot.kind == "committed":
                num_committed += len(slot.standing)
                if any(token in self.end_ids for token in slot.standing):
                    break
        return shown, num_committed

    def _pieces(self, slot: _Slot, most: int) -> Iterator[Piece]:
        """A slot of at most so many tokens."""
        standing, style = slot.standing[:most], STYLES[slot.kind]
        is_news = slot.kind == "committed" and slot.judged_in == self.num_forwards
        num_new = slot.num_passed if is_news else 0
        if num_new:
            yield f"bold {STYLES[slot.judged_as]}", standing[:num_new]
        yield style, standing[num_new:]
        yield REDRAFTED if slot.is_infill else STYLES["planned"], slot.drafts[len(standing) : most]


def _has_tokens(piece: Piece) -> bool:
    return bool(piece[1])


def _style(piece: Piece) -> str:
    return piece[0]


class LiveSlots:
    """A display that redraws the board once per forward and leaves only the final text behind."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int], max_tokens: int) -> None:
        self.board = SlotBoard(tokenizer, end_ids, max_tokens)
        self.live = Live(console=Console(), auto_refresh=False, transient=True, vertical_overflow="crop")
        self.forward = 0

    def show(self, event: Event, new_text: str) -> None:
        """Draw the board when the first event of a new forward comes."""
        if not self.live.is_started:
            self.live.start()
        if event.forward != self.forward:
            self.forward = event.forward
            self.live.update(self.board.render(), refresh=True)
        self.board.push(event)

    def end(self, text: str) -> None:
        """Take the board away and print the text."""
        self.live.stop()
        print(text, flush=True)
