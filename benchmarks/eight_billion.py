"""Everything that is measured on the 8B carrier, from one build: both decoders on chat and tasks at batch 1, and the eager yardstick.

    python benchmarks/eight_billion.py --device cuda --data heldout.jsonl.gz --tasks-data tasks.jsonl.gz
    python benchmarks/eight_billion.py --device cuda --quantization int8 --skip-loop ...       # 8-bit weights
    python benchmarks/eight_billion.py --shape hidden_size=96,... --model TINY                 # a dry run on a CPU

`carrier.py` says what the carrier is, `serving.py` what the figures mean, `transformers_loop.py` what the eager loop is. The small model
itself runs first in the same dtype, so that tokens per forward and texts can be compared with the carrier's.

`masked diffusion` is the published set-up of LLaDA: 512 positions, as many forwards of the whole text, no cache, no early stop. The weights
never learnt it, so what it writes says nothing; how long it takes does not depend on that, and is set against the mean answer of ReFusion.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import carrier
import harness
import serving
import torch
import transformers_loop

from refusion import LLM, SamplingParams
from refusion.decoding.diffusion_params import MaskedDiffusionParams
from refusion.decoding.forward import EagerForward
from refusion.decoding.transformers_network import TransformersNetwork
from refusion.evaluation.load import Load, Server, comparison, run_of
from refusion.evaluation.results import Figure, Run
from refusion.llm import EngineSettings, RequestOutput

DECODERS = ("autoregressive", "refusion")
ENGINE = EngineSettings(max_num_seqs=1, prefix_caching=False, cache_tokens=16384)
PAPER_TOKENS = 512
"""Length of every answer in the published set-up of masked diffusion."""


def main() -> None:
    parser = harness.parser("The 8B carrier at batch 1.", output="eight-billion.json")
    parser.add_argument("--shape", default="8b", help="8b or NAME=N,...")
    parser.add_argument("--data", type=Path, default=None, help="chat rows with `query`; by default the shared held-out ones")
    parser.add_argument("--tasks-data", type=Path, default=None, help="task rows; by default made from the held-out seed")
    parser.add_argument("--num-prompts", type=int, default=24, help="of each kind")
    parser.add_argument("--loop-prompts", type=int, default=4, help="chat prompts for the eager transformers loop; 0 leaves it out")
    parser.add_argument("--masked-prompts", type=int, default=1, help="of each kind, for masked diffusion; 0 leaves it out")
    args = parser.parse_args()
    (setting,) = harness.settings(args)
    sampling = SamplingParams(max_tokens=args.max_tokens)
    kinds = {"chat": args.data, "tasks": args.tasks_data}
    rows = {kind: serving.prompt_rows(kind, data, args.num_prompts) for kind, data in kinds.items()}
    small = LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype or "bfloat16", engine=ENGINE)
    prompts = {kind: [small.encode(harness.chat(row["query"])) for row in found] for kind, found in rows.items()}
    expected = {decoder: small.generate(prompts["chat"], sampling, setting.slots, decoder, batch_size=1) for decoder in DECODERS}
    del small

    started = time.perf_counter()
    llm = carrier.load_llm(args.model, carrier.Shape.parse(args.shape), device=args.device, dtype=args.dtype, engine=ENGINE)
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    runs = [Run(label="build", settings={"shape": args.shape}, figures={"build_seconds": time.perf_counter() - started})]
    server = Server(llm, setting.slots, sampling)
    described = {"shape": args.shape, "slots": asdict(llm.resolve_slots(setting.slots)), "num_prompts": args.num_prompts}
    with harness.written_at_any_end(partial(harness.finish, args, "eight-billion", llm, runs, **described), runs):
        for kind, encoded in prompts.items():
            loads = serving.loads_at(server, DECODERS, encoded, 1, serving.LEAST_WARM_UP)
            for decoder, load in loads.items():
                runs.append(serving.shown(replace(run_of(decoder, load, 1), label=f"{kind}: {decoder}")))
                if kind == "chat":
                    same = same_texts(expected[decoder], load.outputs)
                    runs.append(serving.shown(Run(label=f"{decoder}: texts of the small model", settings={}, figures=same)))
            runs.append(serving.shown(replace(comparison(loads, 1), label=f"{kind}: compared")))
            if args.masked_prompts:
                runs.append(serving.shown(masked_diffusion(server, kind, encoded[: args.masked_prompts], loads)))
        if args.loop_prompts:
            shorter = replace(sampling, max_tokens=min(args.max_tokens, 64))
            runs += map(serving.shown, eager_loop(llm, setting, shorter, prompts["chat"][: args.loop_prompts]))


def masked_diffusion(server: Server, kind: str, prompts: list[list[int]], loads: dict[str, Load]) -> Run:
    """Seconds of an answer that is always `PAPER_TOKENS` long, and over the mean answer of every decoder in `loads`."""
    options = {"diffusion": MaskedDiffusionParams()}
    masked, load = replace(server, sampling=replace(server.sampling, max_tokens=PAPER_TOKENS), options=options), Load()
    masked.serve(Load(), "masked_diffusion", prompts[:1], 1)  # whatever has to be compiled
    masked.serve(load, "masked_diffusion", prompts, 1)
    seconds = load.seconds / len(load.outputs)
    figures: dict[str, Figure] = {"seconds_per_answer": seconds, "num_first_runs": load.num_first_runs}
    if load.device_ms:
        figures["device_ms_per_forward"] = sum(load.device_ms) / len(load.device_ms)
    figures |= {f"over_{decoder}": seconds / (other.seconds / len(other.outputs)) for decoder, other in loads.items()}
    return Run(label=f"{kind}: masked diffusion", settings={"num_prompts": len(prompts), "max_tokens": PAPER_TOKENS}, figures=figures)


def same_texts(expected: list[RequestOutput], found: list[RequestOutput]) -> dict[str, Any]:
    """How far the carrier writes what the small model writes in the same dtype."""
    pairs = list(zip(expected, found, strict=True))
    same_prefix = sum(carrier.common_prefix(a.token_ids, b.token_ids) for a, b in pairs)
    return {
        "tokens_per_forward_small": carrier.tokens_per_forward(expected),
        "tokens_per_forward_carrier": carrier.tokens_per_forward(found),
        "same_answers_share": sum(a.token_ids == b.token_ids for a, b in pairs) / len(pairs),
        "same_prefix_share": same_prefix / sum(len(a.token_ids) for a in expected),
    }


def eager_loop(llm: LLM, setting: harness.Setting, sampling: SamplingParams, prompts: list[list[int]]) -> list[Run]:
    """The same algorithm over an eager `transformers` model on the same weights."""
    network = TransformersNetwork(carrier.to_transformers(llm.model), llm.config)
    forward = EagerForward(network, llm.banned_ids())
    setting = transformers_loop.staying(setting)
    slots = llm.resolve_slots(setting.slots)
    runs = []
    for decoder in DECODERS:
        loop = transformers_loop.transformers_side(llm, forward, decoder, slots, sampling)
        engine = transformers_loop.engine_side(llm, decoder, setting, sampling)
        figures = transformers_loop.compare(loop, engine, prompts)
        settings = {"decoder": decoder} | ({"slots": asdict(slots)} if decoder == "refusion" else {})
        runs.append(Run(label=f"eager transformers: {decoder}", settings=settings, figures=figures))
    return runs


if __name__ == "__main__":
    harness.script(main)
