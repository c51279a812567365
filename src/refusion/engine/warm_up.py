"""Which shapes of forwards a load needs, so that all of them can be made ready before the first request comes."""

from collections.abc import Iterator
from dataclasses import dataclass

from refusion.decoding.diffusion_params import MaskedDiffusionParams
from refusion.engine.candidates import Candidates
from refusion.engine.lanes import LaneKey
from refusion.engine.runner import fewest_rows
from refusion.engine.shapes import PROMPT_ROWS, SEATS, at_least, row_bucket
from refusion.engine.sliding import seat_least_rows, seat_rows


@dataclass(frozen=True, slots=True)
class WantedShape:
    """What `Runner.warm` makes ready."""

    num_seats: int
    num_rows: int
    num_prompt_rows: int
    candidates: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """A load."""

    num_requests: int
    """Most requests that run together."""
    prompt_tokens: int
    """Of the longest prompt."""
    answer_tokens: int
    """Of an answer."""
    most_seats: int
    """Of any lane; seat buckets end there."""
    prompt_rows: int
    """Most prompt rows of a forward."""
    decode_rows: int
    """Most decode rows of a forward."""


def wanted_shapes(key: LaneKey, candidates: Candidates, load: Expected) -> Iterator[WantedShape]:
    """All shapes of a lane under this load, from one request to the most."""
    least = 1
    for step in SEATS:
        num_seats, most = min(step, load.most_seats), min(step, load.num_requests)
        num_prompt_rows = 0 if key.diffusion is not None else min(load.prompt_rows, most * load.prompt_tokens)
        for num_prompt in _prompt_rows(num_prompt_rows):
            if key.diffusion is not None:
                yield from _diffusion_shapes(key, load, num_seats, (least, most))
            elif key.slots is None:
                yield WantedShape(num_seats, num_seats, num_prompt, 0)
            else:
                yield from _slot_shapes(key, candidates, load, num_prompt, num_seats, (least, most))
        if most >= load.num_requests:
            return
        least = step + 1


def _prompt_rows(most: int) -> tuple[int, ...]:
    """All buckets up to the one that holds `most`."""
    last = at_least(PROMPT_ROWS, most)
    return tuple(rows for rows in PROMPT_ROWS if rows <= last)


def _diffusion_shapes(key: LaneKey, load: Expected, num_seats: int, seated: tuple[int, int]) -> Iterator[WantedShape]:
    """From a block of the fewest requests to prompts and answers, or prompts and blocks, of the most."""
    most_each, fewest_each = load.prompt_tokens + key.width, key.width
    if isinstance(key.diffusion, MaskedDiffusionParams):
        most_each = load.prompt_tokens + load.answer_tokens
        fewest_each = load.answer_tokens + 1 if key.diffusion.cache == "none" else key.width
    most = row_bucket(min(seated[1] * max(most_each, 2 * key.width), load.decode_rows), num_seats)
    rows = min(seated[0] * fewest_each, most)
    while (bucket := row_bucket(rows, num_seats)) < most:
        yield WantedShape(num_seats, bucket, 0, 0)
        rows = bucket + 1
    yield WantedShape(num_seats, most, 0, 0)


def _slot_shapes(
    key: LaneKey, candidates: Candidates, load: Expected, num_prompt: int, num_seats: int, seated: tuple[int, int]
) -> Iterator[WantedShape]:
    """From the fewest rows of the fewest requests to everything in one forward."""
    assert key.slots is not None, "slots are cut in slot lanes"
    chosen = candidates.choose(candidates.experience(key.slots, key.width), seated[1]).candidates
    most = row_bucket(min(seated[1] * seat_rows(key.slots, key.width, chosen), load.decode_rows), num_seats, has_prompt=num_prompt > 0)
    rows = fewest_rows(key, num_seats) if num_prompt else seated[0] * seat_least_rows(key.slots)
    while (bucket := row_bucket(rows, num_seats, has_prompt=num_prompt > 0)) < most:
        yield WantedShape(num_seats, bucket, num_prompt, chosen)
        rows = bucket + 1
    yield WantedShape(num_seats, most, num_prompt, chosen)
