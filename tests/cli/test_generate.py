from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import RunCli

from refusion.decoding.diffusion_params import DiffusionParams
from refusion.decoding.events import Event
from refusion.llm import LLM, BlockDiffusionParams, MaskedDiffusionParams, SamplingParams, SlotParams

CHAT = [{"role": "user", "content": "hello"}]


def _expected(path: Path, **sampling: object) -> str:
    return LLM.from_pretrained(path, dtype="float32").generate([CHAT], SamplingParams(**sampling))[0].text  # type: ignore[arg-type]


def test_the_text_goes_to_stdout_and_its_cost_to_stderr(run_cli: RunCli, tiny_model_dir: Path) -> None:
    result = run_cli("generate", "--model", tiny_model_dir, "--dtype", "float32", "--max-tokens", 24, "hello")
    assert (result.code, result.out) == (0, _expected(tiny_model_dir, max_tokens=24) + "\n")
    cost = r"\d+ tokens in \d+ forwards \(\d+\.\d\d tokens per forward\), [\d.]+ tokens/s"
    assert re.fullmatch(
        rf"{cost}; slots of 8 in blocks of 8, thresholds 0.9/0.4, argmax acceptance, autoregressive correction\n", result.err
    )


@pytest.mark.parametrize("decoder", ["refusion", "autoregressive"])
@pytest.mark.parametrize("flags", [(), ("--watch",), ("--slot-size", 4, "--block-size", 16), ("--stop", "a", "--stop", "e")], ids=str)
def test_a_terminal_shows_the_same_text_as_a_pipe(run_cli: RunCli, tiny_model_dir: Path, decoder: str, flags: tuple[object, ...]) -> None:
    command = ("generate", "--model", tiny_model_dir, "--decoder", decoder, "--max-tokens", 24, *flags, "--temperature", 1.0, "hello")
    on_terminal, piped = run_cli(*command, terminal=True), run_cli(*command)
    assert (on_terminal.code, piped.code) == (0, 0)
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", on_terminal.out)
    assert shown.endswith(piped.out) if "--watch" in flags else shown == piped.out


