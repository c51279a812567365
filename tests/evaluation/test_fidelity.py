from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from refusion.evaluation.fidelity import score_fidelity
from refusion.model.transformer import Transformer

EOS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, LlamaForCausalLM]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    path: Path = tmp_path_factory.mktemp("tiny")
    reference = LlamaForCausalLM(config).eval()
    reference.save_pretrained(path)
    return Transformer.from_pretrained(path), reference


def rows(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(4, 61, (n,), generator=generator).tolist() for n in lengths]


def test_agreement_and_nll_are_those_of_one_row_at_a_time(models: tuple[Transformer, LlamaForCausalLM]) -> None:
    model, reference = models
    prompts, answers = rows(9, 1), rows(9, 2)
    banned = [5, 17]
    for prompt, answer in list(zip(prompts, answers, strict=True))[:4]:  # four answers are partly the argmax
        with torch.no_grad():
            answer[0] = int(reference(torch.tensor([prompt])).logits[0, -1].argmax())
    hits, nll, count = 0, 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = reference(ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
        logits[:, banned] = -math.inf
        log_probs = logits.log_softmax(-1)
        for place, token in enumerate(answer):
            if token not in banned:
                nll -= log_probs[place, token].item()
            hits += int(logits[place].argmax() == token)
            count += 1
    answers_without_banned = all(token not in banned for answer in answers for token in answer)
    found = score_fidelity(model, prompts, answers, 4, banned_ids=banned)
    assert found.agreement == hits / count
    assert found.num_tokens == count
    if answers_without_banned:
        assert found.nll_per_token == pytest.approx(nll / count, abs=1e-4)  # float32 sums in another order
    assert score_fidelity(model, prompts, answers, 9, banned_ids=banned).agreement == found.agreement


def test_greedy_text_agrees_wholly_with_its_own_model(models: tuple[Transformer, LlamaForCausalLM]) -> None:
    model, reference = models
    prompt = [7, 8, 9]
    ids = torch.tensor([prompt])
    out = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0)
    found = score_fidelity(model, [prompt, [4]], [out[0, 3:].tolist(), []])
    assert found.agreement == 1.0
    assert found.num_tokens == out.shape[1] - 3


def test_no_answers_give_no_number(models: tuple[Transformer, LlamaForCausalLM]) -> None:
    assert math.isnan(score_fidelity(models[0], [[4]], [[]]).agreement)
