"""An eager `transformers` model as a second network behind the same decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_traces import TWO_PASS, decode_traces, forward_of, read_traces, shape
from transformers import AutoModelForCausalLM

from refusion.decoding.autoregressive import AutoregressiveDecoder
from refusion.decoding.refusion import ReFusionDecoder
from refusion.decoding.transformers_network import TransformersNetwork
from refusion.llm import LLM, SamplingParams, SlotParams
from refusion.model.config import ModelConfig
from refusion.model.segments import Segments
from refusion.model.transformer import Transformer


def network_of(path: Path, attention: str = "sdpa") -> TransformersNetwork:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    return TransformersNetwork(model, ModelConfig.from_pretrained(path))


@pytest.mark.parametrize("settings", [{}, TWO_PASS], ids=["fused", "two-pass"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden_traces_come_out_of_a_transformers_model(golden_dir: Path, settings: dict[str, int], attention: str) -> None:
    traces = [trace for trace in read_traces(golden_dir / "decode_infill.json") if shape(trace) in ((32, 8, 4), (64, 4, 4))]
    decoded = decode_traces(forward_of(network_of(golden_dir / "tiny-refusion", attention)), traces, **settings)
    assert [answer.token_ids for answer in decoded] == [trace["output_ids"] for trace in traces]
    if settings == TWO_PASS:
        assert [answer.num_forwards for answer in decoded] == [trace["forwards"] for trace in traces]


@pytest.mark.parametrize("kind", ["qwen3", "llama3"])
def test_hidden_states_equal_ours_behind_a_cache_of_uneven_lengths(tiny_checkpoints: dict[str, Path], kind: str) -> None:
    """Permuted positions among the new tokens look like packed sequences to `transformers`; the explicit mask overrules that."""
    ours, theirs = Transformer.from_pretrained(tiny_checkpoints[kind]), network_of(tiny_checkpoints[kind])
    generator = torch.Generator().manual_seed(0)
    prompt, new = (torch.randint(0, 96, (2, size), generator=generator) for size in (7, 6))
    is_token = torch.arange(7) < torch.tensor([[7], [4]])
    positions = torch.tensor([[7, 8, 9, 13, 14, 15], [10, 11, 12, 4, 5, 6]])
    hidden = []
    for network in (ours, theirs):
        cache = network.new_cache(2, 8)
        rows = torch.arange(7).expand(2, -1)
        network.forward(prompt, rows, Segments.causal(is_token), cache)
        cache.keep(rows, is_token)
        with torch.no_grad():
            hidden.append(network.forward(new, positions, Segments.causal(torch.ones_like(new, dtype=torch.bool)), cache))
            torch.testing.assert_close(network.lm_head(hidden[-1]), ours.lm_head(hidden[0]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden[0], hidden[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decoder", ["refusion", "autoregressive"])
def test_llm_gives_the_tokens_of_the_same_decoder_on_a_transformers_model(tiny_model_dir: Path, decoder: str) -> None:
    llm = LLM.from_pretrained(tiny_model_dir, dtype="float32")
    sampling, slots = SamplingParams(max_tokens=20, temperature=1.0), SlotParams(slot_size=4, block_size=8)
    forward = forward_of(network_of(tiny_model_dir), llm.banned_ids().tolist())
    eos_ids = torch.tensor(llm.eos_ids())
    for output in llm.generate(["a fox", "owl"], sampling, slots, decoder):
        theirs: ReFusionDecoder | AutoregressiveDecoder = AutoregressiveDecoder(forward, sampling, eos_ids=eos_ids)
        if decoder == "refusion":
            assert llm.config.mask_token_id is not None
            theirs = ReFusionDecoder(forward, slots.resolve({}), sampling, mask_id=llm.config.mask_token_id, eos_ids=eos_ids)
        prompt = torch.tensor([output.prompt_ids])
        theirs.start(prompt, torch.tensor([prompt.shape[1]]), torch.tensor([sampling.seed]))
        while not bool(theirs.is_done.all()):
            theirs.step()
        assert theirs.answer(0) == list(output.token_ids)
        assert int(theirs.num_forwards[0]) == output.stats.num_forwards
