from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refusion.decoding.autoregressive import AutoregressiveDecoder
from refusion.decoding.events import Event
from refusion.decoding.forward import EagerForward
from refusion.decoding.params import SamplingParams, SlotSettings
from refusion.decoding.refusion import ReFusionDecoder
from refusion.engine.batch import Answer, Decoder, run_batch
from refusion.model.transformer import Transformer

MASK, EOS = 5, 2
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [16, 17], [18]]


@pytest.fixture(scope="module")
def model(tiny_checkpoints: dict[str, Path]) -> Transformer:
    torch.set_num_threads(1)
    return Transformer.from_pretrained(tiny_checkpoints["qwen3"])


def decoder(model: Transformer, kind: str = "refusion", *, max_tokens: int = 16, eos_ids: tuple[int, ...] = (EOS,)) -> Decoder:
    forward, sampling = EagerForward(model, torch.tensor([MASK])), SamplingParams(max_tokens=max_tokens, temperature=1.0)
    if kind == "autoregressive":
        return AutoregressiveDecoder(forward, sampling, eos_ids=torch.tensor(eos_ids))
    slots = SlotSettings(slot_size=4, block_size=8, slot_threshold=0.3, token_threshold=0.1)
    return ReFusionDecoder(forward, slots, sampling, mask_id=MASK, eos_ids=torch.tensor(eos_ids))


def run(decoder: Decoder, prompts: list[list[int]], **options: object) -> list[Answer]:
    return list(run_batch(decoder, prompts, [3] * len(prompts), device=torch.device("cpu"), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["refusion", "autoregressive"])
def test_every_request_is_answered_once_as_it_would_be_alone(model: Transformer, kind: str) -> None:
    # Many ids end an answer, so that requests finish at different times and the batch is compacted.
    eos_ids = tuple(range(40, 52))
    together = run(decoder(model, kind, eos_ids=eos_ids), PROMPTS, first_request=10)
    assert sorted(answer.request for answer in together) == [10, 11, 12, 13, 14]
    assert len({answer.num_forwards for answer in together}) > 1
    for answer in together:
        (alone,) = run(decoder(model, kind, eos_ids=eos_ids), [PROMPTS[answer.request - 10]])
        assert (answer.token_ids, answer.num_forwards) == (alone.token_ids, alone.num_forwards)
        assert answer.is_stopped == (answer.token_ids[-1] in eos_ids)


@pytest.mark.parametrize("kind", ["refusion", "autoregressive"])
def test_a_stop_ends_one_request_and_leaves_the_others_alone(model: Transformer, kind: str) -> None:
    free = {answer.request: answer for answer in run(decoder(model, kind), PROMPTS)}
    victim = free[1].token_ids

    def find_stop(token_ids: list[int]) -> int | None:
        return 6 if token_ids[:6] == victim[:6] else None

    stopped = {answer.request: answer for answer in run(decoder(model, kind), PROMPTS, find_stop=find_stop)}
    assert stopped[1].token_ids == victim[:6]
    assert stopped[1].is_stopped
    assert stopped[1].num_generated >= 6
    assert all(stopped[request].token_ids == free[request].token_ids for request in (0, 2, 3, 4))


@pytest.mark.parametrize("kind", ["refusion", "autoregressive"])
def test_events_retell_every_answer(model: Transformer, kind: str) -> None:
    events: list[Event] = []
    answers = run(decoder(model, kind, eos_ids=(EOS, 40, 41, 42, 43)), PROMPTS, on_event=events.append)
    for answer in answers:
        own = [event for event in events if event.request == answer.request]
        written = {event.offset + place: token for event in own if event.kind == "committed" for place, token in enumerate(event.token_ids)}
        assert [written[place] for place in range(len(answer.token_ids))] == answer.token_ids
        assert own[-1].kind == "finished"
        assert own[-1].finish_reason == ("stop" if answer.is_stopped else "length")
        assert [event.forward for event in own] == sorted(event.forward for event in own)
        assert own[-1].forward == answer.num_forwards


def test_a_slot_is_planned_then_judged_then_committed(model: Transformer) -> None:
    events: list[Event] = []
    run(decoder(model), PROMPTS[:1], on_event=events.append)
    drafts: dict[int, Event] = {}
    standing: dict[int, tuple[int, ...]] = {}
    for event in events:
        if event.kind == "planned":
            assert event.slot not in standing or not standing[event.slot]
            assert 0.0 < event.score <= 1.0
            assert len(event.token_ids) == 4
            drafts[event.slot] = event
        elif event.kind in ("verified", "infilled"):
            before = standing.get(event.slot, ())
            assert event.token_ids[: len(before)] == before  # what stands, stands
            assert event.kind == "infilled" or event.token_ids == drafts[event.slot].token_ids[: len(event.token_ids)]
            standing[event.slot] = event.token_ids
        elif event.kind == "committed":
            assert event.token_ids == standing[event.slot]
            assert event.offset == 4 * event.slot
    assert {event.kind for event in events} == {"planned", "verified", "infilled", "committed", "finished"}
