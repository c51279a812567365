"""The slots of one answer in the terminal, drawn from decode events: planned, verified, infilled and committed look different."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from refusion.decoding.events import Event
from refusion.tokenizer import Tokenizer

STYLES = {"planned": "dim italic", "verified": "yellow", "infilled": "cyan", "committed": "bold green"}


@dataclass(slots=True)
class _Slot:
    """What is on show of one slot: tokens that stand, in the style of how they came to, then drafts."""

    kind: str
    standing: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()


class SlotBoard:
    """The answer as slots in text order; what lies behind a committed end or max_tokens is not shown."""

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
            slot.kind, slot.standing, slot.drafts = "planned", (), event.token_ids
        else:
            slot.kind, slot.standing = event.kind, event.token_ids
        if event.kind == "committed":
            slot.drafts = ()

    def render(self) -> Group:
        """The slots as styled text over a line of totals."""
        text, num_committed = Text(), 0
        for offset, slot in sorted(self.slots.items()):
            if offset >= self.max_tokens:
                break
            text.append(self._decode(slot.standing), STYLES[slot.kind])
            text.append(self._decode(slot.drafts[len(slot.standing) :]), STYLES["planned"])
            if slot.kind == "committed":
                num_committed += len(slot.standing)
                if any(token in self.end_ids for token in slot.standing):
                    break
        legend = Text("  ").join(Text(kind, style) for kind, style in STYLES.items())
        totals = Text(f"   {num_committed} tokens in {self.num_forwards} forwards", "dim")
        return Group(text, Text(), Text.assemble(legend, totals))

    def _decode(self, token_ids: tuple[int, ...]) -> str:
        return self.tokenizer.decode(token_ids)


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
