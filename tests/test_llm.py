from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

from refusion import LLM, SamplingParams, SlotParams
from refusion.engine.build import moved_network
from refusion.engine.core import Engine
from refusion.engine.costs import CostTable
from refusion.engine.ops import PlainOps
from refusion.engine.runner import Pending
from refusion.errors import CheckpointError, ConfigError, RequestError
from refusion.llm import EngineSettings, GenerationFailed, GenerationInterrupted, Prompt, RequestOutput
from refusion.model.quantize import QuantizedWeight, quantize
from refusion.model.transformer import Transformer

SLOTS = SlotParams(slot_size=4, block_size=8, slot_threshold=0.3, token_threshold=0.1)
PROMPTS: list[Prompt] = ["a fox", [7, 8, 9], [{"role": "user", "content": "hello"}], "zebra", "a much longer prompt than the others", "é"]
DECODERS = ("refusion", "autoregressive")


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> LLM:
    torch.set_num_threads(1)
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


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


# ---- the same text whatever runs beside it and however forwards are fused ----


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_mixed_requests_is_each_alone(llm: LLM, decoder: str, temperature: float) -> None:
    sampling = SamplingParams(max_tokens=18, temperature=temperature, top_p=0.9, seed=11, stop_token_ids=tuple(range(60, 70)))
    together = llm.generate(PROMPTS, sampling, SLOTS, decoder, batch_size=len(PROMPTS))
    in_pairs = llm.generate(PROMPTS, sampling, SLOTS, decoder, batch_size=2)
    alone = [llm.generate([prompt], sampling, SLOTS, decoder)[0] for prompt in PROMPTS]
    assert tokens(together) == tokens(in_pairs) == tokens(alone)
    assert [output.stats.num_forwards for output in together] == [output.stats.num_forwards for output in alone]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("acceptance", ["paper", "argmax"])
def test_fused_is_two_pass_in_fewer_forwards(llm: LLM, temperature: float, acceptance: Any) -> None:
    sampling = SamplingParams(max_tokens=24, temperature=temperature, top_p=0.95, seed=2)
    shape = {"slot_size": 4, "block_size": 8, "slot_threshold": 0.3, "token_threshold": 0.1, "acceptance": acceptance}
    two_pass = llm.generate(PROMPTS[:3], sampling, SlotParams(**shape, fuse_plan=False, max_candidates=0))
    for fusion in ({}, {"max_candidates": 1}, {"fuse_plan": False}):
        fused = llm.generate(PROMPTS[:3], sampling, SlotParams(**shape, **fusion))
        assert tokens(fused) == tokens(two_pass)
        assert sum(output.stats.num_forwards for output in fused) < sum(output.stats.num_forwards for output in two_pass)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_seed_reproduces_and_another_seed_differs(llm: LLM, decoder: str) -> None:
    first, again, other = (
        llm.generate(["a fox"], SamplingParams(max_tokens=20, temperature=1.0, seed=seed), SLOTS, decoder) for seed in (1, 1, 2)
    )
    assert tokens(first) == tokens(again) != tokens(other)


# ---- where an answer ends ----


