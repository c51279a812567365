from __future__ import annotations

import errno
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refusion import __version__
from refusion.cli import main as cli
from refusion.errors import ConfigError

Run = Callable[..., tuple[int, str, str]]

TOY_RECIPE = """
[model]
base = "toy"
[data]
sources = [{ toy = 20 }]
pack_length = 128
rows_per_step = 2
[optimizer]
learning_rate = 1e-3
[run]
output = "unused"
max_steps = 3
tensorboard = false
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"refusion {__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in cli.COMMANDS)


def test_help_imports_nothing_heavy_and_is_instant() -> None:
    script = (
        "import sys\n"
        "from refusion.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 5  # measured well under a second; a loaded machine gets some room


@pytest.mark.parametrize(
    "arguments",
    [
        ["modls"],
        ["--nonsense"],
        ["models", "pull"],
        ["models", "pull", "a", "b"],
        ["convert", "--x"],
        ["generate", "--decoder", "fast", "hi"],
    ],
)
def test_usage_errors_exit_with_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("refusion: error: ")
    assert err.count("\n") == 1


def test_no_arguments_at_all_show_the_help(run: Run) -> None:
    code, _, err = run()
    assert code == 2
    assert "Usage: refusion" in err


def test_an_unknown_model_is_one_line_and_exits_with_1(run: Run) -> None:
    code, out, err = run("models", "pull", "smollm2-135m-refuson")
    assert (code, out) == (1, "")
    assert err == "refusion: error: no model named 'smollm2-135m-refuson'; did you mean smollm2-135m-refusion or smollm2-135m?\n"


def _with_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def command() -> None:
        raise error

    monkeypatch.setattr(cli, "_load", lambda target: command)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("slot_size is 0,\nallowed is 1 or more"), "slot_size is 0, allowed is 1 or more"),
        (OSError(errno.ENOSPC, "No space left on device", "out.jsonl"), "cannot write out.jsonl: No space left on device"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "this needs peft; install it with `pip install 'refusion[train]'`"),
    ],
)
def test_expected_failures_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, line: str) -> None:
    _with_command(monkeypatch, error)
    assert run("train") == (1, "", f"refusion: error: {line}\n")


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_command(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_models_verbs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSION_HOME", str(tmp_path))
    code, out, _ = run("models", "list")
    assert code == 0
    assert "smollm2-135m " in out
    assert "not pulled" in out
    listed = json.loads(run("models", "list", "--json")[1])
    assert [(model["name"], model["is_pulled"]) for model in listed] == [("smollm2-135m", False), ("smollm2-135m-refusion", False)]
    code, out, err = run("models", "path", "smollm2-135m")
    assert (code, out) == (1, "")
    assert "refusion models pull smollm2-135m" in err
    assert run("models", "remove", "smollm2-135m") == (0, "", "smollm2-135m was not here\n")


def test_models_pull_and_path_print_the_directory(run: Run, base_model_dir: Path) -> None:
    assert run("models", "pull", "smollm2-135m") == (0, f"{base_model_dir}\n", "")
    assert run("models", "path", "smollm2-135m")[1] == f"{base_model_dir}\n"
    assert json.loads(run("models", "path", "smollm2-135m", "--json")[1])["path"] == str(base_model_dir)


def test_convert_prints_the_new_directory(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    code, out, err = run("convert", str(tiny_model_dir), str(tmp_path / "out"))
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert err == "mask token <|mask|> (id 5, kept)\n"
    code, out, _ = run("convert", str(tiny_model_dir), str(tmp_path / "again"), "--json")
    assert json.loads(out)["mask_token"]["token_id"] == 5
    code, _, err = run("convert", str(tiny_model_dir), str(tmp_path / "out"))
    assert code == 1
    assert "exists already" in err


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["nope.toml"], 2, "no recipe at nope.toml; see recipes/ for examples"),
        (["RECIPE", "--set", "learnig_rate=1"], 2, "unknown setting learnig_rate; did you mean optimizer.learning_rate?"),
        (["RECIPE", "--output", "OUT", "--resume"], 1, "OUT holds no checkpoint to resume from; leave --resume out to start a new run"),
        (["RECIPE", "--output", "RECIPE/run"], 1, "cannot write RECIPE/run: Not a directory; free some space or choose another place"),
    ],
)
def test_train_refuses_in_one_line(run: Run, tmp_path: Path, arguments: list[str], code: int, line: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(TOY_RECIPE)
    names = {"RECIPE": str(recipe), "OUT": str(tmp_path / "out")}

    def filled(text: str) -> str:
        return functools.reduce(lambda text, name: text.replace(name, names[name]), names, text)

    assert run("train", *map(filled, arguments)) == (code, "", f"refusion: error: {filled(line)}\n")


def test_ctrl_c_in_train_leaves_a_checkpoint_and_says_how_to_go_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refusion.training.trainer import RefusionTrainer

    compute_loss = RefusionTrainer.compute_loss

    def interrupted(self: RefusionTrainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        return compute_loss(self, *arguments, **options)

    recipe, output = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(TOY_RECIPE)
    monkeypatch.setattr(RefusionTrainer, "compute_loss", interrupted)
    code, out, err = run("train", str(recipe), "--output", str(output))
    assert (code, out) == (130, "")
    assert f"saved in {output}/checkpoint-2; the same command with --resume goes on from there\n" in err
    monkeypatch.undo()
    assert run("train", str(recipe), "--output", str(output), "--resume")[:2] == (0, f"{output}/final\n")


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_verb_has_help_with_an_example(run: Run, name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "refusion " in out
