"""Random schedules: requests of many kinds come, go and are put aside in an engine with too few pages; nothing may be lost or mixed up."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engines import EXACT, SLIDING, Plain, check, is_idle, make_engine, new_request, run
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from refusion.decoding.diffusion_params import BlockDiffusionParams, MaskedDiffusionParams
from refusion.decoding.params import SlotSettings
from refusion.engine.core import Engine
from refusion.engine.network import FlatNetwork
from refusion.engine.requests import Answer, NewRequest, Request, State

BEGINNINGS = ([], [7, 8, 9, 10], [7, 8, 9, 10, 11, 12, 13, 14], [7, 8, 9, 10, 20, 21, 22, 23, 24])
KINDS: tuple[dict[str, Any], ...] = (
    {"decoder": "refusion"},
    {"decoder": "refusion", "temperature": 1.0, "top_p": 0.9},
    {"decoder": "refusion", "slots": SlotSettings(slot_size=3, block_size=3, acceptance="paper", correction="paper")},
    {"decoder": "refusion", "slots": SLIDING},
    {"decoder": "refusion", "slots": SLIDING, "temperature": 1.0},
    {"decoder": "refusion", "slots": EXACT},
    {"decoder": "autoregressive"},
    {"decoder": "autoregressive", "temperature": 1.0},
    {"decoder": "masked_diffusion"},
    {"decoder": "masked_diffusion", "diffusion": MaskedDiffusionParams(block_size=5, threshold=0.3, cache="prefix", early_stop=True)},
    {"decoder": "masked_diffusion", "diffusion": MaskedDiffusionParams(block_size=6, steps=2, cache="dual"), "temperature": 1.0},
    {"decoder": "block_diffusion", "temperature": 1.0},
    {"decoder": "block_diffusion", "diffusion": BlockDiffusionParams(block_size=3, steps=2, fuse_commit=False)},
)
LIMITS = (
    {"cache_tokens": 48, "max_num_seqs": 4, "max_prompt_rows": 5},
    {"cache_tokens": 42, "max_num_seqs": 5, "max_prompt_rows": 64, "page_size": 2},
    {"cache_tokens": 48, "max_num_seqs": 3, "max_prompt_rows": 3, "page_size": 2, "max_decode_rows": 40, "runs_ahead": True},
    {"cache_tokens": 64, "max_num_seqs": 4, "prefix_caching": False, "page_size": 8, "runs_ahead": True},
    {"cache_tokens": 44, "max_num_seqs": 4, "page_size": 4, "runs_ahead": True, "idle_share": 0.8},
)
seen = {"preempted": 0, "shared": 0, "answered": 0}


class Schedules(RuleBasedStateMachine):
    """`network` and `plain` are set on a subclass."""

    network: FlatNetwork
    plain: Plain

    @initialize(limits=st.sampled_from(LIMITS))
    def start(self, limits: dict[str, int]) -> None:
        self.engine: Engine = make_engine(self.network, **limits)
        self.answers: list[Answer] = []
        self.asked: list[tuple[NewRequest, Request]] = []
        self.aborted: set[int] = set()

    @rule(
        beginning=st.sampled_from(BEGINNINGS),
        end=st.lists(st.integers(30, 33), min_size=1, max_size=3),
        kind=st.sampled_from(KINDS),
        max_tokens=st.sampled_from((1, 2, 7, 16, 23)),
        seed=st.integers(0, 2),
    )
    def ask(self, beginning: list[int], end: list[int], kind: dict[str, Any], max_tokens: int, seed: int) -> None:
        eos_ids = (2, *range(40, 46))
        new = new_request(
            [*beginning, *end], self.answers, index=len(self.asked), max_tokens=max_tokens, seed=seed, eos_ids=eos_ids, **kind
        )
        self.asked.append((new, self.engine.add(new)))

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @precondition(lambda self: self.asked)
    @rule(place=st.integers(0, 99))
    def abort(self, place: int) -> None:
        index = place % len(self.asked)
        request = self.asked[index][1]
        if request.state is not State.FINISHED:
            self.aborted.add(index)
        self.engine.abort(request)

    @invariant()
    def holds(self) -> None:
        check(self.engine)

    def teardown(self) -> None:
        run(self.engine)
        assert is_idle(self.engine)
        answered = {answer.request: answer for answer in self.answers}
        assert len(answered) == len(self.answers), "a request was answered twice"
        assert set(answered) | self.aborted == set(range(len(self.asked)))
        for index, answer in answered.items():
            new = self.asked[index][0]
            assert answer.error is None
            token_ids, num_forwards = self.plain(new)
            assert answer.token_ids == token_ids, f"request {index}"
            assert answer.num_forwards >= num_forwards
        seen["preempted"] += self.engine.scheduler.num_preempted
        seen["shared"] += self.engine.scheduler.paging.num_shared_tokens
        seen["answered"] += len(answered)


@pytest.fixture(scope="module")
def machine(network: FlatNetwork, plain: Plain) -> type[Schedules]:
    return type("BoundSchedules", (Schedules,), {"network": network, "plain": plain})


def test_random_schedules_lose_nothing_and_mix_up_nothing(machine: type[Schedules]) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    profile = settings(max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(machine, settings=profile)


@pytest.mark.parametrize("seed", range(5))
def test_a_rush_of_requests_is_served_from_too_few_pages(machine: type[Schedules], seed: int) -> None:
    draw, schedules = random.Random(seed), machine()
    schedules.start(limits=LIMITS[seed])
    before = dict(seen)
    for _ in range(16):
        for _ in range(draw.randint(0, 7)):
            end = [draw.randint(30, 33) for _ in range(draw.randint(1, 3))]
            schedules.ask(draw.choice(BEGINNINGS), end, draw.choice(KINDS), draw.choice((1, 7, 16, 23)), draw.randint(0, 2))
        schedules.step(draw.randint(1, 6))
        schedules.holds()
        if draw.random() < 0.3 and schedules.asked:
            schedules.abort(draw.randint(0, 99))
    schedules.teardown()
    assert seen["answered"] > before["answered"] + 5
    assert seen["preempted"] > before["preempted"], "pages were not short; the schedule tests nothing"
    assert seen["shared"] > before["shared"] or seed == 3
