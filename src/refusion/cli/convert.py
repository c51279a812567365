"""`refusion convert`: a checkpoint in, the same checkpoint with a mask token out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from refusion.cli.usage import refused_settings


class DtypeName(StrEnum):
    """What weights can be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(
    source: Annotated[str, typer.Argument(help="Named model or directory of a Qwen3 or Llama checkpoint.")],
    target: Annotated[Path, typer.Argument(help="New directory to write.")],
    mask_token: Annotated[str, typer.Option(help="`auto`, or the text of the token to use.")] = "auto",
    adapter: Annotated[Path | None, typer.Option(help="Directory of a PEFT LoRA adapter to merge.")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="What the weights are written in; by default as they are.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Give a checkpoint a mask token and, if asked, merge an adapter; writes the plain hub layout with a model card.

    \b
    refusion convert ./Qwen3-8B ./qwen3-8b-masked
    refusion convert ./Llama-3.1-8B ./out --mask-token '<|reserved_special_token_0|>'
    refusion convert smollm2-135m ./merged --adapter runs/lora/final --dtype bfloat16
    """
    import json
    from dataclasses import asdict

    from refusion import hub
    from refusion.convert import convert

    path = hub.resolve(source)
    with refused_settings():
        mask = convert(path, target, mask_token=mask_token, adapter=adapter, dtype=dtype.value if dtype else None)
    if as_json:
        typer.echo(json.dumps({"path": str(target), "mask_token": asdict(mask)}))
    else:
        typer.echo(f"mask token {mask.text or ''} (id {mask.token_id}, {mask.origin})".replace("  ", " "), err=True)
        typer.echo(target)
