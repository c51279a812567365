"""The diffusion baselines in the engine: the tokens and forwards of the plain loops, whatever runs beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import COSTS, Plain, check, is_idle, new_request, run

from refusion.decoding.diffusion import decode
from refusion.decoding.diffusion_params import BlockDiffusionParams, DiffusionParams, MaskedDiffusionParams
from refusion.decoding.events import Event
from refusion.decoding.forward import EagerForward
from refusion.engine.build import build_engine, flat_network
from refusion.engine.candidates import Candidates
from refusion.engine.core import Engine
from refusion.engine.requests import Answer, lane_key
from refusion.engine.settings import EngineSettings
from refusion.engine.shapes import row_bucket
from refusion.engine.warm_up import Expected, wanted_shapes
from refusion.errors import RequestError
from refusion.model.transformer import Transformer

PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [16, 17], [18], [7, 8, 9, 20, 21, 22, 23, 24, 25], [7, 8, 9, 20, 21, 22, 23, 24, 30]]
ENDS = tuple(range(40, 52))
PARAMS: dict[str, DiffusionParams] = {
    "plain": MaskedDiffusionParams(block_size=6),
    "one block": MaskedDiffusionParams(block_size=64, steps=5),
    "threshold": MaskedDiffusionParams(block_size=5, threshold=0.2, early_stop=True),
    "prefix cache": MaskedDiffusionParams(block_size=6, steps=3, cache="prefix"),
    "dual cache": MaskedDiffusionParams(block_size=6, threshold=0.2, cache="dual"),
    "blocks": BlockDiffusionParams(block_size=4, threshold=0.2),
    "blocks by steps": BlockDiffusionParams(block_size=3, steps=2),
    "blocks unfused": BlockDiffusionParams(block_size=4, threshold=0.2, fuse_commit=False),
}
NewEngine = Callable[..., Engine]


def asked(prompt: list[int], answers: list[Answer], name: str, **options: Any) -> Any:
    params = PARAMS[name]
    decoder = "masked_diffusion" if isinstance(params, MaskedDiffusionParams) else "block_diffusion"
    return new_request(prompt, answers, decoder=decoder, diffusion=params, **options)


def answer_all(engine: Engine, prompts: list[list[int]], name: str, **options: Any) -> list[Answer]:
    answers: list[Answer] = []
    for index, prompt in enumerate(prompts):
        engine.add(asked(prompt, answers, name, index=index, **options))
    run(engine)
    return sorted(answers, key=lambda answer: answer.request)


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.8, "seed": 3}], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_tokens": 64, "max_num_seqs": 3},
        {"max_prompt_rows": 2, "page_size": 2},
        {"max_decode_rows": 30},
        {"runs_ahead": True},
    ],
    ids=["roomy", "short of pages", "prompts in pieces", "few rows", "ahead of reports"],
)
def test_tokens_and_forwards_are_those_of_the_plain_loops(
    new_engine: NewEngine, plain: Plain, name: str, sampling: dict[str, Any], settings: dict[str, Any]
) -> None:
    engine = new_engine(**settings)
    for prompt, answer in zip(PROMPTS, answer_all(engine, PROMPTS, name, eos_ids=ENDS, **sampling), strict=True):
        assert (answer.token_ids, answer.num_forwards) == plain(asked(prompt, [], name, eos_ids=ENDS, **sampling))
        assert answer.is_stopped == (answer.token_ids[-1] in ENDS)
    assert is_idle(engine)


@pytest.mark.parametrize("name", ["prefix cache", "blocks", "blocks unfused"])
def test_the_youngest_makes_room_and_goes_on_where_it_stopped(
    new_engine: NewEngine, plain: Plain, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refusion.engine.paging.PAGES_AHEAD", 0)
    engine = new_engine(cache_tokens=36, max_num_seqs=3)
    answers: list[Answer] = []
    # The first one grows by a page now and then; whoever came last has to give way.
    asked_for = [
        new_request([7] * 12, answers, index=0, decoder="autoregressive", max_tokens=24),
        *(asked([10 + index] * 4, answers, name, index=index, max_tokens=16) for index in (1, 2)),
    ]
    for request in asked_for:
        engine.add(request)
    for _ in range(200):
        engine.step()
        check(engine)
    assert engine.scheduler.num_preempted > 0
    assert len(answers) == 3
    assert all((answer.token_ids, answer.num_forwards) == plain(asked_for[answer.request]) for answer in answers)
    assert is_idle(engine)


def test_pages_are_not_taken_from_those_who_have_none(new_engine: NewEngine, plain: Plain) -> None:
    engine = new_engine(cache_tokens=44, max_num_seqs=3, prefix_caching=False)
    answers: list[Answer] = []
    asked_for = [
        *(new_request([7 + index] * 4, answers, index=index, decoder="autoregressive", max_tokens=24) for index in range(2)),
        asked([9] * 4, answers, "plain", index=2, max_tokens=30),
    ]
    for request in asked_for:
        engine.add(request)
    run(engine)
    assert engine.scheduler.num_preempted > 0
    assert all((answer.token_ids, answer.num_forwards) == plain(asked_for[answer.request]) for answer in answers)


@pytest.mark.parametrize("name", PARAMS)
def test_an_aborted_request_is_silent_and_the_others_do_not_notice(new_engine: NewEngine, plain: Plain, name: str) -> None:
    for num_steps in (0, 1, 3, 5):
        engine, answers, events = new_engine(max_num_seqs=2), [], []
        requests = [engine.add(asked([7, 8, 9 + index], answers, name, index=index, on_event=events.append)) for index in range(4)]
        for _ in range(num_steps):
            engine.step()
        heard = len(events)
        for request in (requests[0], requests[3]):
            engine.abort(request)
        run(engine)
        check(engine)
        assert sorted(answer.request for answer in answers) == [1, 2]
        assert not [event for event in events[heard:] if event.request in (0, 3)]
        assert all(answer.token_ids == plain(asked([7, 8, 9 + answer.request], [], name))[0] for answer in answers)
        assert is_idle(engine)


@pytest.mark.parametrize("name", PARAMS)
def test_events_retell_every_answer(new_engine: NewEngine, name: str) -> None:
    events: list[Event] = []
    for answer in answer_all(new_engine(), PROMPTS, name, on_event=events.append, eos_ids=ENDS, temperature=1.0):
        own = [event for event in events if event.request == answer.request]
        assert {event.kind for event in own} == {"committed", "finished"}
        places = [
            (event.offset + place, token) for event in own if event.kind == "committed" for place, token in enumerate(event.token_ids)
        ]
        assert len(dict(places)) == len(places), "a token was committed twice"
        assert [dict(places)[place] for place in range(len(answer.token_ids))] == answer.token_ids
        assert own[-1].finish_reason == ("stop" if answer.is_stopped else "length")
        assert own[-1].forward == answer.num_forwards
        assert own[-1].forward == max(event.forward for event in own)


def test_a_stop_ends_one_request(new_engine: NewEngine, plain: Plain) -> None:
    free = [plain(asked(prompt, [], "plain"))[0] for prompt in PROMPTS]

    def find_stop(token_ids: list[int]) -> int | None:
        return 6 if token_ids[:6] == free[1][:6] else None

    stopped = answer_all(new_engine(), PROMPTS, "plain", find_stop=find_stop)
    assert stopped[1].token_ids == free[1][:6]
    assert stopped[1].num_forwards < 16
    assert all(answer.token_ids == free[answer.request] for answer in stopped if answer.request != 1)


def test_prompts_of_block_diffusion_are_never_shared_with_causal_ones(new_engine: NewEngine, plain: Plain) -> None:
    engine = new_engine()
    prompt = list(range(10, 22))
    for request in (new_request(prompt, [], decoder="refusion"), asked(prompt, [], "blocks"), new_request(prompt, [], decoder="refusion")):
        answers: list[Answer] = []
        engine.add(replace(request, on_answer=answers.append))
        run(engine)
        assert answers[0].token_ids == plain(request)[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain", "masked_diffusion needs 37 rows in a forward of at most 15; lower max_tokens or raise max_decode_rows"),
        ("prefix cache", "together more than the KV cache of 32 tokens holds"),
        ("blocks", "together more than the KV cache of 32 tokens holds"),
    ],
)
def test_a_request_that_can_never_fit_is_refused_at_the_door(new_engine: NewEngine, name: str, message: str) -> None:
    engine = new_engine(cache_tokens=32, max_decode_rows=15)
    with pytest.raises(RequestError, match=message):
        engine.add(asked([7] * 21, [], name, index=3))
    assert not engine.has_work


def test_a_request_waits_until_a_forward_has_rows_for_it(new_engine: NewEngine, plain: Plain) -> None:
    engine, answers = new_engine(max_decode_rows=40), []
    for index, prompt in enumerate(PROMPTS):
        engine.add(asked(prompt, answers, "plain", index=index))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, *(len(seats) for seats in engine.scheduler.lanes.values()))
    assert most == 2  # 16 masks and a prompt each
    assert all(answer.token_ids == plain(asked(PROMPTS[answer.request], [], "plain"))[0] for answer in answers)


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("num_requests", [1, 5, 100])
def test_the_shapes_made_ready_hold_the_rows_of_every_forward(name: str, num_requests: int) -> None:
    key = lane_key(asked([7], [], name, max_tokens=64), "masked_diffusion" if "locks" not in name else "block_diffusion")
    load = Expected(num_requests=num_requests, prompt_tokens=300, answer_tokens=64, most_seats=128, prompt_rows=2048, decode_rows=4096)
    found = list(wanted_shapes(key, Candidates(None, 4096), load))
    assert len(found) == len(set(found)) <= 250
    assert {shape.num_prompt_rows for shape in found} == {0}
    for count in (1, num_requests):
        (bucket,) = {shape.num_seats for shape in found if shape.num_seats >= count and shape.num_seats < 2 * count}
        here = {shape.num_rows for shape in found if shape.num_seats == bucket}
        whole = name in ("plain", "one block", "threshold")
        fewest, most = (65, 364) if whole else (key.width, 300 + (key.width if "locks" in name else 64))
        assert {row_bucket(min(count * fewest, 4096), bucket), row_bucket(min(count * most, 4096), bucket)} <= here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PARAMS)
def test_on_a_gpu_graphs_and_kernels_write_what_the_plain_loops_write(name: str, golden_dir: Path) -> None:
    on_cpu, on_gpu = (Transformer.from_pretrained(golden_dir / "tiny-refusion", device=device) for device in ("cpu", "cuda"))
    mask_id, eos_ids = 2, (1, *range(40, 44))
    settings = EngineSettings(max_num_seqs=4, page_size=16, cache_tokens=4096)
    engine = build_engine(flat_network(on_gpu), settings, banned_ids=torch.tensor([mask_id], device="cuda"), costs=lambda: COSTS)
    forward = EagerForward(on_cpu, torch.tensor([mask_id]))
    prompts = [[*prompt, 10 + turn] for turn in range(3) for prompt in PROMPTS]  # later ones replay what earlier ones captured
    answers = answer_all(engine, prompts, name, eos_ids=eos_ids, max_tokens=22)
    assert engine.runner.num_first_runs > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        request = asked(prompt, [], name, max_tokens=22)
        trace = decode(forward, prompt, PARAMS[name], request.sampling, mask_id=mask_id, eos_ids=eos_ids)
        assert (answer.token_ids, answer.num_forwards) == (trace.token_ids, trace.num_forwards)
