from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from refusion.errors import CheckpointError, ConfigError
from refusion.model.transformer import Transformer
from refusion.synthesis import sampler as sampler_module
from refusion.synthesis.sampler import Sampler, Sampling, draw, uniform
from refusion.tokenizer import Tokenizer

EOS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        max_position_embeddings=256, rope_theta=1e5, tie_word_embeddings=True, initializer_range=0.3, bos_token_id=1, eos_token_id=EOS,
        pad_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def prompts(count: int, longest: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [torch.randint(4, 97, (n,), generator=generator).tolist() for n in lengths]


def reference(path: Path, prompt: list[int], max_length: int) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(path).eval()
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_length=max_length, eos_token_id=EOS)
    return out[0, len(prompt) :].tolist()


def test_greedy_tokens_equal_those_of_transformers(checkpoint: Path) -> None:
    rows = prompts(12)
    out = Sampler(checkpoint).sample(rows, Sampling(max_length=80), eos_token_ids=[EOS], batch_size=5)
    assert out == [reference(checkpoint, row, 80) for row in rows]
    assert any(tokens[-1] == EOS for tokens in out), "no row ends: the test would not see the EOS rule"


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-untied"])
def test_qwen3_layouts_are_read_too(tiny_checkpoints: dict[str, Path], kind: str) -> None:
    model = Transformer.from_pretrained(tiny_checkpoints[kind])
    rows = prompts(3)
    out = Sampler(tiny_checkpoints[kind]).sample(rows, Sampling(max_length=40), eos_token_ids=[])
    for row, tokens in zip(rows, out, strict=True):
        logits = model.logits(torch.tensor([row + tokens]))[0, len(row) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens


def test_the_base_model_continues_a_batch_greedily(base_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(base_model_dir)
    rows = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in ("Why is the sky blue?", "Name three colours.")]
    out = Sampler(base_model_dir).sample(rows, Sampling(max_length=512, max_new_tokens=6), eos_token_ids=tokenizer.eos_token_ids)
    model = Transformer.from_pretrained(base_model_dir)
    for row, tokens in zip(rows, out, strict=True):
        logits = model.logits(torch.tensor([row + tokens]))[0, len(row) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens


def test_scaled_rotary_positions_are_refused(tiny_checkpoints: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="rope scaling llama3"):
        Sampler(tiny_checkpoints["llama3"])


def test_compaction_changes_no_token(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = prompts(16)
    sampling = Sampling(temperature=1.3, top_p=1.0, max_length=90, seed=5)
    eos = list(range(3, 12))  # many ends, so that rows leave at different steps
    monkeypatch.setattr(sampler_module, "COMPACT_ABOVE", 2.0)
    kept = Sampler(checkpoint).sample(rows, sampling, eos_token_ids=eos)
    monkeypatch.setattr(sampler_module, "COMPACT_ABOVE", 0.0)
    monkeypatch.setattr(sampler_module, "CHECK_EVERY", 2)
    assert Sampler(checkpoint).sample(rows, sampling, eos_token_ids=eos) == kept


def test_a_row_does_not_depend_on_its_batch(checkpoint: Path) -> None:
    rows = prompts(9)
    sampling = Sampling(temperature=0.9, max_length=60, seed=7)
    sampler = Sampler(checkpoint)
    together = sampler.sample(rows, sampling, eos_token_ids=[EOS])
    assert sampler.sample(rows, sampling, eos_token_ids=[EOS], batch_size=2) == together
    alone = sampler.sample(rows[4:5], sampling, eos_token_ids=[EOS], row_ids=[4])
    assert alone == together[4:5]
    assert sampler.sample(rows, Sampling(temperature=0.9, max_length=60, seed=8), eos_token_ids=[EOS]) != together


def test_banned_ids_are_never_drawn(checkpoint: Path) -> None:
    banned = list(range(10, 97))
    for temperature in (0.0, 2.0):
        sampling = Sampling(temperature=temperature, top_p=1.0, top_k=97, max_length=40)
        out = Sampler(checkpoint).sample(prompts(4), sampling, eos_token_ids=[EOS], banned_ids=banned)
        assert {token for row in out for token in row} <= set(range(10))


def test_length_limits_hold_for_every_row(checkpoint: Path) -> None:
    rows = prompts(10)
    out = Sampler(checkpoint).sample(rows, Sampling(max_length=40, max_new_tokens=11), eos_token_ids=[])
    assert [len(tokens) for tokens in out] == [11] * 10
    out = Sampler(checkpoint).sample(rows, Sampling(max_length=30), eos_token_ids=[])
    assert [len(row) + len(tokens) for row, tokens in zip(rows, out, strict=True)] == [30] * 10
    assert Sampler(checkpoint).sample([[5] * 30], Sampling(max_length=30), eos_token_ids=[]) == [[]]


def test_draw_keeps_to_the_nucleus() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9, -1.0]]).repeat(4000, 1)
    rows = torch.arange(4000)
    tokens = draw(logits, Sampling(temperature=1.0, top_p=0.6), rows, torch.zeros_like(rows))
    assert set(tokens.tolist()) == {1, 2}
    share = (tokens == 1).float().mean().item()
    assert abs(share - torch.softmax(torch.tensor([3.0, 2.9]), 0)[0].item()) < 0.03  # three standard errors of 4,000 draws


def test_noise_is_uniform_and_keyed() -> None:
    rows, steps = torch.arange(20000), torch.zeros(20000, dtype=torch.long)
    noise = uniform(1, rows, steps)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean().item() - 0.5) < 0.01
    assert torch.equal(noise, uniform(1, rows, steps))
    assert not torch.equal(noise, uniform(2, rows, steps))


def test_unknown_architectures_and_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="gpt2"):
        Sampler(tmp_path)
    with pytest.raises(ConfigError, match="top_p"):
        Sampling(top_p=0)
