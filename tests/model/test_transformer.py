"""The inference transformer against `transformers`, logit by logit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from refusion.model.segments import NO_PARENT, Segments
from refusion.model.transformer import Transformer

KINDS = ("qwen3", "qwen3-untied", "llama", "llama3")


def hub_logits(path: Path, input_ids: Tensor) -> Tensor:
    """What `transformers` computes; the all-ones mask keeps it from inferring packed sequences."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits


@pytest.fixture(params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoints: dict[str, Path]) -> Path:
    return tiny_checkpoints[request.param]


def random_ids(*shape: int, vocab_size: int = 96, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_logits_equal_transformers(checkpoint: Path) -> None:
    input_ids = random_ids(2, 100)  # past the 64 positions that the llama3 scaling stretches
    ours = Transformer.from_pretrained(checkpoint).logits(input_ids)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, hub_logits(checkpoint, input_ids), atol=1e-4, rtol=1e-4)


def test_logits_of_permuted_positions_equal_transformers(checkpoint: Path) -> None:
    """Slots in another order than the text: causal over the physical order, rotation by position."""
    from transformers import AutoModelForCausalLM

    input_ids, positions = random_ids(1, 24), torch.tensor([[*range(8), *range(16, 24), *range(8, 16)]])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=input_ids, position_ids=positions, attention_mask=torch.ones_like(input_ids)).logits
    ours = Transformer.from_pretrained(checkpoint)
    hidden = ours(input_ids, positions, Segments.causal(torch.ones_like(input_ids, dtype=torch.bool)), ours.new_cache(1, 24))
    torch.testing.assert_close(ours.lm_head(hidden), expected, atol=1e-4, rtol=1e-4)


def test_a_cached_forward_equals_the_whole(checkpoint: Path) -> None:
    model = Transformer.from_pretrained(checkpoint)
    input_ids = random_ids(2, 12)
    cache, parts = model.new_cache(2, 4), []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        piece = input_ids[:, start:stop]
        positions = torch.arange(start, stop).expand(2, -1)
        parts.append(model.lm_head(model(piece, positions, Segments.causal(torch.ones_like(piece, dtype=torch.bool)), cache)))
        rows = torch.arange(stop - start).expand(2, -1)
        cache.keep(rows, torch.ones_like(rows, dtype=torch.bool))
    torch.testing.assert_close(torch.cat(parts, dim=1), model.logits(input_ids), atol=1e-4, rtol=1e-4)


def test_requests_of_different_length_do_not_disturb_one_another(checkpoint: Path) -> None:
    model = Transformer.from_pretrained(checkpoint)
    input_ids, lengths = random_ids(2, 9), torch.tensor([9, 4])
    is_token = torch.arange(9) < lengths[:, None]
    cache = model.new_cache(2, 16)
    positions = torch.arange(9).expand(2, -1)
    hidden = model(input_ids, positions, Segments.causal(is_token), cache)
    cache.keep(positions, is_token)
    new = random_ids(2, 3, seed=1)
    after = model(new, lengths[:, None] + torch.arange(3), Segments.causal(torch.ones_like(new, dtype=torch.bool)), cache)
    for request, length in enumerate(lengths.tolist()):
        whole = torch.cat((input_ids[request, :length], new[request]))[None]
        expected = model.logits(whole)[0]
        torch.testing.assert_close(model.lm_head(hidden[request, :length]), expected[:length], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.lm_head(after[request]), expected[length:], atol=1e-4, rtol=1e-4)


def test_segments_compute_what_separate_forwards_would(checkpoint: Path) -> None:
    """Two continuations of one prefix in one forward, one of which sees a single token of the other."""
    model = Transformer.from_pretrained(checkpoint)
    prefix, left, right = random_ids(1, 5), random_ids(1, 3, seed=1), random_ids(1, 2, seed=2)
    cache, rows = model.new_cache(1, 16), torch.arange(5)[None]
    model(prefix, rows, Segments.causal(rows >= 0), cache)
    cache.keep(rows, rows >= 0)
    segments = Segments(
        segment=torch.tensor([[0, 0, 0, 1, 1]]),
        rank=torch.tensor([[0, 1, 2, 1, 2]]),
        parent=torch.tensor([[NO_PARENT] * 3 + [0] * 2]),
        visible=torch.tensor([[0, 0, 0, 1, 1]]),
        is_trunk=torch.zeros(1, 5, dtype=torch.bool),
    )
    hidden = model(torch.cat((left, right), dim=1), torch.tensor([[5, 6, 7, 6, 7]]), segments, cache)
    found = model.lm_head(hidden)[0]
    torch.testing.assert_close(found[:3], model.logits(torch.cat((prefix, left), dim=1))[0, 5:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[3:], model.logits(torch.cat((prefix, left[:, :1], right), dim=1))[0, 6:], atol=1e-4, rtol=1e-4)


def test_attention_bias_is_read(edited: Callable[..., Path], tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_checkpoints["llama"], attention_bias=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "biased")
    input_ids = random_ids(1, 10)
    ours = Transformer.from_pretrained(tmp_path / "biased").logits(input_ids)
    torch.testing.assert_close(ours, hub_logits(tmp_path / "biased", input_ids), atol=1e-4, rtol=1e-4)


def test_bfloat16_keeps_rotations_exact_enough(checkpoint: Path) -> None:
    """Half precision of the weights, not of the angles: at position 250 a bfloat16 angle would be off by a whole radian."""
    model = Transformer.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert model.inv_freq.dtype == torch.float32
    input_ids = random_ids(1, 256)
    difference = (model.logits(input_ids) - Transformer.from_pretrained(checkpoint).logits(input_ids)).abs()
    assert difference.mean() < 0.05 * Transformer.from_pretrained(checkpoint).logits(input_ids).std()


def test_logits_of_the_real_base_model_equal_transformers(base_model_dir: Path) -> None:
    input_ids = random_ids(1, 32, vocab_size=49152)
    ours = Transformer.from_pretrained(base_model_dir, dtype=torch.float32).logits(input_ids)
    torch.testing.assert_close(ours, hub_logits(base_model_dir, input_ids), atol=1e-3, rtol=1e-4)
