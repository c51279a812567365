"""Held-out chat prompts: tokens per forward against agreement with the base model.

python benchmarks/chat.py --device cuda --batch-size 128
python benchmarks/chat.py --device cuda --sweep sweep.json --output runs/chat-sweep.json
python benchmarks/chat.py --decoder autoregressive --model smollm2-135m --output benchmarks/results/chat-base.json
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import harness

from refusion import LLM
from refusion.evaluation.fidelity import score_fidelity
from refusion.evaluation.results import Figure, Run
from refusion.evaluation.statistics import forward_stats, wilson
from refusion.synthesis.filters import repetition

REPETITIVE = 0.2


def main() -> None:
    parser = harness.parser("Tokens per forward and agreement on held-out chat prompts.", output="chat.json")
    parser.add_argument("--data", type=Path, default=None, help="JSONL rows with `query`; by default the shared held-out ones")
    parser.add_argument("--rows", default="0:256", help="rows FIRST:LAST of the file")
    parser.add_argument("--base", default="smollm2-135m", help="model whose argmax counts as right")
    parser.add_argument("--score-batch-size", type=int, default=8, help="answers scored together")
    args = parser.parse_args()
    data = args.data or harness.chat_prompts()
    rows = harness.rows_of(data, args.rows, args.limit)

    llm = LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    base = LLM.from_pretrained(args.base, device=args.device, dtype="float32")
    runs: list[Run] = []
    finish = partial(harness.finish, args, "chat", llm, runs, base=args.base, data=data, rows=args.rows, num_prompts=len(rows))
    with harness.written_at_any_end(finish, runs):
        for outcome in harness.outcomes(llm, [harness.chat(row["query"]) for row in rows], args):
            runs.append(harness.run_of(llm, outcome.setting, figures(llm, base, outcome, args.score_batch_size)))
            harness.save_texts(args, outcome.setting, rows, outcome.outputs)


def figures(llm: LLM, base: LLM, outcome: harness.Outcome, batch_size: int) -> dict[str, Figure]:
    outputs = outcome.outputs
    tokens = [out.token_ids for out in outputs]
    forwards = forward_stats(tokens, [out.stats.num_forwards for out in outputs], llm.eos_ids())
    fidelity = score_fidelity(base.model, [out.prompt_ids for out in outputs], tokens, batch_size, banned_ids=base.banned_ids().tolist())
    num_repetitive = sum(repetition(ids) >= REPETITIVE for ids in tokens)
    num_stopped = sum(out.finish_reason == "stop" for out in outputs)
    return {
        "tokens_per_forward": forwards.interval,
        "agreement": fidelity.agreement_interval,
        "base_nll": fidelity.nll_per_token,
        "mean_tokens": forwards.num_tokens / len(outputs),
        "num_forwards": forwards.num_forwards,
        **{f"tokens_per_forward_{name}": value for name, value in forwards.quantiles.items()},
        "repetitive_share": wilson(num_repetitive, len(outputs)),
        "stopped_share": num_stopped / len(outputs),
        "seconds": outcome.seconds,
        "tokens_per_second": forwards.num_tokens / outcome.seconds,
    }


if __name__ == "__main__":
    harness.script(main)
