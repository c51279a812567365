"""How far drafts and corrections hold on given text, without decoding: minutes on two cores where a decoding run takes an hour.

    python benchmarks/teacher_forced.py --models runs/one/final runs/other/final --rows 256:456
    python benchmarks/teacher_forced.py --models runs/one/final runs/two/final --mixtures 0.15,0.85 0.3,0.6

Over the held-out pairs as they are: the share of tokens whose argmax is the base's (`agreement`), and how many of `--masks` drafts behind
every fifth token agree with what the model itself says there one by one (`accepted`, by distance `accepted_1` and so on). Differences
between models are those of decoding on the whole; the absolute figures are of this text, drawn at a low temperature, and not of greedy
answers. --mixtures names weighted sums of the models' changes, as `tools/pack_weights.py --shares` makes them; a sum below 1 leaves the
rest to the base.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from refusion import LLM, hub
from refusion.evaluation.results import Figure, Result, Run, to_plain, write_result
from refusion.evaluation.statistics import pooled_ratio
from refusion.training.base import load_weights

# A = answer tokens, L = tokens of a row, G = groups, M = masks of a group, V = vocabulary

STEP = 5
"""Every so many answer tokens a group of masks begins."""
MOST_TOKENS = 256
"""Of an answer."""


@dataclass(slots=True)
class Tally:
    """What one model said, row by row."""

    num_tokens: list[int] = field(default_factory=list)
    num_agreed: list[int] = field(default_factory=list)
    num_groups: list[int] = field(default_factory=list)
    num_accepted: list[Tensor] = field(default_factory=list)  # [M] groups whose drafts hold at least so far

    def figures(self) -> dict[str, Figure]:
        by_distance = torch.stack(self.num_accepted)  # [rows, M]
        shares = (by_distance.sum(0) / sum(self.num_groups)).tolist()
        return {
            "agreement": pooled_ratio(self.num_agreed, self.num_tokens),
            "accepted": pooled_ratio(by_distance.sum(1).tolist(), self.num_groups),
            **{f"accepted_{place + 1}": share for place, share in enumerate(shares)},
        }


def main() -> None:
    args = flags()
    base = LLM.from_pretrained(args.base)
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    rows = harness.rows_of(args.data or harness.chat_prompts(), args.rows, args.limit)
    end = base.eos_ids()[0]
    texts = [(base.encode(harness.chat(row["query"])), [*base.encode(row["response"]), end][:MOST_TOKENS]) for row in rows]
    teacher = load_weights(hub.resolve(args.base)).eval().to(**like)
    models = {name: load_weights(hub.resolve(name)).eval() for name in args.models}
    mask_id = next(iter(models.values())).config.mask_token_id
    runs: list[Run] = []
    mixed = mixtures(args.mixtures, hub.resolve(args.base), list(models.values()), mask_id)
    for label, model in [*models.items(), *mixed]:
        tally, model = Tally(), model.to(**like)
        for prompt, answer in texts:
            score(tally, model, teacher, (prompt, answer), args.masks, mask_id, base.banned_ids())
        runs.append(
            Run(label=Path(label).parent.name if Path(label).name == "final" else Path(label).name, settings={}, figures=tally.figures())
        )
        print(json.dumps({"label": runs[-1].label} | to_plain(runs[-1].figures)), flush=True)
    settings = {"base": args.base, "rows": args.rows, "num_rows": len(rows), "masks": args.masks, "step": STEP, "dtype": args.dtype}
    write_result(args.output, Result(name="teacher-forced", settings=settings, runs=runs, notes=args.notes, device=args.device))
    print(f"written {args.output}", file=sys.stderr)


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Drafts and corrections on given text.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-refusion"], help="named models or directories")
    parser.add_argument("--mixtures", nargs="+", default=[], metavar="SHARE,SHARE", help="weighted sums of the models' changes")
    parser.add_argument("--base", default="smollm2-135m", help="what they were trained from")
    parser.add_argument(
        "--data", type=Path, default=None, help="JSONL rows with `query` and `response`; by default the shared held-out ones"
    )
    parser.add_argument("--rows", default="256:456", help="rows FIRST:LAST of the file")
    parser.add_argument("--limit", type=int, default=None, help="at most so many rows")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of models and base")
    parser.add_argument("--masks", type=int, default=6, help="drafts of a group")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "teacher-forced.json", help="result file")
    parser.add_argument("--notes", default="", help="a sentence for the result file")
    return parser.parse_args()


def mixtures(wanted: Sequence[str], base: Path, models: Sequence[Any], mask_id: int) -> list[tuple[str, Any]]:
    """Models of the weighted sums; the mask token's row, which the base never learnt, is a mean."""
    found: list[tuple[str, Any]] = []
    for text in wanted:
        shares = [float(share) for share in text.split(",")]
        assert len(shares) == len(models), f"{text} for {len(models)} models"
        mixed = load_weights(base)
        named = [dict(model.named_parameters()) for model in models]
        with torch.no_grad():
            for name, weight in mixed.named_parameters():
                start = weight.clone()
                weight += sum(share * (each[name] - start) for share, each in zip(shares, named, strict=True))
                if name == "model.embed_tokens.weight":
                    weight[mask_id] = sum(share * each[name][mask_id] for share, each in zip(shares, named, strict=True)) / sum(shares)
        found.append((text, mixed.eval()))
    return found


@torch.no_grad()
def score(tally: Tally, model: Any, base: Any, text: tuple[list[int], list[int]], num_masks: int, mask_id: int, banned_ids: Tensor) -> None:
    """One pair: prompt and answer in their order, then the groups of masks, each of which sees the text before it and itself."""
    prompt, answer = text
    num_prompt, num_text = len(prompt), len(prompt) + len(answer)
    starts = torch.arange(1, max(len(answer) - 1, 2), STEP)  # [G]
    places = (starts[:, None] + torch.arange(num_masks)).flatten()  # [GM] in the answer
    ids = torch.tensor([[*prompt, *answer, *[mask_id] * len(places)]])
    positions = torch.cat((torch.arange(num_text), num_prompt + places))
    is_seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    group = torch.arange(len(starts)).repeat_interleave(num_masks)
    is_seen[num_text:, :num_text] = torch.arange(num_text) < (num_prompt + starts).repeat_interleave(num_masks)[:, None]
    is_seen[num_text:, num_text:] &= group[:, None] == group[None, :]
    mask = torch.where(is_seen, 0.0, -torch.inf)[None, None].to(model.device, model.dtype)
    ids, positions = ids.to(model.device), positions.to(model.device)
    said = _best(model(input_ids=ids, position_ids=positions[None], attention_mask=mask).logits[0], banned_ids)
    whole = ids[:, :num_text]
    wanted = _best(base(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, num_prompt - 1 : -1], banned_ids)
    one_by_one = said[num_prompt - 1 : num_text - 1]  # [A]
    tally.num_tokens.append(len(answer))
    tally.num_agreed.append(int((one_by_one == wanted).sum()))
    is_inside = places < len(answer)
    is_same = (said[num_text:] == one_by_one[places.clamp(max=len(answer) - 1)]) & is_inside
    tally.num_groups.append(len(starts))
    tally.num_accepted.append(is_same.view(-1, num_masks).long().cumprod(1).sum(0))


def _best(logits: Tensor, banned_ids: Tensor) -> Tensor:
    """[T] argmax of logits [T, V], on the CPU."""
    return logits.cpu().float().index_fill(-1, banned_ids, -torch.inf).argmax(-1)


if __name__ == "__main__":
    harness.script(main)