@pytest.mark.parametrize("decoder", DECODERS)
def test_max_tokens_cuts_a_longer_answer(llm: LLM, decoder: str) -> None:
    # One slot of the whole length each time, so that nothing but the cut differs.
    slots = SlotParams(slot_size=4, block_size=4)
    longest = llm.generate(["a fox"], SamplingParams(max_tokens=12), slots, decoder)[0]
    for max_tokens in (1, 3, 5, 12):
        output = llm.generate(["a fox"], SamplingParams(max_tokens=max_tokens), slots, decoder)[0]
        assert output.token_ids == longest.token_ids[:max_tokens]
        assert output.finish_reason == "length"
        assert output.stats.num_tokens == max_tokens


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_context_may_be_filled_to_the_last_token(llm: LLM, decoder: str) -> None:
    # Slots reach beyond the last wanted token, and so beyond the context.
    output = llm.generate([[7] * 250], SamplingParams(max_tokens=6), SLOTS, decoder)[0]
    assert len(output.token_ids) == 6


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stop_id_ends_the_answer_like_eos(llm: LLM, decoder: str) -> None:
    free = llm.generate(["a fox"], SamplingParams(max_tokens=20), SLOTS, decoder)[0].token_ids
    stop = free[7]
    output = llm.generate(["a fox"], SamplingParams(max_tokens=20, stop_token_ids=(stop,)), SLOTS, decoder)[0]
    assert output.finish_reason == "stop"
    assert output.token_ids[-1] == stop
    assert stop not in output.token_ids[:-1]


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_text_ends_before_the_first_stop_string(llm: LLM, decoder: str) -> None:
    sampling: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 4}
    free = llm.generate(["a fox"], SamplingParams(**sampling), SLOTS, decoder)[0]
    assert len(free.text) > 11, "another seed is needed"
    stops = (free.text[9:11], free.text[4:6], "never in it")
    output = llm.generate(["a fox"], SamplingParams(**sampling, stop=stops), SLOTS, decoder)[0]
    assert output.text == free.text[: min(free.text.find(stop) for stop in stops[:2])]
    assert output.finish_reason == "stop"
    # The tokens reach as far as the stop string, and what was generated counts.
    assert output.token_ids == free.token_ids[: len(output.token_ids)]
    assert len(output.token_ids) <= output.stats.num_tokens <= len(free.token_ids)


def test_eos_is_part_of_the_tokens_and_not_of_the_text(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    free = llm.generate(["a fox"], SamplingParams(max_tokens=20), SLOTS)[0].token_ids
    monkeypatch.setattr(llm, "eos_ids", lambda: (free[5],))
    output = llm.generate(["a fox"], SamplingParams(max_tokens=20), SLOTS)[0]
    assert output.token_ids[-1] == free[5]
    assert output.finish_reason == "stop"


@pytest.mark.parametrize("decoder", DECODERS)
def test_specials_and_rows_past_the_tokenizer_are_never_emitted(llm: LLM, decoder: str) -> None:
    # The model has 264 rows, the tokenizer 262 ids; 0-5 are special, 2 is EOS.
    assert llm.banned_ids().tolist() == [0, 1, 3, 4, 5, 262, 263]
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=40, temperature=3.0), SLOTS, decoder)
    assert not {token for output in outputs for token in output.token_ids} & {0, 1, 3, 4, 5, 262, 263}


# ---- what a caller reads ----


def test_statistics_count_tokens_through_eos_and_forwards(llm: LLM) -> None:
    output = llm.generate(["a fox"], SamplingParams(max_tokens=10), SLOTS)[0]
    stats = output.stats
    assert stats.num_tokens == len(output.token_ids) == 10
    assert stats.tokens_per_forward == 10 / stats.num_forwards
    assert stats.tokens_per_second == 10 / stats.seconds
    autoregressive = llm.generate(["a fox"], SamplingParams(max_tokens=10), decoder="autoregressive")[0]
    assert autoregressive.stats.tokens_per_forward == 1.0


def test_answers_are_handed_out_as_they_are_finished(llm: LLM) -> None:
    found: dict[int, RequestOutput] = {}

    def on_output(index: int, output: RequestOutput) -> None:
        assert index not in found
        found[index] = output

    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=12, temperature=1.0), SLOTS, on_output=on_output, batch_size=2)
    assert [found[index] for index in range(len(PROMPTS))] == outputs


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stream_is_the_text_in_pieces(llm: LLM, decoder: str) -> None:
    sampling = SamplingParams(max_tokens=30, temperature=1.0, seed=4)
    expected = llm.generate(["a fox"], sampling, SLOTS, decoder)[0].text
    pieces = list(llm.stream("a fox", sampling, SLOTS, decoder))
    assert "".join(pieces) == expected
    assert len(pieces) > 2
    assert all(pieces)


def test_streams_side_by_side_do_not_disturb_each_other(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=4)
    expected = [llm.generate([prompt], sampling, SLOTS)[0].text for prompt in ("a fox", "zebra")]
    streams = [llm.stream(prompt, sampling, SLOTS) for prompt in ("a fox", "zebra")]
    texts = ["", ""]
    for pieces in zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == expected


