"""Small engines and requests, the answers of the plain padded decoders, and what must hold of an engine between two steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from refusion.decoding.autoregressive import AutoregressiveDecoder
from refusion.decoding.diffusion import decode
from refusion.decoding.diffusion_params import BlockDiffusionParams, DiffusionParams, MaskedDiffusionParams
from refusion.decoding.forward import ForwardFn
from refusion.decoding.params import SamplingParams, SlotSettings
from refusion.decoding.refusion import ReFusionDecoder
from refusion.decoding.sliding import decode_sliding
from refusion.engine.build import build_engine
from refusion.engine.core import Engine
from refusion.engine.costs import CostTable
from refusion.engine.network import FlatNetwork
from refusion.engine.requests import Answer, NewRequest, State
from refusion.engine.settings import EngineSettings

MASK, EOS = 5, 2
SLOTS = SlotSettings(slot_size=4, block_size=8, slot_threshold=0.3, token_threshold=0.1)
SLIDING = SlotSettings(slot_size=6, token_threshold=0.1, alternatives=2, infill_length=3, max_candidates=2, sliding=True)
EXACT = SlotSettings(slot_size=6, acceptance="exact", alternatives=2, infill_length=3, sliding=True)
DIFFUSION: dict[str, DiffusionParams] = {
    "masked_diffusion": MaskedDiffusionParams(block_size=6, steps=4),
    "block_diffusion": BlockDiffusionParams(block_size=4, threshold=0.3),
}
COSTS = CostTable((1, 64), (1.0, 1.0))


def make_engine(
    network: FlatNetwork, *, costs: CostTable = COSTS, runs_ahead: bool = False, idle_share: float | None = None, **settings: Any
) -> Engine:
    """An engine for tests; settings are those of `EngineSettings`. runs_ahead: launch before the last report is read, as on a GPU.

    idle_share: of the scheduler, whose own needs more seats than tests have.
    """
    defaults = {"max_num_seqs": 4, "page_size": 4}
    engine = build_engine(network, EngineSettings(**(defaults | settings)), banned_ids=torch.tensor([MASK]), costs=lambda: costs)
    engine.runner.runs_ahead = engine.scheduler.candidates.runs_ahead = runs_ahead
    engine.scheduler.idle_share = engine.scheduler.idle_share if idle_share is None else idle_share
    return engine


def new_request(
    prompt_ids: list[int],
    answers: list[Answer],
    *,
    decoder: str = "refusion",
    slots: SlotSettings = SLOTS,
    diffusion: DiffusionParams | None = None,
    eos_ids: tuple[int, ...] = (EOS,),
    index: int = 0,
    on_event: Any = None,
    find_stop: Any = None,
    **sampling: Any,
) -> NewRequest:
    """A request whose answer is appended to `answers`."""
    return NewRequest(
        prompt_ids=prompt_ids,
        sampling=SamplingParams(**({"max_tokens": 16} | sampling)),
        eos_ids=eos_ids,
        decoder=decoder,
        slots=slots if decoder in ("refusion", "auto") else None,
        diffusion=diffusion or DIFFUSION.get(decoder),
        index=index,
        on_answer=answers.append,
        on_event=on_event,
        find_stop=find_stop,
    )


@dataclass
class Plain:
    """The plain padded decoders, one request at a time."""

    forward: ForwardFn
    known: dict[object, tuple[list[int], int]] = field(default_factory=dict)

    def __call__(self, new: NewRequest, decoder: str | None = None) -> tuple[list[int], int]:
        """Tokens and number of forwards."""
        decoder = decoder or new.decoder
        key = (tuple(new.prompt_ids), new.sampling, new.eos_ids, decoder, new.slots, new.diffusion)
        if key not in self.known:
            self.known[key] = self._decode(new, decoder)
        return self.known[key]

    def _decode(self, new: NewRequest, name: str) -> tuple[list[int], int]:
        if name in DIFFUSION:
            assert new.diffusion is not None
            trace = decode(self.forward, new.prompt_ids, new.diffusion, new.sampling, mask_id=MASK, eos_ids=new.eos_ids)
            return trace.token_ids, trace.num_forwards
        eos_ids = torch.tensor(new.eos_ids)
        if name == "autoregressive":
            decoder = AutoregressiveDecoder(self.forward, new.sampling, eos_ids=eos_ids)
        else:
            assert new.slots is not None
            if new.slots.sliding:
                trace = decode_sliding(self.forward, new.prompt_ids, new.slots, new.sampling, mask_id=MASK, eos_ids=new.eos_ids)
                return trace.token_ids, trace.num_rounds
            decoder = ReFusionDecoder(self.forward, new.slots, new.sampling, mask_id=MASK, eos_ids=eos_ids)
        decoder.start(torch.tensor([list(new.prompt_ids)]), torch.tensor([len(new.prompt_ids)]), torch.tensor([new.sampling.seed]))
        while not bool(decoder.is_done.all()):
            decoder.step()
        return decoder.answer(0), int(decoder.num_forwards[0])


def run(engine: Engine, most_steps: int = 2000) -> None:
    """Step until nothing is left to do."""
    for _ in range(most_steps):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError(f"{engine.scheduler.num_open} requests are still open after {most_steps} steps")


def check(engine: Engine) -> None:
    """Who holds which page, and who sits where: nothing is lost, nothing is shared but whole pages of equal prompts."""
    scheduler = engine.scheduler
    pool, page_size = scheduler.paging.pool, engine.runner.page_size
    seated = [request for seats in scheduler.lanes.values() for request in seats.requests]
    holders = Counter(page for request in seated for page in request.pages)
    holders.update(page for _, page in scheduler.paging.prefix._nodes.values())
    assert [pool.num_references(page) for page in range(pool.num_pages)] == [holders[page] for page in range(pool.num_pages)]
    assert pool.num_free == sum(holders[page] == 0 for page in range(pool.num_pages))
    content: dict[int, bytes] = {}
    for request in seated:
        if request.state is State.FINISHED:
            continue  # has ended, and leaves when its seat is wanted or a forward is scheduled
        for index, page in enumerate(request.pages):
            tokens = request.prefill_ids[: (index + 1) * page_size]
            is_whole = len(tokens) == (index + 1) * page_size
            others = [other for other in seated if other is not request and page in other.pages]
            assert is_whole or not others, f"page {page} holds more than a prompt and is shared"
            assert content.setdefault(page, tokens.tobytes()) == tokens.tobytes() or not others
    for seats in scheduler.lanes.values():
        assert [request.seat for request in seats.requests] == list(range(len(seats)))
        for seat, request in enumerate(seats.requests):
            assert int(seats.room[seat]) == len(request.pages) * page_size
            assert seats.cached[seat] <= len(request.pages) * page_size
            assert seats.lane.page_table_host[seat, : len(request.pages)].tolist() == request.pages
    still_open = [request for request in seated if request.state is not State.FINISHED]
    waiting = [item[1] for seats in scheduler.lanes.values() for item in seats.waiting if item[1].state is not State.FINISHED]
    assert scheduler.num_open == len(still_open) + len(waiting) + len(scheduler.undecided)


def is_idle(engine: Engine) -> bool:
    """Nobody is there and every page is free or kept for later prompts alone."""
    scheduler = engine.scheduler
    run(engine)
    engine.step()  # those who left free their pages
    kept = len(scheduler.paging.prefix)
    return scheduler.num_open == 0 and scheduler.paging.pool.num_free == scheduler.paging.pool.num_pages - kept
