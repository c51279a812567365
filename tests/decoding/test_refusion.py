"""The decoder against networks without weights: an independent reference of the algorithm, and answers written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_traces import MASK_ID, forward_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Reference
from scripted import Row, ScriptedForward, certain, hashed_language
from torch import Tensor

from refusion.decoding.params import SamplingParams, SlotSettings
from refusion.decoding.refusion import ReFusionDecoder
from refusion.model.transformer import Transformer

MASK, EOS, VOCAB = 1, 0, 6
TWO_PASS = {"fuse_plan": False, "max_candidates": 0}


def decode(
    forward: ScriptedForward, prompts: list[list[int]], slots: SlotSettings, sampling: SamplingParams, *, compact: bool = False
) -> list[tuple[list[int], int]]:
    """(answer, forwards) of every prompt. compact: finished requests leave the batch at once."""
    decoder = ReFusionDecoder(forward, slots, sampling, mask_id=MASK, eos_ids=torch.tensor([EOS]))
    longest = max(map(len, prompts))
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    decoder.start(padded, torch.tensor([len(prompt) for prompt in prompts]), torch.full((len(prompts),), sampling.seed))
    rows, answers = list(range(len(prompts))), {}
    while rows:
        decoder.step()
        assert len(forward.forwards) < 500, "decoding does not end"
        going_on = []
        for place, row in enumerate(rows):
            if decoder.is_done[place]:
                answers[row] = (decoder.answer(place), int(decoder.num_forwards[place]))
            else:
                going_on.append(place)
        if len(answers) == len(prompts):
            break
        if compact and len(going_on) < len(rows):
            decoder.compact(torch.tensor(going_on))
            rows = [rows[place] for place in going_on]
    return [answers[row] for row in range(len(prompts))]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    slot_size = draw(st.integers(1, 6))
    width = draw(st.integers(1, 3))
    correction = draw(st.sampled_from(["paper", "autoregressive"]))
    return {
        "slot_size": slot_size,
        "block_size": width * slot_size,
        "infill_length": draw(st.sampled_from([None, None, 1, 2, 4])),
        "alternatives": 0 if correction == "paper" else draw(st.sampled_from([0, 1, 3])),
        "slot_threshold": draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])),
        "token_threshold": draw(st.sampled_from([0.0, 0.2, 0.4, 0.8, 1.0])),
        "acceptance": draw(st.sampled_from(["paper", "argmax"])),
        "correction": correction,
        "max_tokens": draw(st.integers(1, 14)),
        "temperature": draw(st.sampled_from([0.0, 0.0, 0.7, 1.3])),
        "top_p": draw(st.sampled_from([1.0, 0.8])),
        "seed": draw(st.integers(0, 1000)),
        "prompt": draw(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=4)),
        "peak": draw(st.sampled_from([2.0, 6.0, 12.0])),
        "eos_bonus": draw(st.sampled_from([-4.0, 0.0, 2.0])),
    }


def _split(case: dict[str, Any]) -> tuple[SamplingParams, dict[str, Any], Any]:
    sampling = SamplingParams(**{name: case[name] for name in ("max_tokens", "temperature", "top_p", "seed")})
    names = ("slot_size", "block_size", "slot_threshold", "token_threshold", "acceptance", "correction", "alternatives", "infill_length")
    slots = {name: case[name] for name in names}
    return sampling, slots, hashed_language(VOCAB, peak=case["peak"], eos_id=EOS, eos_bonus=case["eos_bonus"])


def _reference(case: dict[str, Any]) -> Reference:
    sampling, slots, script = _split(case)
    return Reference(
        script=script,
        prompt=case["prompt"],
        slot_size=case["slot_size"],
        slots_per_block=case["block_size"] // case["slot_size"],
        slot_threshold=slots["slot_threshold"],
        token_threshold=slots["token_threshold"],
        accept_argmax=slots["acceptance"] == "argmax",
        corrects=slots["correction"] == "autoregressive",
        alternatives=slots["alternatives"],
        infill_length=slots["infill_length"],
        max_tokens=sampling.max_tokens,
        mask_id=MASK,
        eos_ids=[EOS],
        banned=[MASK],
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    ).run()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_two_pass_decoding_is_the_algorithm_of_the_design(case: dict[str, Any]) -> None:
    reference = _reference(case)
    sampling, slots, script = _split(case)
    ((token_ids, num_forwards),) = decode(ScriptedForward(script, [MASK]), [case["prompt"]], SlotSettings(**slots, **TWO_PASS), sampling)
    assert token_ids == reference.token_ids
    assert num_forwards == reference.num_forwards


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.booleans(), st.sampled_from([None, 0, 1, 2]))
def test_fused_decoding_gives_the_tokens_of_the_design_in_no_more_forwards(
    case: dict[str, Any], fuse_plan: bool, max_candidates: int | None
) -> None:
    reference = _reference(case)
    sampling, slots, script = _split(case)
    fused = SlotSettings(**slots, fuse_plan=fuse_plan, max_candidates=max_candidates)
    ((token_ids, num_forwards),) = decode(ScriptedForward(script, [MASK]), [case["prompt"]], fused, sampling)
    assert token_ids == reference.token_ids
    assert num_forwards <= reference.num_forwards


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.lists(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=5), min_size=2, max_size=3), st.booleans())
def test_a_request_is_decoded_in_a_batch_as_it_is_alone(case: dict[str, Any], prompts: list[list[int]], compact: bool) -> None:
    sampling, slots, script = _split(case)
    together = decode(ScriptedForward(script, [MASK]), prompts, SlotSettings(**slots), sampling, compact=compact)
    alone = [decode(ScriptedForward(script, [MASK]), [prompt], SlotSettings(**slots), sampling)[0] for prompt in prompts]
    assert together == alone


# ---- answers written by hand: prompt [2], answer tokens at positions 1, 2, ... ----

PROMPT = [2]


def text_script(text: list[int], masked: dict[int, tuple[int, float]] | None = None) -> Any:
    """A network that knows `text`: every row is 0.95 sure of the token it has to predict.

    masked: position -> (token, probability) of what a mask token there predicts instead, as long as the token before it is not in view.
    """

    def script(row: Row) -> Tensor:
        if row.token != MASK:
            return certain({text[min(row.position, len(text) - 1)]: 0.95}, VOCAB)  # a clean row predicts the next token
        token, probability = text[row.position - 1], 0.95
        known = {place for place, seen in row.seen if seen != MASK}
        if masked and row.position in masked and row.position - 1 not in known:
            token, probability = masked[row.position]
        return certain({token: probability}, VOCAB)

    return script


def settings_of(slot_size: int, block_size: int, **more: Any) -> SlotSettings:
    rules: dict[str, Any] = {"acceptance": "paper", "correction": "paper"}
    return SlotSettings(slot_size=slot_size, block_size=block_size, slot_threshold=0.9, token_threshold=0.4, **(rules | more))


def one(script: Any, slots: SlotSettings, max_tokens: int) -> tuple[list[int], int, ScriptedForward]:
    forward = ScriptedForward(script, [MASK])
    ((token_ids, num_forwards),) = decode(forward, [PROMPT], slots, SamplingParams(max_tokens=max_tokens))
    return token_ids, num_forwards, forward


@pytest.mark.parametrize(("fusion", "num_forwards"), [(TWO_PASS, 4), ({}, 3)])
def test_a_sure_network_costs_a_plan_and_one_verification_a_block(fusion: dict[str, Any], num_forwards: int) -> None:
    # Two blocks: plan and verify each; fused, the plan of the second rides on the verification of the first.
    text = [3, 4, 5, 3, 4, 5]
    assert one(text_script(text), settings_of(2, 4, **fusion), 6)[:2] == (text, num_forwards)


@pytest.mark.parametrize(("fusion", "num_forwards"), [(TWO_PASS, 4), ({}, 3)])
def test_a_failed_slot_is_infilled_from_the_token_that_stands(fusion: dict[str, Any], num_forwards: int) -> None:
    # The plan drafts [3, 5]; 5 fails against 4, and with 3 in view the mask predicts 4.
    script = text_script([3, 4], masked={2: (5, 0.6)})
    assert one(script, settings_of(2, 2, **fusion), 2)[:2] == ([3, 4], num_forwards)


def test_infilled_slots_do_not_see_one_another() -> None:
    # Slot 0 drafts [3, 5, 5, 5] instead of [3, 4, 5, 3], so n = 1 < 4 and both slots are infilled.
    script = text_script([3, 4, 5, 3, 4, 5, 3, 4], masked={2: (5, 0.6), 3: (3, 0.6), 4: (4, 0.6)})
    token_ids, _, forward = one(script, settings_of(4, 8, **TWO_PASS), 8)
    assert token_ids == [3, 4, 5, 3, 4, 5, 3, 4]
    plan, verify, *infill = [forward[0] for forward in forward.forwards]
    for rows in (plan, verify):
        assert {position for position, _ in max(rows, key=lambda row: row.position).seen} == set(range(9))
    assert infill
    for row in (row for rows in infill for row in rows):
        own = range(1, 5) if row.position < 5 else range(5, 9)
        assert {position for position, _ in row.seen} <= {0, *own}


def test_slots_before_an_early_eos_are_still_written_and_those_behind_are_not() -> None:
    # Only slot 1 is sure at the first plan, and it ends the answer; slot 0 follows, slot 2 never.
    script = text_script([3, 4, 5, EOS, 3, 3], masked={1: (3, 0.5), 5: (3, 0.5)})

    def unsure_at_first(row: Row) -> Tensor:
        is_unsure = row.token == MASK and row.position in (1, 5) and (4, EOS) not in row.seen
        return certain({3: 0.5}, VOCAB) if is_unsure else script(row)

    for fusion in ({}, TWO_PASS):
        token_ids, _, forward = one(unsure_at_first, settings_of(2, 6, **fusion), 6)
        assert token_ids == [3, 4, 5, EOS]
        after_first_round = [row.position for forward in forward.forwards[2:] for row in forward[0] if row.token == MASK]
        assert all(position in (1, 2) for position in after_first_round)


def test_what_was_committed_behind_an_earlier_eos_is_dropped() -> None:
    def script(row: Row) -> Tensor:
        if row.token != MASK:
            return certain({{0: 3, 1: EOS, 3: 5}.get(row.position, 4): 0.95}, VOCAB)
        has_later_slot = (3, 4) in row.seen  # slot 1 is committed
        return certain({{1: 3, 2: EOS, 3: 4, 4: 5}[row.position]: 0.5 if row.position == 1 and not has_later_slot else 0.95}, VOCAB)

    for fusion in ({}, TWO_PASS):
        token_ids, _, forward = one(script, settings_of(2, 4, **fusion), 4)
        assert [row.token for row in forward.cache.rows[0]] == [2, 4, 5, 3, EOS]  # prompt, then commit order
        assert token_ids == [3, EOS]


def test_banned_tokens_are_never_written_however_probable() -> None:
    assert one(lambda row: certain({MASK: 0.9, 3: 0.06}, VOCAB), settings_of(2, 2), 4)[0] == [3, 3, 3, 3]


def test_the_answer_is_cut_where_max_tokens_ends_inside_a_slot() -> None:
    assert one(text_script([3, 4, 5, 3]), settings_of(4, 4), 3)[0] == [3, 4, 5]


def test_argmax_acceptance_lets_an_unsure_but_most_probable_draft_pass() -> None:
    def unsure(row: Row) -> Tensor:
        return certain({3: 0.3}, VOCAB)  # the other five share 0.7: 3 is most probable, yet below the token threshold

    paper = one(unsure, settings_of(4, 4), 4)
    argmax = one(unsure, SlotSettings(slot_size=4, slot_threshold=0.9, token_threshold=0.4, acceptance="argmax", correction="paper"), 4)
    assert paper[0] == argmax[0] == [3, 3, 3, 3]
    assert (paper[1], argmax[1]) == (5, 2)


def test_autoregressive_correction_takes_the_token_that_the_judging_row_predicts() -> None:
    # The masks insist on 5 at the second token until it stands; the clean row before it says 4.
    def stubborn(row: Row) -> Tensor:
        if row.token != MASK:
            return certain({{1: 4, 2: 5}.get(row.position, 3): 0.95}, VOCAB)
        return certain({{1: 3, 2: 5, 3: 5}[row.position]: 0.95}, VOCAB)

    for fusion in ({}, TWO_PASS):
        assert one(stubborn, settings_of(3, 3, **fusion), 3)[0] == [3, 5, 5]
        assert one(stubborn, settings_of(3, 3, correction="autoregressive", **fusion), 3)[0] == [3, 4, 5]


def test_threshold_is_exclusive() -> None:
    # Probability 1 does not exceed a threshold of 1: no slot is chosen by score and no draft passes by it.
    script = text_script([3, 4, 5, 3])
    strict = SlotSettings(
        slot_size=2, block_size=4, slot_threshold=1.0, token_threshold=1.0, acceptance="paper", correction="paper", **TWO_PASS
    )
    token_ids, num_forwards, _ = one(script, strict, 4)
    assert token_ids == [3, 4, 5, 3]
    assert num_forwards == 2 * (2 + 2)  # one slot a round, each infilled


def test_slots_of_one_token_need_no_row_in_the_last_verification(golden_model: Transformer) -> None:
    slots = SlotSettings(slot_size=1, fuse_plan=False)
    decoder = ReFusionDecoder(
        forward_of(golden_model), slots, SamplingParams(max_tokens=3), mask_id=MASK_ID, eos_ids=torch.zeros(0, dtype=torch.long)
    )
    decoder.start(torch.tensor([[3, 4]]), torch.tensor([2]), torch.zeros(1, dtype=torch.long))
    while not decoder.is_done.all():
        decoder.step()
    assert len(decoder.answer(0)) == 3
    assert int(decoder.num_forwards[0]) == 6
