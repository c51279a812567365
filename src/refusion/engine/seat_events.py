"""The events of one request's forward, from its report."""

from collections.abc import Iterator

from refusion.decoding.events import Event, Kind
from refusion.decoding.rounds import SeatReport, SlotNews


def seat_events(report: SeatReport, request: int) -> Iterator[Event]:
    """What `refusion.decoding.events.step_events` yields, in the same order: slot by slot what stands and what is final, then the plan."""
    forward = report.num_forwards
    judged = [*_told("verified", report.verified), *_told("infilled", report.infilled), *_told("committed", report.committed)]
    for kind, news in sorted(judged, key=lambda item: item[1].slot):  # what stands before what is final: sorting is stable
        yield Event(kind, request, forward, news.slot, news.offset, news.token_ids)
    for news in report.planned:
        yield Event("planned", request, forward, news.slot, news.offset, news.token_ids, news.score)


def _told(kind: Kind, found: list[SlotNews]) -> list[tuple[Kind, SlotNews]]:
    return [(kind, news) for news in found]
