"""`refusion models`: the named models, what is here and what can be had."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, pull, locate and remove the named models.")

_Name = Annotated[str, typer.Argument(help="A name from `refusion models list`.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@app.command("list")
def list_command(as_json: _Json = False) -> None:
    """Show every named model and whether it lies in the cache.

    \b
    refusion models list
    refusion models list --json
    """
    from refusion import hub

    models = hub.list_models()
    if as_json:
        _print_json([_to_dict(model) for model in models])
        return
    width = max(len(model.name) for model in models)
    for model in models:
        state = f"{model.num_bytes / 1e6:.0f} MB" if model.is_pulled else "not pulled"
        typer.echo(f"{model.name:<{width}}  {state:>10}  {model.description} ({model.license})")


@app.command()
def pull(name: _Name, as_json: _Json = False) -> None:
    """Download and convert a model; nothing happens if it is there and current. Prints its directory.

    \b
    refusion models pull smollm2-135m
    """
    from refusion import hub

    path = hub.pull(name)
    if as_json:
        _print_json(next(_to_dict(model) for model in hub.list_models() if model.name == name))
    else:
        typer.echo(path)


@app.command()
def path(name: _Name, as_json: _Json = False) -> None:
    """Print the directory of a model that was pulled.

    \b
    ls "$(refusion models path smollm2-135m)"
    """
    from refusion import hub
    from refusion.errors import CheckpointError

    hub.model_path(name)  # an unknown name is the more useful complaint
    model = next(model for model in hub.list_models() if model.name == name)
    if not model.is_pulled:
        raise CheckpointError(f"{name} is not here; fetch it with `refusion models pull {name}`")
    if as_json:
        _print_json(_to_dict(model))
    else:
        typer.echo(model.path)


@app.command()
def remove(name: _Name, as_json: _Json = False) -> None:
    """Delete a model from the cache, unfinished downloads included.

    \b
    refusion models remove smollm2-135m
    """
    from refusion import hub

    is_removed = hub.remove(name)
    if as_json:
        _print_json({"name": name, "is_removed": is_removed})
    else:
        typer.echo(f"removed {name}" if is_removed else f"{name} was not here", err=True)


def _to_dict(model) -> dict[str, object]:
    from dataclasses import asdict

    return {**asdict(model), "path": str(model.path)}


def _print_json(content: object) -> None:
    import json

    typer.echo(json.dumps(content, indent=2))
