"""Decoding golden traces in batches: traces of one shape share a batch, each with its own thresholds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusion.decoding.forward import EagerForward, ForwardFn
from refusion.decoding.params import SamplingParams, SlotSettings
from refusion.decoding.refusion import ReFusionDecoder

MASK_ID, EOS_ID = 2, 1
TWO_PASS = {"fuse_plan": False, "max_candidates": 0}
MANY = 512  # prepared lengths: all there are

Trace = dict[str, Any]


class PerTraceSettings(SlotSettings):
    """Slot settings whose thresholds are tensors, one value a request; the decisions broadcast them."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class Decoded:
    """One trace as we decode it."""

    token_ids: list[int]
    num_forwards: int
    plan_confidences: list[list[float]]


def read_traces(path: Path, *, clean: bool = True) -> list[Trace]:
    return [trace for trace in json.loads(path.read_text(encoding="utf-8")) if trace["clean"] is clean]


def shape(trace: Trace) -> tuple[int, int, int]:
    """Traces of one shape fit one batch."""
    return trace["gen_length"], trace["slot_size"], trace["serial_blocks"]


def forward_of(network: Any, banned: Iterable[int] = ()) -> EagerForward:
    return EagerForward(network, torch.tensor(list(banned), dtype=torch.long))


def decode_traces(forward: ForwardFn, traces: Sequence[Trace], **settings: Any) -> list[Decoded]:
    """Every trace, batched by shape; `settings` are further slot settings (default: everything fused)."""
    shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, trace in enumerate(traces):
        shapes[shape(trace)].append(index)
    decoded: dict[int, Decoded] = {}
    for indices in shapes.values():
        batch = _decode_batch(forward, [traces[index] for index in indices], settings)
        decoded |= dict(zip(indices, batch, strict=True))
    return [decoded[index] for index in range(len(traces))]


def _decode_batch(forward: ForwardFn, traces: Sequence[Trace], settings: dict[str, Any]) -> list[Decoded]:
    first = traces[0]
    slots = PerTraceSettings(
        slot_size=first["slot_size"],
        serial_blocks=first["serial_blocks"],
        slot_threshold=_column(traces, "slot_threshold", 1),  # type: ignore[arg-type]  # one threshold a request
        token_threshold=_column(traces, "token_threshold", 2),  # type: ignore[arg-type]
        **({"acceptance": "paper", "correction": "paper", "max_candidates": MANY} | settings),
    )
    sampling = SamplingParams(max_tokens=first["gen_length"])
    decoder = ReFusionDecoder(forward, slots, sampling, mask_id=MASK_ID, eos_ids=torch.tensor([EOS_ID]))
    longest = max(len(trace["prompt_ids"]) for trace in traces)
    prompts = torch.tensor([trace["prompt_ids"] + [0] * (longest - len(trace["prompt_ids"])) for trace in traces])
    lengths = torch.tensor([len(trace["prompt_ids"]) for trace in traces])
    decoder.start(prompts, lengths, torch.zeros(len(traces), dtype=torch.long))
    plans: list[list[list[float]]] = [[] for _ in traces]
    while not decoder.is_done.all():
        report = decoder.step()
        for row, is_planned in enumerate(report.is_planned):
            if is_planned.any():
                plans[row].append(report.plan_scores[row][is_planned].tolist())
    return [Decoded(decoder.answer(row), int(decoder.num_forwards[row]), plans[row]) for row in range(len(traces))]


def _column(traces: Sequence[Trace], name: str, num_axes: int) -> Tensor:
    return torch.tensor([trace[name] for trace in traces]).view(-1, *[1] * num_axes)
