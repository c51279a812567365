"""The diffusion baselines: small cases worked out by hand, and rounds on the device against the plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flat import NetworkRows
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Row, certain, hashed_language
from shallow import DiffusionServer, Request, ShallowForward, ShallowRows
from torch import Tensor

from refusion.decoding.diffusion import Trace, decode
from refusion.decoding.diffusion_params import BlockDiffusionParams, DiffusionParams, MaskedDiffusionParams
from refusion.decoding.diffusion_rounds import DiffusionRounds
from refusion.decoding.forward import EagerForward
from refusion.decoding.params import SamplingParams
from refusion.model.transformer import Transformer
from refusion.training.layouts import block_diffusion_row, masked_diffusion_row

MASK, EOS, VOCAB = 1, 0, 12


def rounds_of(params: DiffusionParams, num_seats: int, *, prefill_rows: int = 8, use_kernels: bool = False) -> DiffusionRounds:
    block_size = params.size if isinstance(params, BlockDiffusionParams) else min(params.block_size, 24)
    return DiffusionRounds(
        params,
        12 + -(-24 // block_size) * block_size,
        num_seats,
        block_size=block_size,
        prefill_rows=prefill_rows,
        mask_id=MASK,
        eos_ids=torch.tensor([EOS]),
        device=torch.device("cpu"),
        use_kernels=use_kernels,
        max_rows=512,
    )


def written(script: Any, prompt: list[int], params: DiffusionParams, max_tokens: int) -> Trace:
    """What the plain loops and the rounds both do."""
    trace = decode(
        ShallowForward(script, banned=[MASK]), prompt, params, SamplingParams(max_tokens=max_tokens), mask_id=MASK, eos_ids=[EOS]
    )
    rounds = rounds_of(params, 1)
    request = Request(prompt, max_tokens)
    DiffusionServer(rounds, ShallowRows(script, 200), num_seats=1, banned=[MASK]).serve([request])
    assert (request.text([EOS]), request.commits, request.num_forwards) == (trace.token_ids, trace.commits, trace.num_forwards)
    return trace


def by_position(predictions: dict[int, tuple[int, float]]) -> Any:
    """A network that predicts, at each position, one token with one probability, whatever it sees."""

    def script(row: Row) -> Tensor:
        token, probability = predictions.get(row.position, (11, 0.5))
        return certain({token: probability}, VOCAB)

    return script


# Two prompt tokens; position -> (token, probability) of six answer tokens.
SIX = by_position({2: (5, 0.3), 3: (6, 0.9), 4: (7, 0.6), 5: (8, 0.8), 6: (9, 0.4), 7: (10, 0.95)})


# ---- masked diffusion, by hand ----


def test_a_step_commits_the_most_confident_predictions_and_the_first_steps_take_the_remainder() -> None:
    # Six masks in four steps: 2, 2, 1, 1. The best two are places 5 (0.95) and 1 (0.9), then 3 and 2, then 4, then 0.
    trace = written(SIX, [2, 3], MaskedDiffusionParams(block_size=6, steps=4), 6)
    assert trace.commits == [{1: 6, 5: 10}, {2: 7, 3: 8}, {4: 9}, {0: 5}]
    assert trace.token_ids == [5, 6, 7, 8, 9, 10]


def test_blocks_are_finished_one_after_the_other() -> None:
    # Blocks of four in two steps; the second block is short, its two masks are shared out like any others.
    trace = written(SIX, [2, 3], MaskedDiffusionParams(block_size=4, steps=2), 6)
    assert trace.commits == [{1: 6, 3: 8}, {0: 5, 2: 7}, {5: 10}, {4: 9}]


def test_without_steps_a_forward_commits_one_token() -> None:
    trace = written(SIX, [2, 3], MaskedDiffusionParams(block_size=3), 6)
    assert trace.commits == [{1: 6}, {2: 7}, {0: 5}, {5: 10}, {3: 8}, {4: 9}]
    assert trace.num_forwards == 6


def test_a_threshold_commits_all_above_it_and_at_least_the_best() -> None:
    trace = written(SIX, [2, 3], MaskedDiffusionParams(block_size=6, threshold=0.7), 6)
    assert trace.commits == [{1: 6, 3: 8, 5: 10}, {2: 7}, {4: 9}, {0: 5}]


def test_equal_confidence_goes_to_the_first() -> None:
    flat = by_position(dict.fromkeys(range(2, 8), (5, 0.5)))
    trace = written(flat, [2, 3], MaskedDiffusionParams(block_size=6, steps=3), 6)
    assert trace.commits == [{0: 5, 1: 5}, {2: 5, 3: 5}, {4: 5, 5: 5}]


def test_what_is_not_committed_is_a_mask_again_and_predicted_anew() -> None:
    def script(row: Row) -> Tensor:
        # Place 0 changes its mind once place 1 stands beside it: bidirectional attention.
        if row.position == 2:
            return certain({7: 0.6} if (3, 6) in row.seen else {5: 0.6}, VOCAB)
        return certain({6: 0.9}, VOCAB)

    assert written(script, [2, 3], MaskedDiffusionParams(block_size=2), 2).token_ids == [7, 6]


def test_every_row_sees_the_whole_text_prompt_rows_too() -> None:
    forward = ShallowForward(SIX, banned=[MASK])
    decode(forward, [2, 3], MaskedDiffusionParams(block_size=3), SamplingParams(max_tokens=6), mask_id=MASK, eos_ids=[EOS])
    assert [len(rows) for (rows,) in forward.forwards] == [8] * 6
    assert all({position for position, _ in row.seen} == set(range(8)) for (rows,) in forward.forwards for row in rows)


def test_the_answer_is_cut_at_the_first_eos_in_text_order_but_written_whole() -> None:
    ends = by_position({2: (5, 0.5), 3: (EOS, 0.6), 4: (7, 0.9), 5: (EOS, 0.95)})
    trace = written(ends, [2, 3], MaskedDiffusionParams(block_size=2), 4)
    assert trace.token_ids == [5, EOS]
    assert trace.num_forwards == 4  # tokens per forward: 2 / 4
    assert trace.commits == [{1: EOS}, {0: 5}, {3: EOS}, {2: 7}]


def test_early_stop_waits_for_all_before_the_eos() -> None:
    ends = by_position({2: (5, 0.5), 3: (EOS, 0.6), 4: (7, 0.4), 5: (EOS, 0.95)})
    trace = written(ends, [2, 3], MaskedDiffusionParams(block_size=4, early_stop=True), 4)
    assert trace.commits == [{3: EOS}, {1: EOS}, {0: 5}]  # place 2 is never written: the text ends before it
    assert trace.token_ids == [5, EOS]


def test_banned_tokens_are_never_predicted_and_take_no_probability() -> None:
    def script(row: Row) -> Tensor:
        return certain({MASK: 0.9, 5: 0.06}, VOCAB) if row.position == 2 else certain({6: 0.5}, VOCAB)

    # Without the mask, token 5 has 0.06 / 0.1 = 0.6 and goes first.
    assert written(script, [3, 3], MaskedDiffusionParams(block_size=2), 2).commits == [{0: 5}, {1: 6}]


# ---- caches of masked diffusion, by hand ----


@pytest.mark.parametrize(("cache", "sizes"), [("prefix", [6, 4, 6, 2]), ("dual", [6, 2, 6, 2])])
def test_a_block_begins_with_a_whole_forward_and_goes_on_over_the_cache(cache: Any, sizes: list[int]) -> None:
    four = by_position({2: (5, 0.3), 3: (6, 0.9), 4: (7, 0.6), 5: (8, 0.8)})
    forward = ShallowForward(four, banned=[MASK])
    params = MaskedDiffusionParams(block_size=2, cache=cache)
    trace = decode(forward, [2, 3], params, SamplingParams(max_tokens=4), mask_id=MASK, eos_ids=[EOS])
    assert [len(rows) for (rows,) in forward.forwards] == sizes
    assert trace.commits == written(four, [2, 3], params, 4).commits == [{1: 6}, {0: 5}, {3: 8}, {2: 7}]
    # What is cached is as it was at the beginning of the block: the second forward sees place 1 as written only in its own rows.
    assert [row.position for row in forward.forwards[1][0]] == ([2, 3, 4, 5] if cache == "prefix" else [2, 3])
    assert (3, 6) in forward.forwards[1][0][0].seen


# ---- block diffusion, by hand ----


def test_a_block_is_cached_in_the_forward_that_begins_the_next() -> None:
    forward = ShallowForward(SIX, banned=[MASK])
    params = BlockDiffusionParams(block_size=3, threshold=0.7)
    trace = decode(forward, [2, 3], params, SamplingParams(max_tokens=6), mask_id=MASK, eos_ids=[EOS])
    assert trace.commits == written(SIX, [2, 3], params, 6).commits == [{1: 6}, {2: 7}, {0: 5}, {3: 8, 5: 10}, {4: 9}]
    positions = [[row.position for row in rows] for (rows,) in forward.forwards]
    assert positions == [[0, 1, 2, 3, 4], [2, 3, 4], [2, 3, 4], [2, 3, 4, 5, 6, 7], [5, 6, 7]]
    assert trace.num_forwards == 5


def test_unfused_it_takes_a_forward_of_its_own() -> None:
    params = BlockDiffusionParams(block_size=3, threshold=0.7, fuse_commit=False)
    trace = written(SIX, [2, 3], params, 6)
    assert trace.commits == [{1: 6}, {2: 7}, {0: 5}, {}, {3: 8, 5: 10}, {4: 9}]
    assert trace.num_forwards == 6  # that which only prefills does not count


def test_a_row_sees_its_block_and_those_before_it_prompt_blocks_too() -> None:
    forward = ShallowForward(SIX, banned=[MASK])
    params = BlockDiffusionParams(block_size=2, threshold=0.0)
    decode(forward, [2, 3, 4], params, SamplingParams(max_tokens=4), mask_id=MASK, eos_ids=[EOS])
    seen = {row.position: {position for position, _ in row.seen} for (rows,) in forward.forwards for row in rows}
    # The prompt is cut into [0, 1] and [2]; the answer begins a block of its own.
    assert seen == {0: {0, 1}, 1: {0, 1}, 2: {0, 1, 2}, 3: {0, 1, 2, 3, 4}, 4: {0, 1, 2, 3, 4}, 5: set(range(7)), 6: set(range(7))}


def test_block_diffusion_ends_with_the_first_eos_in_text_order() -> None:
    ends = by_position({2: (5, 0.95), 3: (6, 0.95), 4: (7, 0.3), 5: (EOS, 0.6), 6: (EOS, 0.95), 7: (9, 0.2)})
    trace = written(ends, [2, 3], BlockDiffusionParams(block_size=2, threshold=0.5), 6)
    assert trace.token_ids == [5, 6, 7, EOS]
    assert trace.commits == [{0: 5, 1: 6}, {3: EOS}, {2: 7}]


def test_an_eos_ends_its_block_as_soon_as_all_before_it_stands() -> None:
    ends = by_position({2: (EOS, 0.8), 3: (6, 0.3), 4: (7, 0.2)})
    assert written(ends, [2, 3], BlockDiffusionParams(block_size=3, threshold=0.9), 6).commits == [{0: EOS}]


def test_blocks_are_written_whole_and_cut_to_max_tokens() -> None:
    trace = written(SIX, [2, 3], BlockDiffusionParams(block_size=4, threshold=0.0), 5)
    assert trace.token_ids == [5, 6, 7, 8, 9]
    assert trace.commits[1] == {4: 9, 5: 10, 6: 11, 7: 11}


# ---- rounds against the plain loops ----


@st.composite
def params(draw: st.DrawFn) -> DiffusionParams:
    size = draw(st.integers(1, 7))
    by_steps = draw(st.booleans())
    pace = {"steps": draw(st.integers(1, size))} if by_steps else {"threshold": draw(st.sampled_from([0.0, 0.2, 0.4, 0.9]))}
    if draw(st.booleans()):
        return BlockDiffusionParams(block_size=size, fuse_commit=draw(st.booleans()), **pace)
    return MaskedDiffusionParams(
        block_size=draw(st.sampled_from([size, 30])) if not by_steps else size,
        cache=draw(st.sampled_from(["none", "prefix", "dual"])),
        early_stop=draw(st.booleans()),
        **pace,
    )


@settings(max_examples=120, deadline=None)
@given(
    params(),
    st.lists(
        st.tuples(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=5
    ),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 3),
)
def test_rounds_write_what_the_plain_loops_write(
    params: DiffusionParams, prompts: list[tuple[list[int], int, int]], num_seats: int, temperature: float, eos_bonus: int
) -> None:
    script = hashed_language(VOCAB, eos_id=EOS, eos_bonus=float(eos_bonus))
    requests = [Request(prompt, max_tokens, seed=index, arrival=arrival) for index, (prompt, max_tokens, arrival) in enumerate(prompts)]
    requests.sort(key=lambda request: request.arrival)
    rounds = rounds_of(params, num_seats, prefill_rows=5)
    server = DiffusionServer(rounds, ShallowRows(script, 400), num_seats=num_seats, banned=[MASK], temperature=temperature, tile=4)
    server.serve(requests)
    for request in requests:
        sampling = SamplingParams(max_tokens=request.max_tokens, temperature=temperature, seed=request.seed)
        trace = decode(ShallowForward(script, banned=[MASK]), request.prompt, params, sampling, mask_id=MASK, eos_ids=[EOS])
        assert request.text([EOS]) == trace.token_ids
        assert request.num_forwards == trace.num_forwards
        assert request.commits == trace.commits


def test_fused_and_unfused_write_the_same() -> None:
    script = hashed_language(VOCAB, eos_id=EOS, eos_bonus=-1.0)
    for seed in range(20):
        fused, unfused = (
            decode(
                ShallowForward(script, banned=[MASK]),
                [2, 3, 4, 5],
                BlockDiffusionParams(block_size=3, threshold=0.3, fuse_commit=is_fused),
                SamplingParams(max_tokens=18, temperature=1.0, seed=seed),
                mask_id=MASK,
                eos_ids=[EOS],
            )
            for is_fused in (True, False)
        )
        assert fused.token_ids == unfused.token_ids
        assert [commit for commit in unfused.commits if commit] == fused.commits
        assert unfused.num_forwards == fused.num_forwards + unfused.commits.count({})


def test_seats_are_moved_saved_and_restored() -> None:
    script = hashed_language(VOCAB, eos_id=EOS, eos_bonus=-2.0)
    for params in (BlockDiffusionParams(block_size=3, threshold=0.3), MaskedDiffusionParams(block_size=4, cache="dual")):
        request = Request([2, 3, 4], 17)
        server = DiffusionServer(rounds_of(params, 3), ShallowRows(script, 400), num_seats=3, banned=[MASK])
        server._admit(0, request)
        for step in range(200):
            if request not in server.seats:
                break
            server.step()
            place = server.seats.index(request) if request in server.seats else 0
            if step % 3 == 0 and request in server.seats:
                server.move(place, (place + 1) % 3)
            elif step % 3 == 1 and request in server.seats:
                saved = server.rounds.snapshot(place)
                server.rounds.retire(place)
                server.rounds.restore(place, saved)
        plain = decode(ShallowForward(script, banned=[MASK]), [2, 3, 4], params, SamplingParams(max_tokens=17), mask_id=MASK, eos_ids=[EOS])
        assert (request.text([EOS]), request.num_forwards) == (plain.token_ids, plain.num_forwards)


# ---- decoding runs the forwards of training ----


@pytest.mark.parametrize("num_prompt", [1, 4, 6, 11])
@pytest.mark.parametrize("is_fused", [True, False])
def test_logits_of_block_diffusion_are_those_of_its_training_layout(golden_model: Transformer, num_prompt: int, is_fused: bool) -> None:
    prompt = [10 + place for place in range(num_prompt)]
    block_size, mask_id = 4, 5
    params = BlockDiffusionParams(block_size=block_size, steps=2, fuse_commit=is_fused)
    rounds = DiffusionRounds(
        params, 12 + 24, 1, block_size=block_size, prefill_rows=4, mask_id=mask_id, eos_ids=torch.tensor([2]),
        device=torch.device("cpu"), use_kernels=False, max_rows=64,
    )  # fmt: skip
    server = DiffusionServer(rounds, NetworkRows(golden_model, 64), num_seats=1, banned=[mask_id])
    request = Request(prompt, 12)
    server._admit(0, request)
    num_checked = 0
    while request in server.seats:
        before = dict(request.answer)
        server.step()
        new = request.answer.keys() - before.keys()
        if not new:
            continue
        first = min(new) // block_size * block_size
        block = [before.get(place, mask_id) for place in range(first, first + block_size)]
        expected = _trained(golden_model, prompt, [before[place] for place in range(first)], block, block_size, mask_id)
        torch.testing.assert_close(server.logits[-1], expected, rtol=0, atol=2e-4)
        num_checked += 1
    assert num_checked == 6


def _trained(model: Transformer, prompt: list[int], clean: list[int], block: list[int], block_size: int, mask_id: int) -> Tensor:
    """Logits [K, V] of the last noisy block of a training row."""
    import numpy as np

    answer = np.array([*clean, *block])
    row = block_diffusion_row(np.array(prompt), answer, mask_token_id=mask_id, generator=np.random.default_rng(0), block_size=block_size)
    input_ids = row.input_ids.copy()
    input_ids[-len(block) :] = block  # this noise instead of the drawn one
    return _with_mask(model, input_ids.tolist(), row.position_ids.tolist(), row)[-len(block) :]


def _with_mask(model: Transformer, input_ids: list[int], positions: list[int], row: Any) -> Tensor:
    """Logits [T, V] of transformers' own class, under the visibility of a training row."""
    from transformers import AutoModelForCausalLM

    from refusion.training.attention import dense_mask

    reference = AutoModelForCausalLM.from_pretrained(model_dir(model), dtype=torch.float32)
    start = torch.zeros(1, len(input_ids), dtype=torch.long)
    mask = dense_mask(start, torch.tensor(row.visible)[None], torch.tensor(row.group)[None], torch.float32)
    with torch.no_grad():
        out = reference(input_ids=torch.tensor([input_ids]), position_ids=torch.tensor([positions]), attention_mask=mask, use_cache=False)
    return out.logits[0]


