"""The diffusion baselines in the engine: the tokens and forwards of the plain loops, whatever runs beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines import Plain, is_idle, new_request, run

from refusion.decoding.diffusion_params import BlockDiffusionParams, DiffusionParams, MaskedDiffusionParams
from refusion.engine.core import Engine
from refusion.engine.requests import Answer

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
