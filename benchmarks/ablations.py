"""What each part of slot decoding is worth on one checkpoint: one setting changed at a time, accuracy against tokens per second.

    python benchmarks/ablations.py --model RUNS/refusion-0/final --device cuda --chat-data heldout.jsonl.gz --output ablations.json
    python benchmarks/ablations.py --groups slots thresholds --limit 140 --seconds 300
    python benchmarks/ablations.py --arms 'slots: common' 'slots: * in 32' 'rules: *' --seconds 100
    python benchmarks/ablation_plots.py                                # the plots in docs/ from the result file

Groups: `slots` (slot size by block width, and slots that slide), `thresholds`, `rules` (acceptance and correction), `fusion`, `infill`
(alternatives, and how much is drafted behind a failed draft), `kv` (keys and values as the infill left them, or computed
anew among siblings) and `score` (by what a plan chooses slots). Accuracy is that of the predictable tasks, agreement that of held-out chat;
tokens/s are measured at batch 1, every arm in turn with autoregressive decoding of the same weights. `kv` and `score` run the plain decoder
(`refusion.decoding.variants`), which has no speed worth telling.

Tokens per forward are those of forwards that prepare every length the settings allow; when timed, the engine prepares as many as pay:
`prepared_lengths` in the mean, `prepared_lengths_last` in the last forward.
The result file is written after every arm, and arms that are in it already are not measured again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import comparison
import harness
import tasks
import torch

from refusion import LLM, SamplingParams, SlotParams
from refusion.decoding.params import SlotSettings
from refusion.decoding.refusion import ReFusionDecoder
from refusion.decoding.variants import EntropyForward, RecomputingDecoder, ScoringDecoder
from refusion.errors import CheckpointError, ConfigError
from refusion.evaluation.fidelity import score_fidelity
from refusion.evaluation.load import Load, Server, take_turns
from refusion.evaluation.results import Figure, Result, Run, read_result, to_plain, write_result
from refusion.evaluation.statistics import forward_stats, wilson
from refusion.llm import EngineSettings
from refusion.synthesis.predictable import HELD_OUT_SEED, make

TWO_PASS = {"fuse_plan": False, "max_candidates": 0}
SEATS = 32
"""Prompts of slot decoding together on a GPU: so many may prepare all their lengths even where many slots are chosen at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One setting of a group. `changes` go over the common slot settings."""

    group: str
    label: str
    changes: dict[str, Any]
    variant: str | None = None
    """Decoder of `refusion.decoding.variants`; None: the engine."""

    @property
    def name(self) -> str:
        return f"{self.group}: {self.label}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a variant wrote."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    num_forwards: int


def arms() -> list[Arm]:
    """All of them, most telling first."""
    found = [Arm(group="slots", label="common", changes={})]
    # Blocks and drafts behind a cut are what sliding does otherwise; thresholds stay as they are.
    sliding = {"sliding": True, "slot_size": 16, "infill_length": 4, "alternatives": 2}
    found.append(Arm(group="slots", label="16 sliding", changes=sliding))
    for width in (32, 64, 128):
        for size in (4, 8, 16, 32):
            found.append(Arm(group="slots", label=f"{size} in {width}", changes={"slot_size": size, "block_size": width}))
    found += [
        Arm(group="thresholds", label=f"slot {value:g}", changes={"slot_threshold": value}) for value in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    ]
    found += [
        Arm(group="thresholds", label=f"token {value:g}", changes={"token_threshold": value}) for value in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    for acceptance in ("paper", "argmax"):
        for correction in ("paper", "autoregressive"):
            changes = {"acceptance": acceptance, "correction": correction}
            found.append(Arm(group="rules", label=f"{acceptance} acceptance, {correction} correction", changes=changes))
    found.append(Arm(group="fusion", label="fused rounds and infill", changes={}))
    found.append(Arm(group="fusion", label="fused rounds, two-pass infill", changes={"max_candidates": 0}))
    found.append(Arm(group="fusion", label="two-pass", changes=TWO_PASS))
    found += [Arm(group="infill", label=f"{count} alternatives", changes={"alternatives": count}) for count in (0, 1, 2, 3)]
    found += [Arm(group="infill", label=f"{length} behind a failed draft", changes={"infill_length": length}) for length in (1, 2, 4)]
    # Several slots must be infilled together for their K/V to differ, and the next plan must see what was computed anew.
    wide = {"slot_size": 8, "block_size": 64, "alternatives": 0, "infill_length": None, **TWO_PASS}
    for threshold in (0.9, 0.5):
        for variant, what in (("plain", "as the infill left them"), ("recompute", "computed anew")):
            changes = wide | {"slot_threshold": threshold}
            found.append(Arm(group="kv", label=f"{what}, slot {threshold:g}", changes=changes, variant=variant))
    for variant, what in (("first", "first token"), ("mean", "mean of tokens"), ("entropy", "entropy of the first token")):
        for threshold in (0.9, 0.7):
            found.append(
                Arm(group="score", label=f"{what}, slot {threshold:g}", changes=wide | {"slot_threshold": threshold}, variant=variant)
            )
    return found


GROUPS = tuple(dict.fromkeys(arm.group for arm in arms()))


def main() -> None:
    parser = harness.parser("Ablations of slot decoding.", output="ablations.json")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--arms", nargs="+", default=["*"], metavar="PATTERN", help="'GROUP: LABEL' with wildcards, in the order wanted")
    parser.add_argument("--chat-data", type=Path, default=None, help="JSONL rows with `query`; by default the shared held-out ones")
    parser.add_argument("--chat-rows", type=int, default=128, help="held-out chat prompts; 0: no agreement")
    parser.add_argument("--base", default="smollm2-135m", help="model whose argmax counts as agreement")
    parser.add_argument("--speed-prompts", type=int, default=14, help="tasks that are timed at batch 1")
    parser.add_argument("--seconds", type=float, default=3600, help="no arm is begun after them")
    parser.set_defaults(limit=700)
    args = parser.parse_args()
    chosen_arms(args.groups, args.arms)  # told before anything is loaded
    (setting,) = harness.settings(args)
    bench = Bench(args, setting.slots)
    deadline = time.monotonic() + args.seconds
    runs = known_runs(args.output, bench)
    for arm in chosen_arms(args.groups, args.arms):
        if arm.name in {run.label for run in runs}:
            continue
        if time.monotonic() > deadline:
            print(f"out of time before {arm.name}; the same command goes on from here", file=sys.stderr)
            break
        runs.append(bench.run(arm))
        print(json.dumps({"label": arm.name} | to_plain(runs[-1].figures)), flush=True)
        result = Result(name="ablations", settings=bench.settings, runs=runs, notes=args.notes, device=args.device)
        write_result(args.output, result)
    print(f"written {args.output}", file=sys.stderr)


def chosen_arms(groups: Sequence[str], patterns: Sequence[str]) -> list[Arm]:
    """Arms of the groups that a pattern names, those of the first pattern first. Raises ConfigError for a name that is none."""
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ConfigError(f"unknown group {unknown[0]!r}; known are {', '.join(GROUPS)}")
    found: dict[str, Arm] = {}
    for pattern in patterns:
        named = {arm.name: arm for arm in arms() if fnmatchcase(arm.name, pattern)}
        if not named:
            raise ConfigError(f"no arm is named {pattern!r}; the first is {arms()[0].name!r}, wildcards are allowed")
        found |= {name: arm for name, arm in named.items() if arm.group in groups and name not in found}
    return list(found.values())


def known_runs(path: Path, bench: Bench) -> list[Run]:
    """Arms that an earlier run of the same settings wrote. Raises ConfigError if the file is about something else."""
    if not path.exists():
        return []
    content = read_result(path)
    settings = to_plain(bench.settings)
    if content["name"] != "ablations" or any(content["settings"].get(name) != value for name, value in settings.items()):
        raise ConfigError(f"{path} was measured with other settings; choose another --output")
    return [Run(**run) for run in content["runs"]]


class Bench:
    """One checkpoint, its problems, and everything an arm is measured by."""

    def __init__(self, args: Any, slots: SlotParams) -> None:
        self.args, self.is_cuda = args, args.device.startswith("cuda")
        self.batch_size = args.batch_size or (128 if self.is_cuda else 4)
        rows = comparison.ROOM * comparison.DECODE_ROWS if self.is_cuda else None
        engine = EngineSettings(max_num_seqs=self.batch_size, max_decode_rows=rows, prefix_caching=False)
        self.llm = LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype, engine=engine)
        if self.llm.config.mask_token_id is None:
            raise CheckpointError(f"{self.llm.path} has no mask token; there are no slots to ablate")
        self.common = self.llm.resolve_slots(slots)
        self.rows = harness.select(make(HELD_OUT_SEED, tasks.NUM_HELD_OUT), None, args.limit)
        chat = args.chat_data or (harness.chat_prompts() if args.chat_rows else None)
        self.chat = harness.rows_of(chat, limit=args.chat_rows) if chat and args.chat_rows else []
        self.base = LLM.from_pretrained(args.base, device=args.device, dtype="float32") if self.chat else None
        self.sampling = SamplingParams(max_tokens=args.max_tokens)
        self.name = self.llm.path.name if Path(args.model).exists() else args.model
        self.checksum = comparison.checksum(self.llm.path)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for arms to stand in one file."""
        counts = {"num_problems": len(self.rows), "num_chats": len(self.chat), "speed_prompts": self.args.speed_prompts}
        model = {"model": self.name, "weights": self.checksum, "dtype": str(self.llm.model.dtype).removeprefix("torch.")}
        return model | counts | {"slots": asdict(self.common), "base": self.args.base, "sampling": asdict(self.sampling)}

    def run(self, arm: Arm) -> Run:
        slots = self.slots(arm)
        answers = self.answers(arm, slots, self.rows)
        is_right = tasks.judge(self.rows, [answer.text for answer in answers])
        stats = forward_stats([a.token_ids for a in answers], [a.num_forwards for a in answers], self.llm.eos_ids())
        figures: dict[str, Figure] = {
            "accuracy": wilson(sum(is_right), len(is_right)),
            "tokens_per_forward": stats.interval,
            "mean_tokens": stats.num_tokens / len(answers),
        }
        if self.chat and self.base is not None:
            figures |= self.chat_figures(self.answers(arm, slots, self.chat))
        if arm.variant is None and self.args.speed_prompts:
            figures |= self.speed(slots)
        return Run(
            label=arm.name,
            settings={"group": arm.group, "label": arm.label, "variant": arm.variant, "slots": asdict(slots)},
            figures=figures,
        )

    def slots(self, arm: Arm) -> SlotSettings:
        """The common settings with the arm's; a block length belongs to its slot size."""
        cuts = {"slot_size", "block_size", "serial_blocks"}
        kept: dict[str, Any] = dict.fromkeys(cuts - {"slot_size"}) if cuts & arm.changes.keys() else {}
        stays = {"block_size", "serial_blocks"} & arm.changes.keys() or arm.changes.get("correction") == "paper" or arm.variant is not None
        if self.common.sliding and stays:
            kept |= {"sliding": False, "acceptance": "argmax" if self.common.acceptance == "exact" else self.common.acceptance}
        if arm.changes.get("correction") == "paper":
            kept["alternatives"] = 0  # they belong to the other correction
        return replace(self.common, **(kept | arm.changes))

    def answers(self, arm: Arm, slots: SlotSettings, rows: Sequence[dict[str, Any]]) -> list[Answer]:
        prompts = [self.llm.encode(harness.chat(row["query"])) for row in rows]
        if arm.variant is not None:
            return self.plain_answers(arm.variant, slots, prompts)
        whole = params(replace(slots, max_candidates=slots.candidates()))
        outputs = self.llm.generate(list(prompts), self.sampling, whole, batch_size=min(self.batch_size, SEATS), progress=True)
        return [Answer(list(out.prompt_ids), list(out.token_ids), out.text, out.stats.num_forwards) for out in outputs]

    def plain_answers(self, variant: str, slots: SlotSettings, prompts: Sequence[list[int]]) -> list[Answer]:
        """Batches of the plain decoder, prompts of like length together."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, Answer] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            decoder = self.decoder(variant, slots)
            device = self.llm.model.device
            lengths = torch.tensor([len(prompts[i]) for i in batch], device=device)
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompts[i]) for i in batch], batch_first=True).to(device)
            decoder.start(padded, lengths, torch.zeros_like(lengths))
            while not bool(decoder.is_done.all()):  # a synchronisation a forward; nothing is timed here
                decoder.step()
            for row, i in enumerate(batch):
                token_ids = decoder.answer(row)
                text = self.llm.tokenizer.decode(token_ids) if self.llm.tokenizer is not None else ""
                found[i] = Answer(prompts[i], token_ids, text, int(decoder.num_forwards[row]))
        return [found[i] for i in range(len(prompts))]

    def decoder(self, variant: str, slots: SlotSettings) -> ReFusionDecoder:
        eos_ids = torch.tensor(self.llm.eos_ids(), device=self.llm.model.device)
        mask_id = self.llm.config.mask_token_id
        assert mask_id is not None, "checked when the model was loaded"
        forward = EntropyForward(self.llm.model, self.llm.banned_ids()) if variant == "entropy" else self.llm.forward_fn()
        kinds: dict[str, Callable[..., ReFusionDecoder]] = {
            "plain": ReFusionDecoder,
            "recompute": RecomputingDecoder,
            "first": partial(ScoringDecoder, score="first"),
            "mean": partial(ScoringDecoder, score="mean"),
            "entropy": partial(ScoringDecoder, score="first"),
        }
        return kinds[variant](forward, slots, self.sampling, mask_id=mask_id, eos_ids=eos_ids)

    def chat_figures(self, answers: Sequence[Answer]) -> dict[str, Figure]:
        assert self.base is not None, "there is a base where there are chats"
        prompts, tokens = [answer.prompt_ids for answer in answers], [answer.token_ids for answer in answers]
        fidelity = score_fidelity(self.base.model, prompts, tokens, 64 if self.is_cuda else 4, banned_ids=self.base.banned_ids().tolist())
        stats = forward_stats(tokens, [answer.num_forwards for answer in answers], self.llm.eos_ids())
        return {
            "chat_agreement": fidelity.agreement_interval,
            "chat_base_nll": fidelity.nll_per_token,
            "chat_tokens_per_forward": stats.interval,
        }

    def speed(self, slots: SlotSettings) -> dict[str, Figure]:
        """Tokens per second at batch 1, and over autoregressive decoding of the same prompts in turn."""
        prompts = [self.llm.encode(harness.chat(row["query"])) for row in self.rows[: self.args.speed_prompts]]
        server = Server(self.llm, params(slots), self.sampling)
        turns = [comparison.Turns(server, decoder) for decoder in ("refusion", "autoregressive")]
        for turn in turns:
            server.serve(Load(), turn.decoder, prompts, 1)  # so that everything is compiled and captured
        take_turns([turn.take for turn in turns], prompts)
        ours, other = (turn.load.tokens_per_second for turn in turns)
        speeds = {"tokens_per_second": ours, "autoregressive_tokens_per_second": other, "over_autoregressive": ours / other}
        return speeds | turns[0].load.prepared_figures


def params(slots: SlotSettings) -> SlotParams:
    """Settings that are all decided, as a request takes them: without those that have no effect."""
    idle = {"slot_threshold", "fuse_plan"} if slots.sliding else set()
    idle |= {"token_threshold"} if slots.acceptance == "exact" else set()
    return SlotParams(**{name: value for name, value in asdict(slots).items() if value is not None and name not in idle})


if __name__ == "__main__":
    harness.script(main)
