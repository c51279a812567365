from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import RunCli

from refusion.llm import LLM, SamplingParams


def _turns(path: Path, questions: list[str], max_tokens: int) -> list[str]:
    """The answers of a conversation, through the Python interface."""
    llm, messages, answers = LLM.from_pretrained(path), [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answers.append(llm.generate([messages], SamplingParams(max_tokens=max_tokens))[0].text)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_piped_questions_are_one_conversation(run_cli: RunCli, tiny_model_dir: Path) -> None:
    result = run_cli("chat", "--model", tiny_model_dir, "--max-tokens", 8, stdin="hello\n\nand you?\n")
    assert result.code == 0
    assert result.out == "".join(f"{answer}\n" for answer in _turns(tiny_model_dir, ["hello", "and you?"], 8))
    assert result.err.count("tokens per forward") == 2


def test_reset_forgets_the_conversation(run_cli: RunCli, tiny_model_dir: Path) -> None:
    result = run_cli("chat", "--model", tiny_model_dir, "--max-tokens", 8, stdin="hello\n/reset\nhello\n")
    assert result.out == _turns(tiny_model_dir, ["hello"], 8)[0] + "\n" + _turns(tiny_model_dir, ["hello"], 8)[0] + "\n"
    assert "the conversation is forgotten" in result.err


def test_commands_answer_on_stderr_and_quit_ends(run_cli: RunCli, tiny_model_dir: Path) -> None:
    result = run_cli("chat", "--model", tiny_model_dir, "--max-tokens", 8, stdin="/help\n/decoder\n/what\n/quit\nhello\n")
    assert (result.code, result.out) == (0, "")
    for words in ("/reset", "decoder: autoregressive", "unknown command /what"):
        assert words in result.err


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(run_cli: RunCli, edited_model: Callable[..., Path]) -> None:
    model = edited_model(max_position_embeddings=60)
    result = run_cli("chat", "--model", model, "--max-tokens", 10, stdin="one fairly long question\nhello\n")
    assert result.code == 0
    assert "its oldest 1 turn(s) are forgotten" in result.err
    assert result.out.splitlines()[-1] == _turns(model, ["hello"], 10)[0].splitlines()[-1]


def test_a_question_longer_than_the_context_is_one_line_and_exit_code_1(run_cli: RunCli, tiny_model_dir: Path) -> None:
    result = run_cli("chat", "--model", tiny_model_dir, "--max-tokens", 8, stdin="x" * 300 + "\n")
    assert (result.code, result.out) == (1, "")
    assert "more than the context of 256" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("decoder", ["refusion", "autoregressive"])
def test_ctrl_c_ends_a_piped_conversation_with_130(
    run_cli: RunCli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("refusion.engine.core.Engine.step", interrupt)
    result = run_cli("chat", "--model", tiny_model_dir, "--decoder", decoder, "--max-tokens", 8, stdin="hello\n")
    assert (result.code, result.err) == (130, "stopped\n")


@pytest.mark.parametrize("flag", ["--slot-size 0", "--token-threshold 7"])
def test_a_bad_flag_is_exit_code_2(run_cli: RunCli, flag: str) -> None:
    result = run_cli("chat", "--model", "no-such-model", *flag.split())
    assert result.code == 2
    assert result.err.count("\n") == 1
