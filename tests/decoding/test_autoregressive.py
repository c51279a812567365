from __future__ import annotations

import torch
from scripted import Row, ScriptedForward, certain, hashed_language

from refusion.decoding.autoregressive import AutoregressiveDecoder
from refusion.decoding.forward import Rows, readout_logits
from refusion.decoding.params import SamplingParams
from refusion.decoding.sampling import Draw

EOS, VOCAB = 0, 6


def decode(forward: ScriptedForward, prompts: list[list[int]], sampling: SamplingParams) -> tuple[list[list[int]], list[int]]:
    """Answers and forwards of a batch."""
    decoder = AutoregressiveDecoder(forward, sampling, eos_ids=torch.tensor([EOS]))
    longest = max(map(len, prompts))
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    decoder.start(padded, torch.tensor([len(prompt) for prompt in prompts]), torch.full((len(prompts),), sampling.seed))
    while not decoder.is_done.all():
        decoder.step()
    return [decoder.answer(row) for row in range(len(prompts))], decoder.num_forwards.tolist()


def plain(prompt: list[int], sampling: SamplingParams) -> list[int]:
    """The definition: every token is drawn from the row before it."""
    script, seen, answer = hashed_language(VOCAB, eos_id=EOS), [], []
    for position, token in enumerate(prompt):
        seen.append(Row.of(token, position, seen))
    while len(answer) < sampling.max_tokens and EOS not in answer:
        draw = Draw(sampling.temperature, sampling.top_p, torch.tensor([sampling.seed]), torch.tensor([1]))
        keys = Rows(draw.seeds, draw.attempts, torch.tensor([seen[-1].position]), torch.tensor([0]))
        answer.append(int(readout_logits(script(seen[-1]).clone()[None], torch.tensor([], dtype=torch.long), draw, keys).token_ids))
        seen.append(Row.of(answer[-1], len(seen), seen))
    return answer


def test_a_batch_is_each_prompt_alone_one_token_a_forward() -> None:
    prompts = [[2, 3, 4, 5], [3], [5, 5]]
    for sampling in (SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, temperature=1.2, top_p=0.9, seed=4)):
        answers, num_forwards = decode(ScriptedForward(hashed_language(VOCAB, eos_id=EOS)), prompts, sampling)
        assert answers == [plain(prompt, sampling) for prompt in prompts]
        assert num_forwards == [len(answer) for answer in answers]


def test_eos_ends_an_answer_and_belongs_to_it() -> None:
    text = [3, 4, EOS, 5]
    answers, _ = decode(ScriptedForward(lambda row: certain({text[min(row.position, 3)]: 0.9}, VOCAB)), [[2]], SamplingParams(max_tokens=9))
    assert answers == [[3, 4, EOS]]


def test_compact_goes_on_with_the_requests_that_are_left() -> None:
    sampling = SamplingParams(max_tokens=10, temperature=1.0)
    decoder = AutoregressiveDecoder(ScriptedForward(hashed_language(VOCAB)), sampling, eos_ids=torch.tensor([EOS]))
    decoder.start(torch.tensor([[2, 3], [4, 5]]), torch.tensor([2, 2]), torch.zeros(2, dtype=torch.long))
    decoder.step()
    decoder.compact(torch.tensor([1]))
    while not decoder.is_done.all():
        decoder.step()
    alone = AutoregressiveDecoder(ScriptedForward(hashed_language(VOCAB)), sampling, eos_ids=torch.tensor([EOS]))
    alone.start(torch.tensor([[4, 5]]), torch.tensor([2]), torch.zeros(1, dtype=torch.long))
    while not alone.is_done.all():
        alone.step()
    assert decoder.answer(0) == alone.answer(0)