def model_dir(model: Transformer) -> Any:
    from pathlib import Path

    return Path(__file__).resolve().parent.parent / "golden" / "tiny-refusion"


def test_logits_of_masked_diffusion_are_those_of_its_training_layout(golden_model: Transformer) -> None:
    import numpy as np

    prompt, mask_id = [10, 11, 12], 5
    params = MaskedDiffusionParams(block_size=4, steps=2)
    rounds = DiffusionRounds(
        params, 3 + 8, 1, block_size=4, prefill_rows=4, mask_id=mask_id, eos_ids=torch.tensor([2]),
        device=torch.device("cpu"), use_kernels=False, max_rows=64,
    )  # fmt: skip
    server = DiffusionServer(rounds, NetworkRows(golden_model, 64), num_seats=1, banned=[mask_id])
    request = Request(prompt, 8)
    server._admit(0, request)
    while request in server.seats:
        text = [request.answer.get(place, mask_id) for place in range(8)]
        server.step()
        row = masked_diffusion_row(np.array(prompt), np.array(text), mask_token_id=mask_id, generator=np.random.default_rng(0))
        expected = _with_mask(golden_model, [*prompt, *text], row.position_ids.tolist(), row)
        first = 3 if mask_id in text[:4] else 7
        torch.testing.assert_close(server.logits[-1], expected[first : first + 4], rtol=0, atol=2e-4)
    assert request.num_forwards == 4


def test_a_transformer_answers_alike_in_both_forms(golden_model: Transformer) -> None:
    forward = EagerForward(golden_model, torch.tensor([MASK]))
    prompts = [[10, 11, 12], [13], [14, 15, 16, 17, 18]]
    for params in (MaskedDiffusionParams(block_size=5, steps=3, cache="prefix"), BlockDiffusionParams(block_size=4, threshold=0.05)):
        requests = [Request(prompt, 10, arrival=index) for index, prompt in enumerate(prompts)]
        server = DiffusionServer(rounds_of(params, 2), NetworkRows(golden_model, 200), num_seats=2, banned=[MASK])
        server.serve(requests)
        for request in requests:
            trace = decode(forward, request.prompt, params, SamplingParams(max_tokens=10), mask_id=MASK, eos_ids=[EOS])
            assert (request.text([EOS]), request.commits) == (trace.token_ids, trace.commits)
