"""The small model's function survives in the larger shape: logits, texts and files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from refusion import LLM, SamplingParams, SlotParams
from refusion.errors import CheckpointError, ConfigError
from refusion.evaluation.results import read_result
from refusion.model.transformer import Transformer

CPU = torch.device("cpu")
WIDER: dict[str, int] = {
    "hidden_size": 140, "intermediate_size": 250, "num_hidden_layers": 5, "num_attention_heads": 20,
    "num_key_value_heads": 5, "head_dim": 32, "vocab_size": 300,
}  # fmt: skip


@pytest.fixture
def carrier(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import carrier  # type: ignore[import-not-found]  # a script of the benchmarks folder

    return carrier


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_dir: Path) -> Callable[..., Path]:
    """A tiny random Llama over bytes: odd numbers of heads (9 on 3), gains away from one, tied input by default."""

    def make(**changes: Any) -> Path:
        path = tmp_path_factory.mktemp("llama")
        shape = {
            "vocab_size": 264, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 9,
            "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "mask_token_id": 5, "tie_word_embeddings": True,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**(shape | changes)))
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    torch.nn.init.uniform_(parameter, 0.2, 2.0)
            model.state_dict()["model.embed_tokens.weight"].normal_(std=0.2)  # the padding row too
        model.save_pretrained(path)
        settings = json.loads((path / "config.json").read_text())
        slots = {"slot_size": 4, "block_size": 8, "token_threshold": 0.1}
        (path / "config.json").write_text(json.dumps(settings | {"refusion": {"base": "tiny", "slots": {"cpu": slots}}}))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).write_bytes((byte_tokenizer_dir / name).read_bytes())
        return path

    return make


def input_ids(rows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 264, (rows, length), generator=torch.Generator().manual_seed(1))


SCALED = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, WIDER),
        ({"tie_word_embeddings": False, "rope_parameters": SCALED}, WIDER),
        ({"hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1}, WIDER),  # multi-query, 7 heads over 20 places
        ({"num_attention_heads": 9, "num_key_value_heads": 9}, WIDER | {"num_key_value_heads": 10}),  # one query head each -> two
        (
            {"num_attention_heads": 6, "num_key_value_heads": 2},
            WIDER | {"num_attention_heads": 8, "num_key_value_heads": 8},
        ),  # 3 heads on 4 copies
        ({}, WIDER | {"head_dim": 16, "num_hidden_layers": 3, "intermediate_size": 52, "vocab_size": 264}),  # only the width grows
        ({"rms_norm_eps": 1e-2}, WIDER),
    ],
    ids=["tied", "untied-scaled-rotary", "multi-query", "multi-head", "fewer-heads-a-group", "width-only", "large-eps"],
)
def test_logits_equal_those_of_the_small_model(
    carrier: ModuleType, make_llama: Callable[..., Path], changes: dict[str, Any], shape: dict[str, int]
) -> None:
    path = make_llama(**changes)
    expected = Transformer.from_pretrained(path, dtype=torch.float64).logits(input_ids())
    # The factors are made in float64, so in float64 nothing but rounding and the tiny entries is left; in float32, rounding.
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 2e-4)):
        found = carrier.build(path, carrier.Shape(**shape), device=CPU, dtype=dtype).logits(input_ids())
        torch.testing.assert_close(found[..., :264], expected, atol=tolerance, rtol=tolerance)
        assert not (found[..., 264:] > expected.min() - 1000).any()


def test_every_matrix_is_dense_and_no_two_seeds_are_alike(carrier: ModuleType, make_llama: Callable[..., Path]) -> None:
    path = make_llama()
    models = [carrier.build(path, carrier.Shape(**WIDER), device=CPU, dtype=torch.bfloat16, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (dict(model.named_parameters()) for model in models)
    for name, weight in first.items():
        assert weight.dtype == torch.bfloat16
        assert bool((weight != 0).all()), name
        assert torch.equal(weight, again[name])
        if weight.dim() == 2:
            assert not torch.equal(weight, other[name])


def test_idle_layers_leave_the_stream_as_it_is(carrier: ModuleType, make_llama: Callable[..., Path]) -> None:
    model = carrier.build(make_llama(), carrier.Shape(**WIDER), device=CPU, dtype=torch.bfloat16)
    streams: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _module, given: streams.append(given[0].clone()))
    model.logits(input_ids())
    # To the bit where it is not zero; a zero of bfloat16 takes the tiny number.
    pairs = [(before, after, before != 0) for before, after in itertools.pairwise(streams)]
    is_idle = [torch.equal(a[there], b[there]) and bool((b[~there].abs() < 1e-25).all()) for a, b, there in pairs]
    assert is_idle == [False, False, True, False]  # of five layers the third and the last are idle
    assert all(bool((stream[..., -1] == streams[0][0, 0, -1]).all()) for stream in streams)  # the anchor stands still


def test_the_carrier_answers_like_the_small_model(carrier: ModuleType, make_llama: Callable[..., Path]) -> None:
    path = make_llama()
    small = LLM.from_pretrained(path, dtype="float32")
    large = carrier.load_llm(path, carrier.Shape(**WIDER), dtype="float32")
    for decoder in ("refusion", "autoregressive"):
        answers = [llm.generate(["a fox", "owl"], SamplingParams(max_tokens=24), SlotParams(), decoder) for llm in (small, large)]
        assert [out.token_ids for out in answers[0]] == [out.token_ids for out in answers[1]]
        assert [out.stats.num_forwards for out in answers[0]] == [out.stats.num_forwards for out in answers[1]]


def test_a_saved_carrier_loads_here_and_in_transformers(carrier: ModuleType, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    path, target = make_llama(), tmp_path / "carrier"
    shape = carrier.Shape(**WIDER)
    carrier.save(path, shape, target, device=CPU, dtype=torch.float32)
    built = carrier.build(path, shape, device=CPU, dtype=torch.float32)
    llm = LLM.from_pretrained(target, dtype="float32")
    assert llm.config == built.config
    assert llm.recommended["slot_size"] == 4
    assert llm.tokenizer is not None
    for name, weight in built.state_dict().items():
        assert torch.equal(llm.model.state_dict()[name], weight), name
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)(input_ids(), use_cache=False).logits
        in_memory = carrier.to_transformers(built)(input_ids(), use_cache=False).logits
    torch.testing.assert_close(expected, in_memory, atol=0, rtol=0)
    torch.testing.assert_close(built.logits(input_ids()), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["qwen3", "llama3"])
def test_any_model_of_ours_becomes_one_of_transformers_on_the_same_memory(
    carrier: ModuleType, tiny_checkpoints: dict[str, Path], kind: str
) -> None:
    model = Transformer.from_pretrained(tiny_checkpoints[kind])
    theirs = carrier.to_transformers(model)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids() % 96, use_cache=False).logits, model.logits(input_ids() % 96), atol=1e-4, rtol=1e-4)
    assert theirs.get_input_embeddings().weight.data_ptr() == model.embed_tokens.weight.data_ptr()


def test_what_does_not_fit_is_refused_with_the_reason(
    carrier: ModuleType, make_llama: Callable[..., Path], tiny_checkpoints: dict[str, Path]
) -> None:
    with pytest.raises(CheckpointError, match="no Llama"):
        carrier.build(tiny_checkpoints["qwen3"], carrier.Shape(**WIDER), device=CPU, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"as many layers; .*multiple"):
        carrier.build(make_llama(), carrier.Shape(**WIDER | {"num_hidden_layers": 2, "head_dim": 24}), device=CPU, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="too few heads"):
        carrier.build(
            make_llama(), carrier.Shape(**WIDER | {"num_attention_heads": 6, "num_key_value_heads": 3}), device=CPU, dtype=torch.float32
        )


def test_a_shape_is_written_as_fields(carrier: ModuleType) -> None:
    assert carrier.Shape.parse("8b") == carrier.EIGHT_BILLION
    assert carrier.Shape.parse("hidden_size=64,vocab_size=300") == carrier.Shape(hidden_size=64, vocab_size=300)
    with pytest.raises(ConfigError, match="hiden_size"):
        carrier.Shape.parse("hiden_size=64")


@pytest.mark.parametrize("exact", [[], ["--exact"]], ids=["texts", "exact"])
def test_the_script_compares_carrier_and_model(
    carrier: ModuleType, make_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: list[str]
) -> None:
    data, output = tmp_path / "chat.jsonl", tmp_path / "carrier.json"
    data.write_text('{"query": "what?"}\n{"query": "why?"}\n')
    shape = ",".join(f"{name}={value}" for name, value in WIDER.items())
    options = ["--model", str(make_llama()), "--data", str(data), "--max-tokens", "12", "--dtype", "float32", "--shape", shape]
    monkeypatch.setattr("sys.argv", ["carrier.py", *options, "--output", str(output), *exact])
    carrier.main()
    runs = {run["label"]: run["figures"] for run in read_result(output)["runs"]}
    assert set(runs) == ({"logits"} if exact else {"logits", "refusion", "autoregressive"})
    assert runs["logits"]["same_argmax_share"] == 1.0
    assert runs["logits"]["largest_logit_difference"] < 1e-3
    assert runs["logits"]["largest_added_logit"] < -1000
    if not exact:
        assert runs["refusion"]["same_answers_share"] == 1.0


def test_quantised_weights_are_measured_against_the_exact_ones(
    make_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "chat.jsonl", tmp_path / "quantized.json"
    data.write_text("".join(json.dumps({"query": f"question {i}", "response": "x"}) + "\n" for i in range(2)))
    shape = ",".join(f"{name}={value}" for name, value in WIDER.items())
    options = {"--model": make_llama(), "--carrier": shape, "--data": data, "--dtype": "float32", "--max-tokens": 6, "--output": output}
    counts = ["--num-prompts", "2", "--num-tasks", "7", "--task-tokens", "6", "--models", "carrier", "--kinds", "bfloat16", "int8"]
    argv = [*map(str, itertools.chain.from_iterable(options.items())), *counts]
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import quantized  # type: ignore[import-not-found]  # a script of the benchmarks folder

    monkeypatch.setattr("sys.argv", ["quantized.py", *argv])
    quantized.main()
    exact, rounded = (run["figures"] for run in read_result(output)["runs"])
    assert (exact["argmax_agreement"], exact["same_answers_refusion"]) == (1.0, 1.0)
    assert abs(exact["kl"]) < 1e-6
    assert 1e-6 < rounded["kl"] < 0.2
    assert rounded["num_scored"] == exact["num_scored"] > 0
    assert rounded["task_accuracy"]["value"] == 0.0
    assert rounded["tokens_per_second_chat_autoregressive"] > 0
