"""`refusion synthesize`: the base model writes chat pairs about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from refusion.cli import options


def command(
    output: Annotated[Path, typer.Option(help="Directory of the shards; an unfinished one is continued.")],
    model: Annotated[str, typer.Option(help="Named model or directory of a causal checkpoint.")] = "smollm2-135m",
    num_pairs: Annotated[int | None, typer.Option(min=1, help="Pairs to keep; with --queries all of them by default.")] = None,
    queries: Annotated[Path | None, typer.Option(help="JSONL file (.gz too) whose queries are answered instead of own ones.")] = None,
    exclude: Annotated[list[Path] | None, typer.Option(help="JSONL file whose queries are never written; may be repeated.")] = None,
    query_temperature: Annotated[float, typer.Option(min=0, help="Temperature of the user turns.")] = 0.9,
    answer_temperature: Annotated[float, typer.Option(min=0, help="Temperature of the answers; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus the tokens are drawn from.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=1, help="Most probable tokens the nucleus is taken from.")] = 64,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of template, query and answer together.")] = 512,
    max_query_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a self-written user turn.")] = 80,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences sampled together: by default 4096 on cuda, if they fit, else 32.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[options.DtypeName | None, typer.Option(help="What the network computes in; by default bfloat16 on cuda.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same rows.")] = 0,
) -> None:
    """Write {"query", "response"} pairs with the base model.

    \b
    refusion synthesize --output runs/pairs --num-pairs 200
    refusion synthesize --output runs/pairs --num-pairs 100000 --device cuda --exclude heldout.jsonl
    refusion synthesize --output runs/greedy --queries old-pairs.jsonl.gz --device cuda
    """
    import time

    import torch

    from refusion import hub
    from refusion.atomic import make_directory
    from refusion.errors import ConfigError
    from refusion.model.config import ModelConfig
    from refusion.synthesis.jsonl import read_queries
    from refusion.synthesis.sampler import Sampler
    from refusion.synthesis.selfwritten import Progress, SelfWriter, SynthesisSettings
    from refusion.tokenizer import Tokenizer

    settings = SynthesisSettings(
        query_temperature=query_temperature, answer_temperature=answer_temperature, top_p=top_p, top_k=top_k, max_length=max_length,
        max_query_tokens=max_query_tokens, seed=seed,
    )  # fmt: skip
    with options.usage_errors():
        settings.answer_sampling()  # top_p is all that is left to check
        if queries is None and num_pairs is None:
            raise ConfigError("--num-pairs is needed unless --queries are given")
    make_directory(output)
    asked = None if queries is None else read_queries(queries)
    held_out = [query for path in exclude or [] for query in read_queries(path)]
    path = hub.resolve(model)
    ModelConfig.from_pretrained(path)  # refuses what is no checkpoint of ours, in one line
    sampler = Sampler(path, device=device, dtype=getattr(torch, dtype.value) if dtype else None)
    started = time.monotonic()

    def report(progress: Progress) -> None:
        seconds = time.monotonic() - started
        dropped = f" (most dropped: {progress.main_reason})" if progress.main_reason else ""
        typer.echo(
            f"{progress.num_pairs} pairs of {progress.num_drafts} drafts{dropped}, {progress.num_answer_tokens} answer tokens, "
            f"{seconds:.0f} s, {sampler.num_drawn / seconds:.0f} tokens/s",
            err=True,
        )

    size = batch_size if batch_size is not None else 4096 if sampler.device.type == "cuda" else 32
    writer = SelfWriter(
        sampler, Tokenizer.from_pretrained(path), output, settings, batch_size=size, queries=asked, held_out=held_out, on_batch=report
    )
    try:
        progress = writer.write(num_pairs)
    except KeyboardInterrupt:
        typer.echo(f"stopped; {writer.progress.num_pairs} pairs are in {output}; the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    for reason, count in sorted(progress.dropped.items(), key=lambda item: -item[1]):
        typer.echo(f"dropped {count}: {reason}", err=True)
    typer.echo(f"{progress.num_pairs} pairs in {output}")
