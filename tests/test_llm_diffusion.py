"""The diffusion baselines through the front door."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refusion import AsyncEngine
from refusion.decoding.diffusion import decode
from refusion.errors import CheckpointError, ConfigError, RequestError
from refusion.llm import LLM, BlockDiffusionParams, MaskedDiffusionParams, SamplingParams, SlotParams

PROMPTS: list[Any] = ["a fox", [20, 21, 22], "the quick brown fox jumps", [{"role": "user", "content": "hello"}], [9]]
DECODERS: dict[str, Any] = {
    "masked_diffusion": MaskedDiffusionParams(block_size=6, threshold=0.02, early_stop=True),
    "block_diffusion": BlockDiffusionParams(block_size=4, threshold=0.02),
}


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> LLM:
    return LLM.from_pretrained(tiny_model_dir, dtype="float32")


@pytest.fixture
def edited_model(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model with other entries in config.json; None removes one."""

    def edit(**changes: Any) -> Path:
        path = Path(shutil.copytree(tiny_model_dir, tmp_path / "edited"))
        config = json.loads((path / "config.json").read_text(encoding="utf-8")) | changes
        (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
        return path

    return edit


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_mixed_requests_is_each_alone_and_as_in_plain_loops(llm: LLM, decoder: str, temperature: float) -> None:
    sampling = SamplingParams(max_tokens=18, temperature=temperature, top_p=0.9, seed=11, stop_token_ids=tuple(range(60, 70)))
    params = DECODERS[decoder]
    together = llm.generate(PROMPTS, sampling, decoder=decoder, diffusion=params)
    alone = [llm.generate([prompt], sampling, decoder=decoder, diffusion=params)[0] for prompt in PROMPTS]
    forward = llm.forward_fn()
    for one, other in zip(together, alone, strict=True):
        trace = decode(forward, one.prompt_ids, params, sampling, mask_id=5, eos_ids=(*llm.eos_ids(), *sampling.stop_token_ids))
        assert list(one.token_ids) == list(other.token_ids) == trace.token_ids
        assert one.stats.num_forwards == other.stats.num_forwards == trace.num_forwards
        assert one.decoder == decoder
        assert one.stats.tokens_per_forward == len(one.token_ids) / one.stats.num_forwards


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stream_is_the_text_in_pieces(llm: LLM, decoder: str) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=4)
    whole = llm.generate(["a fox"], sampling, decoder=decoder, diffusion=DECODERS[decoder])[0].text
    pieces = list(llm.stream("a fox", sampling, decoder=decoder, diffusion=DECODERS[decoder]))
    assert "".join(pieces) == whole
    assert len(pieces) > 1


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_asynchronous_engine_writes_the_same(llm: LLM, decoder: str) -> None:
    sampling = SamplingParams(max_tokens=12)

    async def ask() -> Any:
        async with AsyncEngine(llm) as engine:
            return [piece async for piece in engine.generate("a fox", sampling, decoder=decoder, diffusion=DECODERS[decoder])][-1].output

    assert asyncio.run(ask()).token_ids == llm.generate(["a fox"], sampling, decoder=decoder, diffusion=DECODERS[decoder])[0].token_ids


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_context_may_be_filled_to_the_last_token(llm: LLM, decoder: str) -> None:
    (output,) = llm.generate([[7] * 250], SamplingParams(max_tokens=6), decoder=decoder)
    assert len(output.token_ids) == 6


@pytest.mark.parametrize("decoder", DECODERS)
def test_specials_and_masks_are_never_emitted(llm: LLM, decoder: str) -> None:
    sampling = SamplingParams(max_tokens=60, temperature=3.0)
    for output in llm.generate(PROMPTS, sampling, decoder=decoder):
        assert all(token == 2 or 6 <= token < 262 for token in output.token_ids)


def test_a_mask_in_the_prompt_is_text(llm: LLM) -> None:
    for decoder in DECODERS:
        (output,) = llm.generate([[5, 9, 5]], SamplingParams(max_tokens=8), decoder=decoder)
        assert 5 not in output.token_ids


def test_block_size_left_out_is_the_one_of_training(edited_model: Callable[..., Path]) -> None:
    block = {"training": {"objective": {"name": "block_diffusion", "block_size": 16}}}
    llm = LLM.from_pretrained(edited_model(refusion=block))
    assert llm.resolve_diffusion("block_diffusion", None) == BlockDiffusionParams(block_size=16, threshold=0.9)
    with pytest.raises(ConfigError, match="steps is 20"):
        llm.generate(["a fox"], SamplingParams(max_tokens=4), decoder="block_diffusion", diffusion=BlockDiffusionParams(steps=20))


def test_settings_of_another_decoder_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="decoder 'masked_diffusion' takes MaskedDiffusionParams; BlockDiffusionParams has no effect"):
        llm.generate(["a fox"], SamplingParams(max_tokens=4), decoder="masked_diffusion", diffusion=BlockDiffusionParams())
    with pytest.raises(RequestError, match="decoder 'refusion' has no diffusion settings"):
        llm.generate(["a fox"], SamplingParams(max_tokens=4), SlotParams(), diffusion=MaskedDiffusionParams())


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_checkpoint_without_mask_token_is_refused(edited_model: Callable[..., Path], decoder: str) -> None:
    llm = LLM.from_pretrained(edited_model(mask_token_id=None))
    with pytest.raises(CheckpointError, match="has no mask token; add one with `refusion convert`"):
        llm.generate(["a fox"], SamplingParams(max_tokens=4), decoder=decoder)
