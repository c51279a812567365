"""The decoder against traces of the authors' release (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_traces import EOS_ID, MASK_ID, TWO_PASS, Trace, decode_traces, forward_of, read_traces, shape

from refusion.decoding.params import SamplingParams, SlotParams
from refusion.decoding.refusion import ReFusionDecoder
from refusion.model.transformer import Transformer

FILES = ("decode.json", "decode_infill.json")
# The release may emit the mask token, so its probabilities were taken without any ban.
NOTHING_BANNED: tuple[int, ...] = ()


@pytest.fixture(scope="module", params=FILES)
def traces(request: pytest.FixtureRequest, golden_dir: Path) -> list[Trace]:
    return read_traces(golden_dir / request.param)


def test_two_pass_decoding_reproduces_tokens_and_forwards_of_every_trace(golden_model: Transformer, traces: list[Trace]) -> None:
    decoded = decode_traces(forward_of(golden_model, NOTHING_BANNED), traces, **TWO_PASS)
    assert [answer.token_ids for answer in decoded] == [trace["output_ids"] for trace in traces]
    assert [answer.num_forwards for answer in decoded] == [trace["forwards"] for trace in traces]
    _check_plan_confidences(decoded, traces)


def test_fused_decoding_gives_the_same_tokens_in_fewer_forwards(golden_model: Transformer, traces: list[Trace]) -> None:
    decoded = decode_traces(forward_of(golden_model, NOTHING_BANNED), traces)
    assert [answer.token_ids for answer in decoded] == [trace["output_ids"] for trace in traces]
    assert all(answer.num_forwards <= trace["forwards"] for answer, trace in zip(decoded, traces, strict=True))
    two_pass, fused = sum(trace["forwards"] for trace in traces), sum(answer.num_forwards for answer in decoded)
    assert (two_pass, fused) == ((2358, 1296) if "plan_confidences" in traces[0] else (300, 233))
    _check_plan_confidences(decoded, traces)


@pytest.mark.parametrize("settings", [{"fuse_plan": False}, {"max_candidates": 0}, {"max_candidates": 1}], ids=str)
def test_partly_fused_decoding_gives_the_same_tokens(golden_model: Transformer, golden_dir: Path, settings: dict[str, int]) -> None:
    # Two shapes, so that they make two batches.
    traces = [trace for trace in read_traces(golden_dir / "decode_infill.json") if shape(trace) == (32, 8, 4)]
    traces += [trace for trace in read_traces(golden_dir / "decode.json") if shape(trace) == (128, 16, 8)]
    assert len(traces) > 20
    decoded = decode_traces(forward_of(golden_model, NOTHING_BANNED), traces, **settings)
    assert [answer.token_ids for answer in decoded] == [trace["output_ids"] for trace in traces]
    assert all(answer.num_forwards <= trace["forwards"] for answer, trace in zip(decoded, traces, strict=True))


def test_banned_mask_token_and_capped_candidates_leave_clean_traces_as_they_are(golden_model: Transformer, traces: list[Trace]) -> None:
    decoded = decode_traces(forward_of(golden_model, [MASK_ID]), traces, max_candidates=3)
    assert [answer.token_ids for answer in decoded] == [trace["output_ids"] for trace in traces]


@pytest.mark.parametrize("settings", [{}, TWO_PASS], ids=["fused", "two-pass"])
def test_faulty_traces_come_out_well_formed(golden_model: Transformer, golden_dir: Path, settings: dict[str, int]) -> None:
    traces = read_traces(golden_dir / "decode.json", clean=False)
    assert traces
    for answer, trace in zip(decode_traces(forward_of(golden_model, [MASK_ID]), traces, **settings), traces, strict=True):
        assert MASK_ID not in answer.token_ids
        assert EOS_ID not in answer.token_ids[:-1]
        # `answer` stops at a gap, so an answer that ends in EOS or fills its length has none.
        assert answer.token_ids[-1] == EOS_ID or len(answer.token_ids) == trace["gen_length"]


@pytest.mark.parametrize("settings", [{}, TWO_PASS], ids=["fused", "two-pass"])
def test_a_trace_decoded_alone_is_the_same(golden_model: Transformer, golden_dir: Path, settings: dict[str, int]) -> None:
    import torch

    for trace in read_traces(golden_dir / "decode_infill.json")[::10] + read_traces(golden_dir / "decode.json")[::10]:
        names = ("slot_size", "serial_blocks", "slot_threshold", "token_threshold")
        slots = SlotParams(**{name: trace[name] for name in names}, acceptance="paper", correction="paper", **settings).resolve({})
        decoder = ReFusionDecoder(
            forward_of(golden_model), slots, SamplingParams(max_tokens=trace["gen_length"]), mask_id=MASK_ID, eos_ids=torch.tensor([EOS_ID])
        )
        decoder.start(torch.tensor([trace["prompt_ids"]]), torch.tensor([len(trace["prompt_ids"])]), torch.zeros(1, dtype=torch.long))
        while not decoder.is_done.all():
            decoder.step()
        assert decoder.answer(0) == trace["output_ids"]
        if settings == TWO_PASS:
            assert int(decoder.num_forwards[0]) == trace["forwards"]


def _check_plan_confidences(decoded: list, traces: list[Trace]) -> None:
    """Every plan scores the open slots as the release did; the traces hold 4 decimals of float32, hence 2e-4."""
    for answer, trace in zip(decoded, traces, strict=True):
        if "plan_confidences" in trace:
            assert len(answer.plan_confidences) == len(trace["plan_confidences"])
            for ours, theirs in zip(answer.plan_confidences, trace["plan_confidences"], strict=True):
                assert ours == pytest.approx(theirs, abs=2e-4)