def test_slots_that_slide_can_be_watched(run_cli: RunCli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refusion.cli.watch import SlotBoard

    seen: list[Event] = []
    push = SlotBoard.push

    def noted(board: SlotBoard, event: Event) -> None:
        seen.append(event)
        push(board, event)

    monkeypatch.setattr(SlotBoard, "push", noted)
    slots = ("--sliding", "--slot-size", 8, "--infill-length", 4, "--alternatives", 2, "--token-threshold", 0.1)
    command = ("generate", "--model", tiny_model_dir, "--dtype", "float32", "--max-tokens", 24, *slots, "hello")
    watched, piped = run_cli(*command, "--watch", terminal=True), run_cli(*command)
    assert (watched.code, piped.code) == (0, 0)
    assert re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", watched.out).endswith(piped.out)
    assert {event.kind for event in seen} >= {"planned", "verified", "committed", "finished"}
    num_written = 0
    for event in seen:
        if event.kind != "finished":
            assert event.offset == num_written
        if event.kind == "committed":
            num_written += len(event.token_ids)


def test_standard_input_is_one_prompt(run_cli: RunCli, tiny_model_dir: Path) -> None:
    command = ("generate", "--model", tiny_model_dir, "--max-tokens", 8)
    assert run_cli(*command, "-", stdin="two\nlines\n").out == run_cli(*command, "two\nlines").out


def test_json_is_one_object_and_stderr_is_silent(run_cli: RunCli, tiny_model_dir: Path) -> None:
    result = run_cli("generate", "--model", tiny_model_dir, "--max-tokens", 12, "--slot-size", 4, "--json", "hello")
    assert (result.code, result.err) == (0, "")
    answer = result.json
    assert answer["slots"]["slot_size"] == 4
    assert answer["decoder"] == "refusion"
    assert answer["num_tokens"] == len(answer["token_ids"]) <= 12
    assert answer["tokens_per_forward"] == answer["num_tokens"] / answer["num_forwards"]


def test_autoregressive_json_has_no_slot_settings(run_cli: RunCli, tiny_model_dir: Path) -> None:
    answer = run_cli("generate", "--model", tiny_model_dir, "--max-tokens", 5, "--decoder", "autoregressive", "--json", "hello").json
    assert "slots" not in answer
    assert answer["tokens_per_forward"] == 1.0


def test_auto_says_what_it_chose(run_cli: RunCli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refusion.engine.costs import CostTable

    monkeypatch.setattr("refusion.engine.build.measured_costs", lambda _: CostTable((1, 100), (0.01, 1.0)))
    answer = run_cli("generate", "--model", tiny_model_dir, "--max-tokens", 5, "--decoder", "auto", "--json", "hello").json
    assert answer["decoder"] == "autoregressive"  # every row costs, so one row a token is best
    assert "slots" not in answer


def test_a_cache_too_small_names_its_setting(run_cli: RunCli, tiny_model_dir: Path) -> None:
    result = run_cli("generate", "--model", tiny_model_dir, "--max-tokens", 40, "--cache-tokens", 32, "hello")
    assert (result.code, result.out) == (1, "")
    assert "lower max_tokens or raise cache_tokens" in result.err
    assert run_cli("generate", "--model", tiny_model_dir, "--max-tokens", 8, "--cache-tokens", 64, "hello").code == 0


def test_raw_continues_the_prompt_without_the_template(run_cli: RunCli, tiny_model_dir: Path) -> None:
    llm = LLM.from_pretrained(tiny_model_dir, dtype="float32")
    expected = llm.generate(["hello"], SamplingParams(max_tokens=8))[0]
    answer = run_cli("generate", "--model", tiny_model_dir, "--dtype", "float32", "--max-tokens", 8, "--raw", "--json", "hello").json
    assert answer["token_ids"] == list(expected.token_ids)


def test_slots_slide_where_they_are_asked_to(run_cli: RunCli, tiny_model_dir: Path) -> None:
    slots = SlotParams(slot_size=8, token_threshold=0.3, infill_length=3, alternatives=1, sliding=True)
    expected = LLM.from_pretrained(tiny_model_dir, dtype="float32").generate([CHAT], SamplingParams(max_tokens=20), slots)[0]
    flags = "--max-tokens 20 --sliding --slot-size 8 --token-threshold 0.3 --infill-length 3 --alternatives 1 --json"
    answer = run_cli("generate", "--model", tiny_model_dir, "--dtype", "float32", *flags.split(), "hello").json
    assert answer["token_ids"] == list(expected.token_ids)
    refused = run_cli("generate", "--model", tiny_model_dir, "--sliding", "--slot-size", 8, "--block-size", 16, "hello")
    assert refused.code == 2
    assert "--block-size is 16; it must be slot_size=8" in refused.err


def test_flags_build_the_settings_of_the_python_interface(run_cli: RunCli, tiny_model_dir: Path) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.8, seed=5)
    slots = SlotParams(
        slot_size=4,
        serial_blocks=2,
        slot_threshold=0.2,
        token_threshold=0.1,
        acceptance="paper",
        correction="autoregressive",
        alternatives=2,
        infill_length=2,
    )
    expected = LLM.from_pretrained(tiny_model_dir, dtype="float32").generate([CHAT], sampling, slots)[0]
    flags = (
        "--max-tokens 20 --temperature 0.9 --top-p 0.8 --seed 5 --slot-size 4 --serial-blocks 2 --slot-threshold 0.2 --token-threshold 0.1"
    )
    answer = run_cli(
        "generate",
        "--model",
        tiny_model_dir,
        "--dtype",
        "float32",
        *flags.split(),
        "--acceptance",
        "paper",
        "--correction",
        "autoregressive",
        "--alternatives",
        "2",
        "--infill-length",
        "2",
        "--json",
        "hello",
    ).json
    assert answer["token_ids"] == list(expected.token_ids)
    assert answer["num_forwards"] == expected.stats.num_forwards


def test_compare_decodes_with_the_model_and_with_its_base(
    run_cli: RunCli, edited_model: Callable[..., Path], tiny_checkpoints: dict[str, Path], tiny_model_dir: Path
) -> None:
    model = edited_model(refusion={"base": str(tiny_model_dir), "slots": {"cpu": {"slot_size": 4}}})
    result = run_cli("generate", "--model", model, "--max-tokens", 10, "--compare", "--json", "hello")
    assert (result.code, result.err) == (0, "")
    assert result.json["refusion"]["model"] == str(model)
    assert result.json["refusion"]["slots"]["slot_size"] == 4
    assert result.json["autoregressive"]["model"] == str(tiny_model_dir)
    assert result.json["autoregressive"]["tokens_per_forward"] == 1.0


def test_compare_falls_back_to_the_same_weights_and_prints_a_table(run_cli: RunCli, edited_model: Callable[..., Path]) -> None:
    model = edited_model(refusion={"training": {"base": "runs/gone"}})
    result = run_cli("generate", "--model", model, "--max-tokens", 10, "--compare", "hello")
    assert result.code == 0
    assert "same weights" in result.err
    for row in ("text", "tokens", "forwards", "tokens per forward", "seconds", "tokens/s"):
        assert re.search(rf"│ {row} ", result.out)


@pytest.mark.parametrize("flags", [(), ("--watch",)], ids=str)
@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_prints_what_was_final_and_exits_with_130(
    run_cli: RunCli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], terminal: bool
) -> None:
    from refusion.engine.core import Engine

    step = Engine.step
    num_steps = 0

    def interrupted_step(self: Engine) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 8:  # a step tells of the forward before it: six tokens have been told by then
            raise KeyboardInterrupt
        step(self)

    command = ("generate", "--model", tiny_model_dir, "--decoder", "autoregressive", *flags, "hello", "--max-tokens")
    whole = run_cli(*command, 6)
    monkeypatch.setattr(Engine, "step", interrupted_step)
    result = run_cli(*command, 24, terminal=terminal)
    notice = "--watch draws on a terminal only; here comes the text alone\n" if flags and not terminal else ""
    assert (result.code, result.err) == (130, f"{notice}stopped\n")
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", result.out).splitlines()[-1]
    assert shown
    assert whole.out.startswith(shown)


