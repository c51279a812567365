"""The one stream of what happens while an answer is written; the command line, a server and the statistics read the same events."""

# torch leaves the types of tolist and split open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from refusion.decoding.rounds import SeatReport, SlotNews
from refusion.decoding.settling.step_report import StepReport
from refusion.decoding.state import DONE, VERIFY

Kind = Literal["planned", "verified", "infilled", "committed", "finished"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to one slot (or, for `finished`, to the whole answer) of one request."""

    kind: Kind
    request: int  # index of the prompt in the call
    forward: int  # forwards of this request so far, this one included
    slot: int  # index in the answer; where slots slide, and without slots, the place of the first token; -1 for `finished`
    offset: int  # place of the first token in the answer
    token_ids: tuple[int, ...]  # planned: drafts · verified, infilled: what stands now · committed: what became final
    score: float = 0.0  # planned: confidence of the first of the drafts
    finish_reason: str = ""
    is_infill: bool = False  # planned, where slots slide: drafts of masks behind a draft that failed, not of a plan


def step_events(report: StepReport, drafts_after: list[list[int]], row: int, request: int, forward: int) -> Iterator[Event]:
    """Events of one request (row `row` of the batch) from one forward. drafts_after [S][K]: its tokens after the forward."""
    if int(report.phase[row]) == DONE:
        return
    slot_size = report.drafts.shape[2]
    kind: Kind = "verified" if int(report.phase[row]) == VERIFY else "infilled"
    window: list[int] = report.window[row].tolist()
    plan_slots: list[int] = report.plan_slots[row].tolist()
    for place, slot in enumerate(window):
        drafts: list[int] = report.drafts[row, place].tolist()
        if bool(report.is_chosen[row, place]):
            accepted = int(report.num_accepted[row, place])
            yield Event(kind, request, forward, slot, slot * slot_size, tuple(drafts[:accepted]))
        num_committed = int(report.is_committed[row, place].sum())
        if num_committed:
            yield Event("committed", request, forward, slot, slot * slot_size, tuple(drafts[:num_committed]))
    for place, slot in enumerate(plan_slots):
        if bool(report.is_planned[row, place]):
            score = float(report.plan_scores[row, place])
            yield Event("planned", request, forward, slot, slot * slot_size, tuple(drafts_after[slot]), score)


def seat_events(report: SeatReport, request: int) -> Iterator[Event]:
    """The same from the report of a seat."""

    def event(kind: Kind, news: SlotNews) -> Event:
        return Event(kind, request, report.num_forwards, news.slot, news.offset, news.token_ids, score=news.score, is_infill=news.is_infill)

    kinds: dict[Kind, list[SlotNews]] = {"verified": report.verified, "infilled": report.infilled, "committed": report.committed}
    written = [event(kind, news) for kind, all_news in kinds.items() for news in all_news]
    yield from sorted(written, key=lambda event: event.slot)  # stable: what was judged comes before what became final
    for news in report.planned:
        yield event("planned", news)
