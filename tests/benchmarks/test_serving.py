"""Load, and the transformers loop, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from refusion.evaluation.results import read_result

CARRIER = "hidden_size=64,intermediate_size=100,num_hidden_layers=4,num_attention_heads=8,num_key_value_heads=4,head_dim=16,vocab_size=300"
Script = Callable[..., dict]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    """Run the `main` of a benchmark script on four short prompts; its result file."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(f'{{"query": "question {i}"}}\n' for i in range(4)))

    def script(module: ModuleType, *options: object) -> dict:
        output = tmp_path / "result.json"
        slots = ["--slot-size", "4", "--token-threshold", "0.1", "--dtype", "float32"]
        monkeypatch.setattr("sys.argv", ["script.py", "--data", str(data), "--output", str(output), *slots, *map(str, options)])
        module.main()
        return read_result(output)

    return script


@pytest.fixture
def serving(script: Script) -> ModuleType:
    import serving  # type: ignore[import-not-found]  # a script of the benchmarks folder

    return serving


@pytest.fixture
def transformers_loop(script: Script) -> ModuleType:
    import transformers_loop  # type: ignore[import-not-found]  # a script of the benchmarks folder

    return transformers_loop


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_dir: Path) -> Path:
    """A tiny random Llama over bytes, mask token 5."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "mask_token_id": 5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids)).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((byte_tokenizer_dir / name).read_bytes())
    return path


def test_every_decoder_serves_the_same_requests_at_every_concurrency(script: Script, serving: ModuleType, tiny_llama_dir: Path) -> None:
    load = ["--concurrency", 1, 3, "--requests", 5, "--requests-per-concurrency", 3, "--warm-up", 1, "--max-tokens", 8]
    content = script(serving, "--model", tiny_llama_dir, *load)
    runs = {run["label"]: run["figures"] for run in content["runs"]}
    decoders = ("autoregressive", "refusion", "auto")
    assert {*runs} == {f"{name} at {count}" for name in (*decoders, "compared") for count in (1, 3)}
    for name in decoders:
        assert [runs[f"{name} at {count}"]["num_requests"] for count in (1, 3)] == [3, 5]
        found = runs[f"{name} at 3"]
        assert found["latency_seconds_p99"] >= found["latency_seconds_p50"] > 0
        assert found["tokens_per_second"] == pytest.approx(found["num_tokens"] / found["seconds"], rel=1e-4)
        assert 0 < found["first_token_ms_p50"] <= 1000 * found["latency_seconds_p99"]
    assert runs["autoregressive at 1"]["tokens_per_forward"]["value"] == 1.0
    assert runs["refusion at 1"]["ms_per_forward"] > 0
    assert 0 <= runs["refusion at 1"]["prepared_lengths"] <= 4
    assert runs["refusion at 3"]["prepared_lengths_last"] in (0, 1, 2, 3, 4)
    assert "prepared_lengths" not in runs["autoregressive at 1"]
    one, other = (runs[f"{name} at 3"]["tokens_per_second"] for name in decoders[:2])
    compared = runs["compared at 3"]
    assert compared["refusion_over_autoregressive"] == pytest.approx(other / one, rel=1e-4)
    assert compared["auto_over_better"] == pytest.approx(runs["auto at 3"]["tokens_per_second"] / max(one, other), rel=1e-4)


def test_the_lengths_prepared_in_the_timed_part_are_recorded(script: Script, serving: ModuleType, tiny_llama_dir: Path) -> None:
    options = ["--concurrency", 1, "--requests", 2, "--warm-up", 1, "--max-tokens", 8, "--decoders", "refusion", "--max-candidates", 2]
    figures = script(serving, "--model", tiny_llama_dir, *options)["figures"]
    assert figures["prepared_lengths"] == figures["prepared_lengths_last"] == 2  # no choice is left to the engine


def test_a_carrier_is_served_like_any_model(script: Script, serving: ModuleType, tiny_llama_dir: Path) -> None:
    options = ["--concurrency", 1, "--requests", 2, "--warm-up", 1, "--max-tokens", 8, "--decoders", "refusion"]
    plain = script(serving, "--model", tiny_llama_dir, *options)
    carried = script(serving, "--model", tiny_llama_dir, *options, "--carrier", CARRIER)
    assert carried["settings"]["carrier"] == CARRIER
    names = ("num_tokens", "tokens_per_forward")
    assert [carried["figures"][name] for name in names] == [plain["figures"][name] for name in names]  # the same texts


@pytest.mark.parametrize("carrier", [[], ["--carrier", CARRIER]], ids=["plain", "carrier"])
def test_the_transformers_loop_writes_the_same_tokens(
    script: Script, transformers_loop: ModuleType, tiny_llama_dir: Path, carrier: list[str]
) -> None:
    content = script(transformers_loop, "--model", tiny_llama_dir, "--max-tokens", 12, "--limit", 3, *carrier)
    for run in content["runs"]:
        found = run["figures"]
        assert found["same_answers_share"] == found["same_prefix_share"] == 1.0
        assert found["forward_speedup"] == pytest.approx(found["transformers_ms_per_forward"] / found["engine_ms_per_forward"], rel=1e-4)
    assert [run["label"] for run in content["runs"]] == ["refusion", "autoregressive"]