BAD_FLAGS = {
    "--slot-threshold 1.5": "--slot-threshold is 1.5; it must be in [0, 1]",
    "--token-threshold -0.1": "--token-threshold is -0.1; it must be in [0, 1]",
    "--slot-size 0": "--slot-size is 0; it must be in [1, 256]",
    "--slot-size 4 --block-size 6": "--block-size is 6; it must be a multiple of slot_size=4",
    "--block-size 8 --serial-blocks 2": "--serial-blocks is 2; it must be left out where block_size is given",
    "--max-tokens 0": "--max-tokens is 0; it must be at least 1",
    "--top-p 0": "--top-p is 0.0; it must be in (0, 1]",
    "--temperature -1": "--temperature is -1.0; it must be 0 (greedy) or at least 0.001",
    "--cache-tokens 0": "--cache-tokens is 0; it must be at least 1",
    "--compare --decoder auto": "--compare and --decoder auto do not go together; leave one out",
    "--compare --watch": "--compare and --watch do not go together; leave one out",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_exit_code_2_before_anything_is_loaded(run_cli: RunCli, flags: str) -> None:
    result = run_cli("generate", "--model", "no-such-model", *flags.split(), "hello")
    assert (result.code, result.out, result.err) == (2, "", f"refusion: error: {BAD_FLAGS[flags]}\n")


def test_a_block_size_that_does_not_fit_the_slot_size_of_the_model_is_a_usage_error(
    run_cli: RunCli, edited_model: Callable[..., Path]
) -> None:
    model = edited_model(refusion={"slots": {"cpu": {"slot_size": 8}}})
    result = run_cli("generate", "--model", model, "--block-size", 12, "hello")
    assert (result.code, result.err) == (2, "refusion: error: --block-size is 12; it must be a multiple of slot_size=8\n")


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("",), "", "the prompt is empty; give it some text"),
        (("  \n",), "", "the prompt is empty; give it some text"),
        (("-",), "\n", "the prompt is empty; give it some text"),
        (("--model", "smollm2-135n", "hello"), "", "no model named 'smollm2-135n' and no such directory; did you mean smollm2-135m"),
        (("--model", "TINY", "--max-tokens", 8, "x" * 300), "", "more than the context of 256; shorten the prompt"),
        (("--model", "TINY", "--max-tokens", 8, "--device", "tpu", "hello"), "", "unknown device 'tpu'; use cpu or cuda"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(
    run_cli: RunCli, tiny_model_dir: Path, arguments: tuple[object, ...], stdin: str, message: str
) -> None:
    result = run_cli("generate", *(tiny_model_dir if argument == "TINY" else argument for argument in arguments), stdin=stdin)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("refusion: error: ")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_a_checkpoint_without_mask_token_says_how_to_get_one(run_cli: RunCli, edited_model: Callable[..., Path]) -> None:
    model = edited_model(mask_token_id=None)
    result = run_cli("generate", "--model", model, "--max-tokens", 8, "hello")
    assert (result.code, result.out) == (1, "")
    assert re.match(r"refusion: error: .* has no mask token; add one with `refusion convert`", result.err)
    assert run_cli("generate", "--model", model, "--max-tokens", 8, "--decoder", "autoregressive", "hello").code == 0


def test_a_checkpoint_without_tokenizer_is_refused(run_cli: RunCli, tiny_checkpoints: dict[str, Path]) -> None:
    result = run_cli("generate", "--model", tiny_checkpoints["qwen3"], "hello")
    assert result.code == 1
    assert "has no tokenizer.json" in result.err


def test_help_shows_runnable_examples(run_cli: RunCli) -> None:
    result = run_cli("generate", "--help")
    assert result.code == 0
    assert 'refusion generate --compare "' in result.out


def test_input_that_is_no_text_is_one_line(run_cli: RunCli, tiny_model_dir: Path) -> None:
    result = run_cli("generate", "--model", tiny_model_dir, "-", stdin="\udcff\udcfe")
    assert result.code == 1
    assert "standard input is not UTF-8 text" in result.err


@pytest.mark.parametrize(
    ("flags", "settings", "words"),
    [
        (
            "--decoder masked_diffusion --block-size 6 --steps 3 --block-cache dual --early-stop",
            MaskedDiffusionParams(block_size=6, steps=3, cache="dual", early_stop=True),
            "masked diffusion in blocks of 6, 3 steps a block, dual cache, early stop",
        ),
        ("--decoder masked_diffusion", MaskedDiffusionParams(), "masked diffusion in blocks of 32, 32 steps a block"),
        (
            "--decoder block_diffusion --block-size 4 --threshold 0.02",
            BlockDiffusionParams(block_size=4, threshold=0.02),
            "block diffusion in blocks of 4, threshold 0.02",
        ),
    ],
)
def test_diffusion_decoders_take_their_own_flags(
    run_cli: RunCli, tiny_model_dir: Path, flags: str, settings: DiffusionParams, words: str
) -> None:
    command = ("generate", "--model", tiny_model_dir, "--dtype", "float32", "--max-tokens", 12, *flags.split())
    decoder = flags.split()[1]
    (expected,) = LLM.from_pretrained(tiny_model_dir, dtype="float32").generate(
        [CHAT], SamplingParams(max_tokens=12), decoder=decoder, diffusion=settings
    )
    answer = run_cli(*command, "--json", "hello").json
    assert (answer["token_ids"], answer["decoder"]) == (list(expected.token_ids), decoder)
    assert answer["diffusion"]["block_size"] == settings.block_size
    assert "slots" not in answer
    said = run_cli(*command, "hello").err
    assert said.endswith(f"; {words}\n")
    assert f"was not trained for {decoder}; expect nonsense" in said
    assert run_cli(*command, "--watch", "hello", terminal=True).code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 3", "--steps has no effect on --decoder refusion; leave it out"),
        ("--decoder autoregressive --early-stop", "--early-stop has no effect on --decoder autoregressive"),
        ("--decoder block_diffusion --block-cache prefix", "--block-cache has no effect on --decoder block_diffusion"),
        ("--decoder masked_diffusion --slot-size 4", "--slot-size has no effect on --decoder masked_diffusion"),
        ("--decoder masked_diffusion --steps 40", "--steps is 40; it must be in [1, block_size=32]"),
        ("--decoder block_diffusion --steps 4 --threshold 0.5", "--threshold is 0.5; it must be left out where steps is given"),
    ],
)
def test_a_flag_without_effect_or_out_of_range_is_a_usage_error(run_cli: RunCli, flags: str, message: str) -> None:
    result = run_cli("generate", *flags.split(), "hello")
    assert (result.code, result.out) == (2, "")
    assert message in result.err