def test_closing_a_stream_aborts_its_request(llm: LLM) -> None:
    stream = llm.stream("a fox", SamplingParams(max_tokens=200), SLOTS, "autoregressive")
    next(stream)
    assert llm.engine.scheduler.num_open == 1
    stream.close()
    assert llm.engine.scheduler.num_open == 0
    assert llm.generate(["owl"], SamplingParams(max_tokens=4), SLOTS)[0].token_ids


def test_auto_decodes_like_one_of_the_two(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refusion.engine.build.measured_costs", lambda _: CostTable((1, 100), (1.0, 1.0)))
    sampling = SamplingParams(max_tokens=8)
    by_kind = {kind: llm.generate(["a fox"], sampling, SLOTS, kind)[0].token_ids for kind in DECODERS}
    output = llm.generate(["a fox"], sampling, SLOTS, "auto")[0]
    assert output.token_ids == by_kind[output.decoder]


def test_prompts_are_text_ids_or_messages(llm: LLM) -> None:
    assert llm.tokenizer is not None
    messages = [{"role": "user", "content": "hello"}]
    outputs = llm.generate(["hello", llm.tokenizer.encode("hello"), messages], SamplingParams(max_tokens=4))
    assert outputs[0].prompt_ids == outputs[1].prompt_ids
    assert outputs[0].token_ids == outputs[1].token_ids
    assert list(outputs[2].prompt_ids) == llm.tokenizer.encode_chat(messages)


def test_a_cpu_has_nothing_to_warm_up(llm: LLM) -> None:
    assert llm.warm_up(("refusion", "autoregressive", "auto"), batch_size=2, sampling=SamplingParams(max_tokens=8), slots=SLOTS) == 0


def test_a_quantised_model_answers_through_its_engine_alone(llm: LLM) -> None:
    class EightBits(PlainOps):
        def prepare(self, weight: torch.Tensor) -> QuantizedWeight:  # type: ignore[override]
            return quantize(weight, "int8")

    model = Transformer.from_pretrained(llm.path)
    network = moved_network(model, EightBits(model.config, model.dtype), torch.device("cpu"))
    quantised = LLM(llm.path, model, llm.tokenizer, network=network)
    outputs = quantised.generate(["a fox"], SamplingParams(max_tokens=8), SLOTS)
    assert outputs[0].stats.num_tokens >= 1
    with pytest.raises(RequestError, match="without quantization"):
        quantised.forward_fn()


def test_no_prompts_no_answers(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_slot_settings_left_out_come_from_the_checkpoint(edited_model: Callable[..., Path]) -> None:
    path = edited_model(refusion={"slots": {"cpu": {"slot_size": 2, "block_size": 2}, "cuda": {"slot_size": 16}}})
    llm = LLM.from_pretrained(path, dtype="float32")
    by_checkpoint = llm.generate(["a fox"], SamplingParams(max_tokens=12))[0]
    by_hand = llm.generate(["a fox"], SamplingParams(max_tokens=12), SlotParams(slot_size=2, block_size=2))[0]
    assert by_checkpoint.stats.num_forwards == by_hand.stats.num_forwards


def test_a_checkpoint_without_a_tokenizer_takes_token_ids(golden_dir: Path) -> None:
    llm = LLM.from_pretrained(golden_dir / "tiny-refusion")
    trace = next(trace for trace in json.loads((golden_dir / "decode.json").read_text()) if trace["clean"])
    names = ("slot_size", "serial_blocks", "slot_threshold", "token_threshold")
    slots = SlotParams(**{name: trace[name] for name in names}, acceptance="paper", correction="paper")
    output = llm.generate([trace["prompt_ids"]], SamplingParams(max_tokens=trace["gen_length"]), slots)[0]
    assert list(output.token_ids) == trace["output_ids"]
    assert output.text == ""
    with pytest.raises(RequestError, match="has no tokenizer; give token ids"):
        llm.generate(["text"])
    with pytest.raises(RequestError, match="use stop_token_ids"):
        llm.generate([[3]], SamplingParams(stop=("x",)))


def test_a_checkpoint_in_the_published_layout_opens_without_its_code(tmp_path: Path) -> None:
    """Model type qwen3, a spare row of the padded vocabulary as mask token, and a pointer to remote code that nobody follows."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    Qwen3ForCausalLM(Qwen3Config(**shape, vocab_size=151936, eos_token_id=151645, tie_word_embeddings=False)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"mask_token_id": 151670, "auto_map": {"AutoModelForCausalLM": "modeling_refusion.ReFusion"}, "architectures": ["ReFusion"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM.from_pretrained(tmp_path)
    assert llm.config.mask_token_id == 151670
    output = llm.generate([[9707, 11, 1879]], SamplingParams(max_tokens=9), SlotParams(slot_size=4))[0]
    assert 0 < len(output.token_ids) <= 9
    assert 151670 not in output.token_ids


# ---- what cannot be served ----


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 1 is empty; give it some text"),
        ([], "prompt 1 is empty"),
        ([3, 264], r"prompt 1 has token id 264; ids of this model are 0 \.\. 263"),
        ([-1], "prompt 1 has token id -1"),
        ("x" * 256, r"prompt 1 has 256 tokens, with room for an answer more than the context of 256; shorten the prompt"),
        ("x" * 250, r"prompt 1 has 250 tokens and max_tokens is 8, together more than the context of 256; .* lower max_tokens to 6"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_named_before_anything_runs(
    llm: LLM, prompt: Prompt, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refusion.engine.core.Engine.step", lambda _: pytest.fail("something ran"))
    with pytest.raises(RequestError, match=message):
        llm.generate(["fine", prompt], SamplingParams(max_tokens=8))


def test_a_single_string_is_no_list_of_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="put it in a list"):
        llm.generate("hello")


def test_an_unknown_decoder_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="unknown decoder 'magic'; use one of refusion, autoregressive, auto, masked_diffusion"):
        llm.generate(["a fox"], SamplingParams(max_tokens=4), decoder="magic")


def test_slot_settings_that_do_not_fit_the_checkpoint_are_refused(edited_model: Callable[..., Path]) -> None:
    llm = LLM.from_pretrained(edited_model(refusion={"slots": {"cpu": {"slot_size": 8}}}))
    with pytest.raises(ConfigError, match="block_size is 12"):
        llm.generate(["a fox"], SamplingParams(max_tokens=4), SlotParams(block_size=12))


def test_a_checkpoint_without_mask_token_decodes_autoregressively_only(edited_model: Callable[..., Path]) -> None:
    llm = LLM.from_pretrained(edited_model(mask_token_id=None))
    with pytest.raises(CheckpointError, match="has no mask token; add one with `refusion convert`"):
        llm.generate(["a fox"], SamplingParams(max_tokens=4))
    assert len(llm.generate(["a fox"], SamplingParams(max_tokens=4), decoder="autoregressive")[0].token_ids) == 4


# ---- interruptions ----


@pytest.mark.parametrize("decoder", DECODERS)
def test_ctrl_c_keeps_what_is_finished(llm: LLM, decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingParams(max_tokens=6)
    expected = llm.generate(PROMPTS, sampling, SLOTS, decoder)
    finished: list[int] = []
    step = Engine.step

    def interrupted_step(self: Engine) -> None:
        if len(finished) >= 2:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "step", interrupted_step)
        with pytest.raises(GenerationInterrupted) as interrupted:
            llm.generate(PROMPTS * 50, sampling, SLOTS, decoder, on_output=lambda index, _: finished.append(index))
    outputs = interrupted.value.outputs
    assert list(outputs) == finished
    assert 2 <= len(outputs) < 10
    assert all(output.token_ids == expected[index % len(PROMPTS)].token_ids for index, output in outputs.items())
    assert not llm.engine.has_work
    assert tokens(llm.generate(PROMPTS, sampling, SLOTS, decoder)) == tokens(expected)  # and it can be used again


def test_a_stream_beside_a_batch_that_breaks_off_says_so(llm: LLM) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no more")

    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=40), SLOTS)
    next(stream)
    with pytest.raises(ValueError, match="no more"):
        llm.generate(PROMPTS, SamplingParams(max_tokens=2), SLOTS, on_output=refuse)
    with pytest.raises(RequestError, match="was reset while this answer was written"):
        list(stream)
    assert not llm.engine.has_work


@pytest.mark.parametrize("decoder", DECODERS)
def test_ctrl_c_in_a_stream_leaves_an_engine_that_answers_rightly(llm: LLM, decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while a report is waited for, and on a GPU the next forward is under way by then."""
    monkeypatch.setattr(llm.engine.runner, "runs_ahead", True)
    sampling, waits, wait = SamplingParams(max_tokens=12), iter(range(99)), Pending.wait
    expected = llm.generate(PROMPTS, sampling, SLOTS, decoder)

    def interrupted_wait(self: Pending) -> Any:
        if next(waits) == 2:
            raise KeyboardInterrupt
        return wait(self)

    with monkeypatch.context() as patched:
        patched.setattr(Pending, "wait", interrupted_wait)
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream(PROMPTS[0], sampling, SLOTS, decoder))
    assert not llm.engine.has_work
    assert tokens(llm.generate(PROMPTS, sampling, SLOTS, decoder)) == tokens(expected)


def test_a_fault_under_way_leaves_a_usable_engine(llm: LLM) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPTS, SamplingParams(max_tokens=8), SLOTS, on_event=fail)
    assert not llm.engine.has_work
    assert llm.generate(["a fox"], SamplingParams(max_tokens=4), SLOTS)[0].token_ids


