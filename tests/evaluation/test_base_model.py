"""The real base model through our adapter and through the harness's own `hf` model: the mark of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from refusion.evaluation.harness import ReFusionLM

QUESTION = "Question: Which of these is a metal?\nAnswer:"


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]  # type: ignore[arg-type]


def test_texts_and_likelihoods_of_the_base_model_are_those_of_hf(base_model_dir: Path) -> None:
    ours = ReFusionLM(str(base_model_dir), decoder="autoregressive", device="cpu", dtype="float32")
    theirs = HFLM(pretrained=str(base_model_dir), device="cpu", dtype="float32", batch_size=1)
    chat = [{"role": "user", "content": "What is 12 + 30?"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)

    pairs = [(QUESTION, " iron"), (QUESTION, " wood\n\n2 and 7"), (ours.apply_chat_template(chat), "The answer is 42."), ("", "Once upon")]
    found = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (log_prob, is_greedy), (other, was_greedy) in zip(found, expected, strict=True):
        assert log_prob == pytest.approx(other, abs=1e-3)
        assert is_greedy == was_greedy

    texts = [("Water boils at 100 degrees Celsius, and ice melts at 0.",)]
    rolling = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert rolling == pytest.approx(theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True), abs=1e-3)

    options = {"until": ["\n\n", "Q:"], "max_gen_toks": 16, "do_sample": False}
    prompts = [(ours.apply_chat_template(chat), options), ("The capital of France is", options)]
    answers = ours.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    assert answers == theirs.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    assert all(answers)
