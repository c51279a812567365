"""Variants of the decoder for ablations: what is cached after a recompute, and how slots are scored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import Row, ScriptedForward, certain, hashed_language
from torch import Tensor

from refusion.decoding.decisions import slot_scores
from refusion.decoding.forward import EagerForward
from refusion.decoding.params import SamplingParams, SlotSettings
from refusion.decoding.refusion import ReFusionDecoder
from refusion.decoding.variants import EntropyForward, RecomputingDecoder, ScoringDecoder
from refusion.model.transformer import Transformer

MASK, EOS, VOCAB = 1, 0, 6
TWO_PASS = {"fuse_plan": False, "max_candidates": 0}


def run(decoder: ReFusionDecoder, prompts: list[list[int]]) -> list[tuple[list[int], int]]:
    """(answer, forwards) of every prompt."""
    longest = max(map(len, prompts))
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    decoder.start(padded, torch.tensor([len(prompt) for prompt in prompts]), torch.zeros(len(prompts), dtype=torch.long))
    for _ in range(300):
        decoder.step()
        if bool(decoder.is_done.all()):
            return [(decoder.answer(row), int(decoder.num_forwards[row])) for row in range(len(prompts))]
    raise AssertionError("decoding does not end")


def made(kind: type[ReFusionDecoder], forward: Any, slots: SlotSettings, max_tokens: int, **more: Any) -> Any:
    return kind(forward, slots, SamplingParams(max_tokens=max_tokens), mask_id=MASK, eos_ids=torch.tensor([EOS]), **more)


languages = st.builds(
    lambda peak, bonus: hashed_language(VOCAB, peak=peak, eos_id=EOS, eos_bonus=bonus), st.floats(2, 12), st.floats(-4, 2)
)
slots_of = st.builds(
    lambda size, width, slot, token, correction: SlotSettings(
        slot_size=size, block_size=size * width, slot_threshold=slot, token_threshold=token, correction=correction, **TWO_PASS
    ),
    st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from([0.2, 0.8, 1.0]),
    st.sampled_from(["paper", "autoregressive"]),
)  # fmt: skip
prompts_of = st.lists(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=4), min_size=1, max_size=2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(languages, slots_of, prompts_of, st.integers(1, 14))
def test_after_a_recompute_every_cached_token_has_seen_all_before_it(
    script: Any, slots: SlotSettings, prompts: list[list[int]], max_tokens: int
) -> None:
    forward = ScriptedForward(script, [MASK])
    run(made(RecomputingDecoder, forward, slots, max_tokens), prompts)
    for rows in forward.cache.rows:
        for place, row in enumerate(rows):
            assert row == Row.of(row.token, row.position, rows[:place])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(languages, slots_of, prompts_of, st.integers(1, 14))
def test_slots_without_siblings_need_no_recompute(script: Any, slots: SlotSettings, prompts: list[list[int]], max_tokens: int) -> None:
    alone = SlotSettings(slot_size=slots.slot_size, slot_threshold=0.9, token_threshold=slots.token_threshold, **TWO_PASS)
    plain = run(made(ReFusionDecoder, ScriptedForward(script, [MASK]), alone, max_tokens), prompts)
    assert run(made(RecomputingDecoder, ScriptedForward(script, [MASK]), alone, max_tokens), prompts) == plain


def test_the_plain_decoder_caches_infilled_siblings_that_have_not_seen_one_another() -> None:
    slots = SlotSettings(slot_size=2, block_size=4, slot_threshold=0.0, token_threshold=1.0, acceptance="paper", **TWO_PASS)
    script = hashed_language(VOCAB, peak=4.0, eos_id=EOS, eos_bonus=-100.0)
    seen = {}
    for kind in (ReFusionDecoder, RecomputingDecoder):
        forward = ScriptedForward(script, [MASK])
        decoder = made(kind, forward, slots, 4)
        run(decoder, [[2]])
        first, second = forward.cache.rows[0][1:3], forward.cache.rows[0][3:5]
        assert [row.position for row in (*first, *second)] == [1, 2, 3, 4]
        seen[kind] = {position for position, _ in second[-1].seen}
    assert seen == {ReFusionDecoder: {0, 3, 4}, RecomputingDecoder: {0, 1, 2, 3, 4}}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(languages, slots_of, prompts_of, st.integers(1, 14), st.booleans())
def test_scoring_by_the_first_token_is_the_decoder_itself(
    script: Any, slots: SlotSettings, prompts: list[list[int]], max_tokens: int, is_fused: bool
) -> None:
    if is_fused:
        slots = SlotSettings(slot_size=slots.slot_size, block_size=slots.block_size, slot_threshold=slots.slot_threshold)
    plain = run(made(ReFusionDecoder, ScriptedForward(script, [MASK]), slots, max_tokens), prompts)
    assert run(made(ScoringDecoder, ScriptedForward(script, [MASK]), slots, max_tokens, score="first"), prompts) == plain


def test_scoring_by_the_mean_may_choose_another_slot() -> None:
    # The first slot begins surely and goes on unsurely, the second the other way round; only one can be chosen at this threshold.
    sure = {1: 0.9, 2: 0.2, 3: 0.6, 4: 0.8}

    def script(row: Row) -> Tensor:
        return certain({3: sure.get(row.position, 0.9)}, VOCAB)

    slots = SlotSettings(slot_size=2, block_size=4, slot_threshold=0.95, token_threshold=0.0, **TWO_PASS)
    order = {}
    for score in ("first", "mean"):
        forward = ScriptedForward(script, [MASK])
        run(made(ScoringDecoder, forward, slots, 4, score=score), [[2]])
        order[score] = [row.position for row in forward.cache.rows[0][1:]]
    assert order == {"first": [1, 2, 3, 4], "mean": [3, 4, 1, 2]}


def test_slot_scores_of_a_worked_example() -> None:
    certainty = torch.tensor([[[0.9, 0.3], [0.5, 0.7]]])
    assert slot_scores(certainty).tolist() == [[pytest.approx(0.9), 0.5]]
    assert slot_scores(certainty, "mean").tolist() == [[pytest.approx(0.6), pytest.approx(0.6)]]


def test_certainty_is_one_over_the_number_of_equally_likely_tokens(tiny_checkpoints: dict[str, Path]) -> None:
    """exp(-entropy) of n equally likely tokens is 1/n; of a trained row it is what the definition gives."""
    model = Transformer.from_pretrained(tiny_checkpoints["qwen3"], device="cpu", dtype=torch.float32)
    banned = torch.tensor([5, 7])
    batch, decoder = _one_batch(model, banned)
    readout = EntropyForward(model, banned)(batch, decoder.forward.new_cache(1, 32))
    hidden = model.forward(batch.token_ids, batch.positions, batch.segments, model.new_cache(1, 32))
    log_probs = model.lm_head(hidden[0]).float().index_fill(1, banned, -math.inf).log_softmax(-1)
    entropy = torch.special.entr(log_probs.exp()).sum(-1)
    assert torch.allclose(readout.confidence[0], (-entropy).exp(), atol=1e-5)
    assert torch.equal(readout.token_ids, EagerForward(model, banned)(batch, model.new_cache(1, 32)).token_ids)

    model.lm_head.weight.data.zero_()
    assert torch.allclose(EntropyForward(model, banned)(batch, model.new_cache(1, 32)).confidence[0], torch.tensor(1 / 94))


def _one_batch(model: Transformer, banned: Tensor) -> tuple[Any, Any]:
    from refusion.decoding.forward import ForwardBatch
    from refusion.decoding.sampling import Draw
    from refusion.model.segments import Segments

    token_ids = torch.tensor([[3, 8, 9, 4]])
    nothing = torch.zeros_like(token_ids)
    draw = Draw(0.0, 1.0, torch.tensor([0]), torch.tensor([1]))
    batch = ForwardBatch(token_ids, torch.arange(4)[None], Segments.causal(token_ids > 0), token_ids > 0, nothing, draw)
    return batch, made(ReFusionDecoder, EagerForward(model, banned), SlotSettings(), 4)