def test_prompts_that_memory_does_not_suffice_for_leave_the_others_their_answers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = llm.engine.runner.launch

    def failing_launch(lane: object, **shape: object) -> object:
        if shape["prompt"] is not None and 244 in shape["prompt"].token_ids:  # type: ignore[attr-defined]
            raise RequestError("out of memory in a forward; lower max_num_seqs")
        return launch(lane, **shape)  # type: ignore[arg-type]

    monkeypatch.setattr(llm.engine.runner, "launch", failing_launch)
    with pytest.raises(GenerationFailed, match="lower max_num_seqs") as failed:
        llm.generate([[7, 8], [244, 9], [10]], SamplingParams(max_tokens=4), SLOTS)
    assert sorted(failed.value.outputs) == [0, 2]


def test_a_cache_too_small_for_a_prompt_is_named_before_anything_runs(tiny_model_dir: Path) -> None:
    llm = LLM.from_pretrained(tiny_model_dir, dtype="float32", engine=EngineSettings(cache_tokens=32))
    with pytest.raises(RequestError, match=r"prompt 1 has 30 tokens and max_tokens is 8, .* KV cache of 32 tokens .* raise cache_tokens"):
        llm.generate(["fine", [7] * 30], SamplingParams(max_tokens=8))


@pytest.mark.parametrize("settings", [{"max_num_seqs": 0}, {"page_size": 12}, {"gpu_memory_fraction": 1.5}, {"cache_tokens": -1}], ids=str)
def test_engine_settings_out_of_range_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EngineSettings(**settings)


def test_devices_and_dtypes_that_are_not_there_are_named(tiny_model_dir: Path) -> None:
    for options, message in (
        ({"device": "abacus"}, "unknown device 'abacus'; use cpu or cuda"),
        ({"dtype": "int3"}, "unknown dtype 'int3'; use float32 or bfloat16"),
    ):
        with pytest.raises(RequestError, match=message):
            LLM.from_pretrained(tiny_model_dir, **options)
    for quantization, message in (
        ("int8", "quantization 'int8' needs a GPU; leave it out on device 'cpu'"),
        ("int3", "unknown quantization 'int3'; use int8 or float8"),
    ):
        with pytest.raises(RequestError, match=message):
            LLM.from_pretrained(tiny_model_dir, quantization=quantization)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="batch_invariant needs a GPU; on device 'cpu' load with dtype float32"):
        LLM.from_pretrained(tiny_model_dir, engine=EngineSettings(batch_invariant=True))
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="no CUDA device is available"):
            LLM.from_pretrained(tiny_model_dir, device="cuda")


def test_an_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean smollm2-135m"):
        LLM.from_pretrained("smollm-135m")
