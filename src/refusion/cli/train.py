"""`refusion train`: parse, call `refusion.training.run.train`, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file; see recipes/.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; may be given several times."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output directory.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="Directory of the run (default: run.output of the recipe).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Train a ReFusion model (or its autoregressive twin) as a recipe says; the model ends up in OUTPUT/final.

    Examples:

        refusion train recipes/tiny.toml

        refusion train recipes/smollm2-135m.toml --set optimizer.learning_rate=3e-4 --output runs/low-lr

        refusion train recipes/smollm2-135m.toml --set 'data.sources=["a.jsonl.gz", {path="b.jsonl", weight=2}]' --resume
    """
    import dataclasses
    import json

    from refusion.training.recipe import load_recipe

    settings = load_recipe(recipe, set_ or [])

    from refusion.training.run import train

    report = train(settings, output=output, resume=resume, report=lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    elif report.model:
        typer.echo(report.model)
    else:
        typer.echo(f"stopped after step {report.steps} of {report.max_steps}; go on with --resume", err=True)
