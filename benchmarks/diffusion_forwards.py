"""What a forward of each diffusion baseline costs beside the project's own decoders, and whether the engine writes what plain loops write.

python benchmarks/diffusion_forwards.py --device cuda --concurrency 1 8 --limit 16
python benchmarks/diffusion_forwards.py --device cuda --dtype float32 --check 4 --max-tokens 64

Milliseconds of a forward do not depend on what the weights have learnt, so any checkpoint with a mask token will do; tokens per second do.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch

from refusion import LLM, BlockDiffusionParams, EngineSettings, MaskedDiffusionParams, SamplingParams
from refusion.decoding.diffusion import decode
from refusion.decoding.diffusion_params import DiffusionParams
from refusion.evaluation.results import Figure, Run, to_plain
from refusion.evaluation.statistics import pooled_ratio
from refusion.llm import RequestOutput

CONTENDERS: dict[str, tuple[str, DiffusionParams | None]] = {
    "autoregressive": ("autoregressive", None),
    "refusion": ("refusion", None),
    "masked diffusion, 1 token a forward": ("masked_diffusion", MaskedDiffusionParams()),
    "masked diffusion, threshold": ("masked_diffusion", MaskedDiffusionParams(threshold=0.9, early_stop=True)),
    "masked diffusion, prefix cache": ("masked_diffusion", MaskedDiffusionParams(threshold=0.9, early_stop=True, cache="prefix")),
    "masked diffusion, dual cache": ("masked_diffusion", MaskedDiffusionParams(threshold=0.9, early_stop=True, cache="dual")),
    "block diffusion": ("block_diffusion", BlockDiffusionParams()),
    "block diffusion, unfused": ("block_diffusion", BlockDiffusionParams(fuse_commit=False)),
}


def main() -> None:
    parser = harness.parser("Milliseconds of a forward of every decoder.", output="diffusion-forwards.json", max_tokens=128)
    parser.add_argument("--data", type=Path, default=None, help="chat rows with `query`; by default the shared held-out ones")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1], help="requests that run together")
    parser.add_argument("--check", type=int, default=0, help="so many prompts are also decoded by the plain loops (slow), and compared")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help="these decoders")
    args = parser.parse_args()
    rows = max(8192, 2 * args.max_tokens)  # room for several whole texts
    engine = EngineSettings(max_num_seqs=max(args.concurrency), prefix_caching=False, max_decode_rows=rows)
    llm = LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype, engine=engine)
    prompts = [
        llm.encode(harness.chat(row["query"])) for row in harness.rows_of(args.data or harness.chat_prompts(), limit=args.limit or 16)
    ]
    sampling = SamplingParams(max_tokens=args.max_tokens)
    runs = []
    for name in args.only:
        decoder, params = CONTENDERS[name]
        for concurrency in args.concurrency:
            settings = {"decoder": decoder, "diffusion": to_settings(llm, decoder, params), "concurrency": concurrency}
            figures = measured(llm, prompts, sampling, decoder, params, concurrency)
            if params is not None and args.check and concurrency == args.concurrency[0]:
                figures |= checked(llm, prompts[: args.check], sampling, decoder, params)
            runs.append(Run(label=f"{name} at {concurrency}", settings=settings, figures=figures))
            print(json.dumps({"label": runs[-1].label} | to_plain(figures)), flush=True)
    harness.finish(args, "diffusion_forwards", llm, runs, concurrency=args.concurrency, num_prompts=len(prompts))


def to_settings(llm: LLM, decoder: str, params: DiffusionParams | None) -> str | None:
    found = llm.resolve_diffusion(decoder, params)
    return None if found is None else repr(found)


def measured(
    llm: LLM, prompts: Sequence[Any], sampling: SamplingParams, decoder: str, params: DiffusionParams | None, concurrency: int
) -> dict[str, Figure]:
    """Two rounds over the prompts, of which the first makes every shape ready and does not count."""
    longest = max(map(len, prompts))
    llm.warm_up((decoder,), batch_size=concurrency, sampling=sampling, diffusion=params, prompt_tokens=longest)
    for _ in range(2):
        runner = llm.engine.runner
        is_timed = runner.is_cuda
        before, runner.timings = runner.num_first_runs, [] if is_timed else None
        started = time.perf_counter()
        outputs: list[RequestOutput] = llm.generate(list(prompts), sampling, decoder=decoder, diffusion=params, batch_size=concurrency)
        runner.synchronize()
        seconds = time.perf_counter() - started
        times = [first.elapsed_time(last) for first, last in runner.timings or []]
        runner.timings = None
    num_tokens = [out.stats.num_tokens for out in outputs]
    num_forwards = [out.stats.num_forwards for out in outputs]
    figures: dict[str, Figure] = {
        "tokens_per_second": sum(num_tokens) / seconds,
        "tokens_per_forward": pooled_ratio(num_tokens, num_forwards),
        "num_forwards": sum(num_forwards),
        "seconds": seconds,
        "num_first_runs": runner.num_first_runs - before,
    }
    if times:
        figures["device_ms_per_forward"] = statistics.mean(times)
        figures["host_share"] = 1 - sum(times) / (1000 * seconds)
    elif concurrency == 1:
        figures["ms_per_forward"] = 1000 * seconds / sum(num_forwards)
    return figures


def checked(
    llm: LLM, prompts: Sequence[Sequence[int]], sampling: SamplingParams, decoder: str, params: DiffusionParams
) -> dict[str, Figure]:
    """Share of answers that are those of the plain loops, token for token and forward for forward; 1 is wanted in float32."""
    resolved = llm.resolve_diffusion(decoder, params)
    assert resolved is not None, "only diffusion decoders are checked"
    mask_id = llm.config.mask_token_id
    assert mask_id is not None, "the decoder would have refused the checkpoint"
    found = llm.generate([list(prompt) for prompt in prompts], sampling, decoder=decoder, diffusion=params)
    with torch.device(llm.model.device):
        plain = [decode(llm.forward_fn(), prompt, resolved, sampling, mask_id=mask_id, eos_ids=llm.eos_ids()) for prompt in prompts]
    same = [
        (list(out.token_ids), out.stats.num_forwards) == (trace.token_ids, trace.num_forwards)
        for out, trace in zip(found, plain, strict=True)
    ]
    return {"same_as_plain": sum(same) / len(same), "num_checked": len(same)}


if __name__ == "__main__":
    harness.script(main)
