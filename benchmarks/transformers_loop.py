"""The same algorithm over an eager `transformers` model: what a forward costs there, beside our engine on the same weights.

    python benchmarks/transformers_loop.py --device cuda --carrier --limit 8 --data heldout.jsonl.gz

The loop is the plain `ReFusionDecoder` (and `AutoregressiveDecoder`) with a `transformers` model as its network, batch 1, no CUDA graph.
Both take turns prompt by prompt. In float32 the tokens are the same; in bfloat16 two texts part at the first near-tie, so what is counted
is how many tokens stand before the first that differs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import carrier
import harness
import torch

from refusion import LLM, SamplingParams
from refusion.decoding.autoregressive import AutoregressiveDecoder
from refusion.decoding.forward import EagerForward
from refusion.decoding.params import SlotSettings
from refusion.decoding.refusion import ReFusionDecoder
from refusion.decoding.transformers_network import TransformersNetwork
from refusion.errors import CheckpointError
from refusion.evaluation.results import Figure, Run, to_plain
from refusion.llm import EngineSettings

DECODERS = ("refusion", "autoregressive")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of either side."""

    token_ids: Sequence[int]
    num_forwards: int
    seconds: float


Side = Callable[[list[int]], Answer]


def main() -> None:
    parser = harness.parser("Milliseconds of a forward in an eager transformers loop.", output="transformers-loop.json", max_tokens=128)
    parser.add_argument("--data", type=Path, default=None, help="chat rows with `query`; by default the shared held-out ones")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"], help="attention of the transformers model")
    carrier.add_flag(parser)
    args = parser.parse_args()
    llm = carrier.load(args, EngineSettings(max_num_seqs=1, prefix_caching=False))
    rows = harness.rows_of(args.data or harness.chat_prompts(), limit=args.limit or 8)
    prompts = [llm.encode(harness.chat(row["query"])) for row in rows]
    setting = staying(*harness.settings(args))
    slots = llm.resolve_slots(setting.slots)
    sampling = SamplingParams(max_tokens=args.max_tokens)
    network = TransformersNetwork(carrier.to_transformers(llm.model, args.attention), llm.config)
    forward = EagerForward(network, llm.banned_ids())

    runs = []
    for decoder in DECODERS:
        loop = transformers_side(llm, forward, decoder, slots, sampling)
        engine = engine_side(llm, decoder, setting, sampling)
        runs.append(Run(label=decoder, settings={"decoder": decoder}, figures=compare(loop, engine, prompts)))
        print(json.dumps({"label": decoder} | to_plain(runs[-1].figures)), flush=True)
    more = {"carrier": args.carrier, "attention": args.attention, "slots": asdict(slots), "num_prompts": len(rows)}
    harness.finish(args, "transformers-loop", llm, runs, **more)


def staying(setting: harness.Setting) -> harness.Setting:
    """The setting with slots that stay where they are: those that slide have no loop of one forward a step over padded batches."""
    return replace(setting, slots=replace(setting.slots, sliding=False))


def transformers_side(llm: LLM, forward: EagerForward, decoder: str, slots: SlotSettings, sampling: SamplingParams) -> Side:
    device = llm.model.device
    eos_ids = torch.tensor(llm.eos_ids(), dtype=torch.long, device=device)
    mask_id = llm.config.mask_token_id
    if mask_id is None:
        raise CheckpointError(f"{llm.path} has no mask token; add one with `refusion convert`")

    def answer(prompt: list[int]) -> Answer:
        made: ReFusionDecoder | AutoregressiveDecoder = (
            ReFusionDecoder(forward, slots, sampling, mask_id=mask_id, eos_ids=eos_ids)
            if decoder == "refusion"
            else AutoregressiveDecoder(forward, sampling, eos_ids=eos_ids)
        )
        started = time.perf_counter()
        made.start(torch.tensor([prompt], device=device), torch.tensor([len(prompt)], device=device), torch.tensor([0], device=device))
        while not bool(made.is_done.all()):  # one host synchronisation a forward, as any loop without graphs has
            made.step()
        return Answer(made.answer(0), int(made.num_forwards[0]), time.perf_counter() - started)

    return answer


def engine_side(llm: LLM, decoder: str, setting: harness.Setting, sampling: SamplingParams) -> Side:
    def answer(prompt: list[int]) -> Answer:
        started = time.perf_counter()
        output = llm.generate([prompt], sampling, setting.slots, decoder, batch_size=1)[0]
        return Answer(output.token_ids, output.stats.num_forwards, time.perf_counter() - started)

    return answer


def compare(loop: Side, engine: Side, prompts: Sequence[list[int]]) -> dict[str, Figure]:
    """Both sides on every prompt in turn, once more on the first two before, which compiles and captures what there is."""
    for prompt in prompts[:2]:
        engine(prompt)
        engine(prompt)
        loop(prompt)
    theirs, ours = zip(*((loop(prompt), engine(prompt)) for prompt in prompts), strict=True)
    loop_ms, engine_ms = ms_per_forward(theirs), ms_per_forward(ours)
    num_same = sum(carrier.common_prefix(a.token_ids, b.token_ids) for a, b in zip(theirs, ours, strict=True))
    return {
        "transformers_ms_per_forward": loop_ms,
        "engine_ms_per_forward": engine_ms,
        "forward_speedup": loop_ms / engine_ms,
        "transformers_tokens_per_second": tokens_per_second(theirs),
        "engine_tokens_per_second": tokens_per_second(ours),
        "same_answers_share": sum(list(a.token_ids) == list(b.token_ids) for a, b in zip(theirs, ours, strict=True)) / len(prompts),
        "same_prefix_share": num_same / sum(len(answer.token_ids) for answer in theirs),
        "num_forwards_transformers": sum(answer.num_forwards for answer in theirs),
        "num_forwards_engine": sum(answer.num_forwards for answer in ours),
    }


def ms_per_forward(answers: Sequence[Answer]) -> float:
    return 1000 * sum(answer.seconds for answer in answers) / sum(answer.num_forwards for answer in answers)


def tokens_per_second(answers: Sequence[Answer]) -> float:
    return sum(len(answer.token_ids) for answer in answers) / sum(answer.seconds for answer in answers)


if __name__ == "__main__":
    harness.script(main)
