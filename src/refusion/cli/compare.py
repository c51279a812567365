"""Both decoders on one prompt, side by side: plan and infill by the model, one token per forward by its base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from refusion import hub
from refusion.checkpoint import read_json
from refusion.cli import options
from refusion.decoding.params import SamplingParams, SlotParams, SlotSettings
from refusion.errors import CheckpointError
from refusion.llm import LLM, Prompt, RequestOutput

_WARM_UP_TOKENS = 16  # enough to touch every kind of forward once


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one prompt."""

    model: str
    base: str
    slots: SlotSettings
    refusion: RequestOutput
    autoregressive: RequestOutput

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "refusion": {"model": self.model, **options.output_dict(self.refusion), "slots": options.settings_dict(self.slots)},
            "autoregressive": {"model": self.base, **options.output_dict(self.autoregressive)},
        }

    def print(self) -> None:
        """As a table on standard output, what the columns mean on standard error."""
        table = Table("", f"refusion\n{self.model}", f"autoregressive\n{self.base}")
        table.columns[1].ratio = table.columns[2].ratio = 1
        outputs = (self.refusion, self.autoregressive)
        table.add_row("text", *(Text(output.text) for output in outputs), end_section=True)
        for name, form in _ROWS.items():
            table.add_row(name, *(form(output) for output in outputs))
        Console().print(table)
        typer.echo(options.slots_text(self.slots), err=True)


_ROWS = {
    "tokens": lambda output: f"{output.stats.num_tokens}",
    "forwards": lambda output: f"{output.stats.num_forwards}",
    "tokens per forward": lambda output: f"{output.stats.tokens_per_forward:.2f}",
    "seconds": lambda output: f"{output.stats.seconds:.2f}",
    "tokens/s": lambda output: f"{output.stats.tokens_per_second:.1f}",
}


def compare_decoders(llm: LLM, model: str, prompt: Prompt, sampling: SamplingParams, slots: SlotParams) -> Comparison:
    """Answer `prompt` with both decoders, each after a short warm-up, on the same device in the same dtype."""
    base_name, base = _base_of(llm, model)
    warm_up = replace(sampling, max_tokens=min(sampling.max_tokens, _WARM_UP_TOKENS))
    outputs: list[RequestOutput] = []
    for network, decoder in ((llm, "refusion"), (base, "autoregressive")):
        network.generate([prompt], warm_up, slots, decoder)
        outputs += network.generate([prompt], sampling, slots, decoder)
    return Comparison(model, base_name, llm.resolve_slots(slots), *outputs)


def _base_of(llm: LLM, model: str) -> tuple[str, LLM]:
    """The model it was trained from, as its `refusion` block names it; the same weights where that is unknown or not to be had."""
    block = read_json(llm.path / "config.json").get("refusion") or {}
    name = block.get("base") or (block.get("training") or {}).get("base")
    if name is None:
        return model, llm
    try:
        path = hub.resolve(name)
    except CheckpointError as error:
        typer.echo(f"comparing with the same weights: {error}", err=True)
        return model, llm
    return name, LLM.from_pretrained(path, device=str(llm.model.device), dtype=llm.model.dtype)
