"""Usage errors: one line on standard error and exit code 2, whoever notices them, the parser of the flags or the settings behind them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from refusion.errors import ConfigError

UsageError: Any = typer.BadParameter.__bases__[0]
"""What Typer raises for a flag, argument or verb that it cannot use; it exports only this descendant."""


@contextmanager
def refused_settings() -> Iterator[None]:
    """Settings that are refused in here came from the command line: a usage error."""
    try:
        yield
    except ConfigError as error:
        typer.echo(f"refusion: error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


def fail(error: Any) -> NoReturn:
    """Print a `UsageError` and exit; without any arguments, where help was promised, that is the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        message = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx is not None else ""
        print(f"refusion: error: {message}{hint}", file=sys.stderr)
    sys.exit(error.exit_code)
