"""Fixtures that tests of several packages share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton; kernels then run on CPU tensors
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The golden traces and the small model they were made with."""
    return _ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Benchmark rows and the like that are not part of the repository: $REFUSION_SHARED, or `shared` beside the checkout."""
    path = Path(os.environ.get("REFUSION_SHARED", _ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set REFUSION_SHARED to where it lies")
    return path


@pytest.fixture(scope="session")
def base_model_dir() -> Path:
    """The real base model; `make test` pulls it first."""
    from refusion import hub

    model = next(model for model in hub.list_models() if model.name == "smollm2-135m")
    if not model.is_pulled:
        pytest.skip("smollm2-135m is not in the cache; run `refusion models pull smollm2-135m`")
    return model.path


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random checkpoints by kind: qwen3 (tied, mask token 5), qwen3-untied, llama (tied), llama3 (scaled rotary, untied); float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mask_token_id": 5,
        "initializer_range": 0.2,
    }
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    configs = {
        "qwen3": Qwen3Config(**shape, tie_word_embeddings=True),
        "qwen3-untied": Qwen3Config(**shape, tie_word_embeddings=False),
        "llama": LlamaConfig(**shape, tie_word_embeddings=True),
        "llama3": LlamaConfig(**shape, tie_word_embeddings=False, rope_parameters=scaling),
    }
    root = tmp_path_factory.mktemp("tiny")
    for name, config in configs.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = (Qwen3ForCausalLM if name.startswith("qwen3") else LlamaForCausalLM)(config)
        model.save_pretrained(root / name)
    return {name: root / name for name in configs}


@pytest.fixture(scope="session")
def byte_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 256 bytes behind six specials, with a chat template: a directory with tokenizer files and no weights."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("bytes")
    specials = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|mask|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(path / "tokenizer.json"))
    template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "chat_template": template,
        },
    )
    _write_json(path / "config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "mask_token_id": 5})
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_checkpoints: dict[str, Path], byte_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny random Qwen3 checkpoint over bytes: weights (264 rows, 262 known), tokenizer, chat template, mask token 5."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("tiny-model")
    config = Qwen3Config.from_pretrained(tiny_checkpoints["qwen3"])
    config.vocab_size = 264
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(byte_tokenizer_dir / name, path / name)
    return path


def _write_json(path: Path, content: dict[str, object]) -> None:
    import json

    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
