"""`refusion train`: parse, call `refusion.training.run.train`, print."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refusion.cli import options
from refusion.cli.usage import refused_settings

if TYPE_CHECKING:
    from refusion.training.recipe import Recipe


def command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file; see recipes/.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; may be given several times."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output directory.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="Directory of the run (default: run.output of the recipe).")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the memory and time that the run would take here, and end.")] = False,
    push: Annotated[str, typer.Option("--push", metavar="OWNER/NAME", help="Upload the finished model to this hub repository.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Train a ReFusion model (or its autoregressive twin) as a recipe says; the model ends up in OUTPUT/final.

    Examples:

        refusion train recipes/tiny.toml

        refusion train recipes/smollm2-135m.toml --set optimizer.learning_rate=3e-4 --output runs/low-lr

        refusion train recipes/smollm2-135m.toml --plan

        refusion train recipes/smollm2-135m.toml --set 'data.sources=["a.jsonl.gz", {path="b.jsonl", weight=2}]' --resume
    """
    import dataclasses
    import json

    from refusion.training.recipe import load_recipe

    with refused_settings():
        settings = load_recipe(recipe, set_ or [])
    if plan:
        _print_plan(settings, as_json)
        return
    with options.interruptible():
        import accelerate  # noqa: F401  (transformers tells of its absence in a riddle)

        from refusion.training.run import train

        probe_factory = None
        if settings.run.probe_steps:
            from refusion.cli.probe import make_probe as probe_factory

        report = train(
            settings,
            output=output,
            resume=resume,
            push=push,
            probe_factory=probe_factory,
            report=lambda line: typer.echo(line, err=True) if _is_first_process() else None,
        )
    if not _is_first_process():
        return
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    elif report.model:
        typer.echo(report.model)
    if not report.model:
        saved = f"stopped after step {report.steps} of {report.max_steps}, saved in {report.output}/checkpoint-{report.steps}"
        typer.echo(f"{saved}; the same command with --resume goes on from there", err=True)
    if report.is_interrupted:
        raise typer.Exit(130)


def _print_plan(recipe: Recipe, as_json: bool) -> None:
    import dataclasses
    import json

    from refusion.training.plan import format_plan, hardware_at_hand, make_plan, memory_advice

    hardware = hardware_at_hand()
    plan = make_plan(recipe, hardware)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(plan), "fits": plan.fits}))
    else:
        typer.echo(format_plan(recipe, plan, [] if plan.fits else memory_advice(recipe, hardware)))


def _is_first_process() -> bool:
    """Of the processes that torchrun or accelerate starts, one talks."""
    return os.environ.get("RANK", "0") == "0"
