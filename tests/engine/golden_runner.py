"""Golden traces through the runner: one seat, the whole prompt in the first forward, until the report says done."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from refusion.decoding.params import SlotSettings
from refusion.engine.lanes import Lane, LaneKey
from refusion.engine.network import FlatNetwork
from refusion.engine.runner import PromptRows, Runner

MASK_ID, EOS_ID = 2, 1
PAGE_SIZE = 16


def make_runner(network: FlatNetwork, *, use_kernels: bool, max_seats: int = 1, max_rows: int = 4096, num_pages: int = 64) -> Runner:
    banned = torch.tensor([MASK_ID], device=network.device)
    return Runner(
        network,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        max_seats=max_seats,
        pages_per_seat=num_pages,
        max_rows=max_rows,
        banned_ids=banned,
        mask_id=MASK_ID,
        use_kernels=use_kernels,
    )


def lane_of(runner: Runner, trace: dict[str, Any], **settings: Any) -> Lane:
    slots = SlotSettings(
        slot_size=trace["slot_size"],
        serial_blocks=trace["serial_blocks"],
        slot_threshold=trace["slot_threshold"],
        token_threshold=trace["token_threshold"],
        acceptance="paper",
        correction="paper",
        **settings,
    )
    width = slots.slots_per_block(trace["gen_length"])
    key = LaneKey(
        decoder="refusion", slots=slots, width=width, max_tokens=trace["gen_length"], eos_ids=(EOS_ID,), is_greedy=True, has_top_p=False
    )
    return runner.new_lane(key)


def decode(runner: Runner, lane: Lane, prompt: list[int], max_tokens: int, *, candidates: int) -> tuple[list[int], int]:
    """The answer and the number of forwards."""
    pages = list(range(math.ceil((len(prompt) + max_tokens + 64) / PAGE_SIZE)))
    lane.set_pages(0, pages)
    lane.set_cached(0, 0)
    lane.rounds.admit(0, prompt_length=len(prompt), seed=0, max_tokens=max_tokens)
    places = np.arange(len(prompt), dtype=np.int32)
    rows = PromptRows(np.array(prompt, dtype=np.int32), places, places, [(0, 0, len(prompt))])
    tokens: dict[int, int] = {}
    num_rows = lane.rounds.fresh_rows
    while True:
        raw = runner.launch(lane, num_seats=1, num_rows=num_rows, prompt=rows, candidates=candidates).wait()
        report = lane.rounds.read(raw[0])
        rows = None
        for news in report.committed:
            tokens |= {news.offset + place: token for place, token in enumerate(news.token_ids)}
        if report.is_done:
            break
        num_rows = int(lane.rounds.num_rows(raw, candidates)[0])
    answer = []
    for place in range(max_tokens):
        if place not in tokens:
            break
        answer.append(tokens[place])
        if tokens[place] == EOS_ID:
            break
    return answer, report.num_forwards
