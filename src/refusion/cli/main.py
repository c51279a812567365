"""The `refusion` command: finds the module of the verb, runs it, and turns errors into one line and an exit code.

Usage errors exit with 2, a `RefusionError` and a full disk with 1, without a traceback. Only the module of the verb that was asked for
is imported, so that `refusion --help` is instant.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from refusion import __version__
from refusion.cli import usage
from refusion.errors import RefusionError

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("refusion.cli.generate:command", "Answer one prompt."),
    "chat": ("refusion.cli.chat:command", "Talk with a model in the terminal."),
    "models": ("refusion.cli.models:app", "List, pull, locate and remove the named models."),
    "convert": ("refusion.cli.convert:command", "Give a Qwen3 or Llama checkpoint a mask token, merge an adapter."),
    "synthesize": ("refusion.cli.synthesize:command", "Let the base model write training data."),
    "train": ("refusion.cli.train:command", "Train a ReFusion model from a recipe."),
    "bench": ("refusion.cli.bench:command", "Measure a checkpoint on this machine: speed of every decoder."),
    "eval": ("refusion.cli.eval:command", "Run the paper's benchmarks."),
}
"""Verb -> (module:attribute, line in the list). The attribute is a function with Typer annotations, or a Typer app of its own."""

_EXTRAS = {
    "accelerate": "train",
    "peft": "train",
    "tensorboard": "train",
    "datasets": "eval",
    "lm_eval": "eval",
    "matplotlib": "plot",
    "fastapi": "serve",
    "uvicorn": "serve",
}
"""Package -> the extra of this project that brings it."""

_FAILED_WRITES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = build_app(arguments)(arguments, prog_name="refusion", standalone_mode=False)
    except usage.UsageError as error:
        usage.fail(error)
    except RefusionError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        _fail(f"this needs {error.name}; install it with `pip install 'refusion[{_EXTRAS[error.name]}]'`")
    except OSError as error:
        if error.errno not in _FAILED_WRITES:
            raise
        _fail(f"cannot write {error.filename or 'the output'}: {error.strerror}")
    sys.exit(code if isinstance(code, int) else 0)  # what a command returns is None, what it raised as `typer.Exit` a number


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """The whole app, with only the verb that `arguments` name imported; of the others just name and help line are there."""
    app = typer.Typer(name="refusion", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(_root)
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (target, help_line) in COMMANDS.items():
        command = _load(target) if name == verb else _not_loaded
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, short_help=help_line)
        else:
            app.command(name, short_help=help_line)(command)
    return app


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"refusion {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)] = False,
) -> None:
    """ReFusion: language models that write slots of text in parallel.

    \b
    refusion generate --compare "Why is the sky blue?"
    refusion chat
    refusion models list
    """


def _load(target: str) -> Callable[..., None] | typer.Typer:
    module, attribute = target.split(":")
    return getattr(import_module(module), attribute)


def _not_loaded() -> None:
    """Stands in the list for a verb that was not asked for."""


def _fail(message: str) -> NoReturn:
    print(f"refusion: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
