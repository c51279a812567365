"""The controlled comparison: models of four objectives (ReFusion by two recipes), trained alike, each with its own decoder in this engine.

    python benchmarks/comparison.py --runs RUNS --data DATA --device cuda --state STATE --output comparison.json
    python benchmarks/comparison.py ... --limit 50 --seconds 120          # a quick look

RUNS holds OBJECTIVE-SEED/final; DATA holds tasks_heldout.jsonl.gz, gsm8k_test.jsonl.gz, rg_heldout.jsonl.gz and heldout.jsonl.gz (chat).
`train_comparison.sh` and `comparison_gpu.sh` make them. Measured are right answers by task, tokens per forward, agreement of held-out chat
with the base model, the likelihood of held-out chat (or its bound), and tokens per second at batch 1 (contenders take turns)
and 32. The most telling tasks come first, speed last; what is timed was done once before, so that everything is compiled and captured.

Every answer goes to STATE/CONTENDER.jsonl as soon as it is there. The same command goes on where a run stopped, also for want of --seconds,
and the result file always holds what there is. Contenders and seeds may be asked by several processes at once (--contenders, --seeds,
--batch-sizes with nothing behind it); speed is for a process that has the machine to itself. Models are known by their checksums: answers
of a retrained one are not mixed in. `comparison_figures.py` makes the figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import comparison_figures
import harness
import tasks

from refusion import LLM, SamplingParams, SlotParams
from refusion.errors import ConfigError, DataError
from refusion.evaluation.fidelity import answer_scores
from refusion.evaluation.likelihood import BoundSettings, Likelihood, Pair, chain_likelihoods, slot_bounds
from refusion.evaluation.load import Load, Server, cycled, take_turns
from refusion.evaluation.results import write_result
from refusion.evaluation.sample_log import SampleLog
from refusion.llm import DECODERS, EngineSettings

Row = dict[str, Any]
PAPER_TOKENS = 512
"""Length of every answer in the paper's set-up of plain masked diffusion."""
SLOT_SEATS = 32
"""Prompts of slot decoding together on a GPU: so many can prepare all their lengths in every forward."""
DECODE_ROWS = 32
"""Rows of a forward at most, in texts of ROOM tokens: plain masked diffusion runs whole texts, slot decoding prepares many lengths."""
MOST_TRIES = 3
"""A timed turn in which something was still compiled or captured is taken again; so many in all, of which the last one is kept."""
BOUND_SAMPLES = 16
"""Masked sets drawn of each answer where its likelihood is bounded."""
ROOM = 1024
"""Tokens of the longest prompt and answer together, for the size of the KV cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way of decoding the models of one recipe."""

    name: str
    objective: str
    """What it decodes as."""
    slots: SlotParams = field(default_factory=SlotParams)
    diffusion: dict[str, Any] = field(default_factory=dict)
    is_main: bool = True
    """Asked every task; the others are only timed, unless they are named."""
    recipe: str = ""
    """The recipe of recipes/comparison/ that trained its models; left out: that of its objective's name."""
    num_problems: int | None = None
    """Asked so many problems of each task at most, the first ones; None: all."""
    fixed_tokens: int | None = None
    """When timed: room for the answer, all of which is written. Only alone, on a few prompts, for that takes as long as it always does."""

    def size(self, task: Task) -> int:
        """How many problems of the task it is asked."""
        return min(len(task.rows), self.num_problems or len(task.rows))

    @property
    def trained_by(self) -> str:
        """Name of a recipe."""
        return self.recipe or self.objective

    @property
    def options(self) -> dict[str, Any]:
        """What `LLM.generate` takes beside the slots."""
        if self.objective not in ("masked_diffusion", "block_diffusion"):
            return {}
        from refusion.decoding.diffusion_params import BlockDiffusionParams, MaskedDiffusionParams

        kind = MaskedDiffusionParams if self.objective == "masked_diffusion" else BlockDiffusionParams
        return {"diffusion": kind(**self.diffusion)}


SLOTS = SlotParams(
    slot_size=16,
    block_size=16,
    slot_threshold=0.9,
    token_threshold=0.4,
    acceptance="argmax",
    correction="autoregressive",
    alternatives=2,
    infill_length=6,
)
"""What serves slots best that stay where they are, the same for every prompt."""
SLIDING = SlotParams(slot_size=16, sliding=True, acceptance="exact", correction="autoregressive", alternatives=2, infill_length=4)
"""What serves slots best that slide; the text is the one of one token at a time."""
PAPER_SLOTS = SlotParams(
    slot_size=16, serial_blocks=4, slot_threshold=0.9, token_threshold=0.4, acceptance="paper", correction="paper", alternatives=0
)
"""The published decoding with the largest slots that the recipe trains."""
CONTENDERS = (
    Contender(name="autoregressive", objective="autoregressive"),
    Contender(name="refusion", objective="refusion", slots=SLOTS),
    # The same weights without slots: what of a difference to autoregressive training is the training's, and what the decoder's.
    Contender(name="refusion_one_by_one", objective="autoregressive", recipe="refusion"),
    Contender(name="refusion_few", objective="refusion", recipe="refusion_few", slots=SLOTS),
    Contender(name="refusion_sliding", objective="refusion", slots=SLIDING),
    Contender(name="refusion_few_sliding", objective="refusion", recipe="refusion_few", slots=SLIDING),
    Contender(name="block_diffusion", objective="block_diffusion"),
    Contender(name="refusion_paper", objective="refusion", slots=PAPER_SLOTS, num_problems=500),
    # One token a forward in blocks of 32, the method at its most careful. Stopping behind the EOS changes no token before it. A forward of
    # whole texts for every token: the first problems must do.
    Contender(name="masked_diffusion", objective="masked_diffusion", diffusion={"early_stop": True}, num_problems=150),
    Contender(
        name="masked_diffusion_fast",
        objective="masked_diffusion",
        diffusion={"early_stop": True, "threshold": 0.9, "cache": "dual"},
        num_problems=500,
    ),
    Contender(name="masked_diffusion_paper", objective="masked_diffusion", is_main=False, fixed_tokens=PAPER_TOKENS),
)


@dataclass(frozen=True, slots=True)
class Model:
    """A trained model, and the checksum it is known by."""

    recipe: str
    seed: int
    path: Path
    sha256: str

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.seed}"


@dataclass(frozen=True, slots=True)
class Task:
    """Problems with verifiable answers, or chat."""

    name: str
    rows: list[Row]
    max_tokens: int


class OutOfTime(Exception):
    """--seconds are over; what is measured by then is in the log."""


def main() -> None:
    args = flags()
    models = found_models(args)
    contenders = chosen_contenders(args, {model.recipe for model in models})
    asked = read_tasks(args)
    chat = Task("chat", harness.rows_of(args.data / "heldout.jsonl.gz", limit=args.chat_rows), args.max_tokens)
    identity = {"dtype": args.dtype, "device": args.device, "slots": args.slots, "max_tokens": args.max_tokens}
    if not args.batch_sizes:
        contenders = [contender for contender in contenders if contender.is_main]
    bench = Bench(args, contenders, asked, chat, SampleLog(args.state, identity, resume=True))
    code = 0
    try:
        for seed in sorted({model.seed for model in models}):
            bench.measure([model for model in models if model.seed == seed])
    except OutOfTime:
        print("out of time; the same command goes on from here", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    rows = [row for contender in contenders for row in bench.log.rows(contender.name)]
    result = comparison_figures.result(rows, models, contenders, [*asked, chat], settings_of(args, models, contenders))
    write_result(args.output, replace(result, device=args.device, notes=args.notes))
    print(f"written {args.output}", file=sys.stderr)
    if code:
        sys.exit(code)


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The controlled comparison.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of OBJECTIVE-SEED/final")
    parser.add_argument("--data", type=Path, required=True, help="folder of the held-out rows")
    parser.add_argument("--state", type=Path, required=True, help="folder of the answers, written and continued")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "comparison.json", help="result file")
    parser.add_argument("--base", default="smollm2-135m", help="model whose argmax counts as agreement")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="by default what the device computes in")
    parser.add_argument("--seconds", type=float, default=3600, help="no group of prompts is begun after them")
    parser.add_argument("--limit", type=int, default=None, help="problems of each task at most")
    parser.add_argument("--chat-rows", type=int, default=256, help="held-out chat prompts")
    parser.add_argument("--likelihood-rows", type=int, default=128, help="held-out chat pairs whose likelihood is measured")
    parser.add_argument("--speed-prompts", type=int, default=32, help="prompts of each kind that are timed at batch 1")
    parser.add_argument("--slow-prompts", type=int, default=6, help="the same of contenders that always write the whole room")
    parser.add_argument("--speed-seconds", type=float, default=8, help="per contender and kind at larger batches")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 32], help="at which speed is measured; none: it is not")
    parser.add_argument("--batch-size", type=int, default=None, help="problems decoded together; by default 4 on a CPU, 128 on a GPU")
    parser.add_argument("--max-tokens", type=int, default=256, help="new tokens at most; what masked diffusion was trained to fill")
    parser.add_argument("--speed-only", action="store_true", help="nothing is asked that was not asked already")
    parser.add_argument("--tasks", nargs="+", default=["predictable", "gsm8k", "reasoning"], help="of predictable, gsm8k, reasoning")
    parser.add_argument("--contenders", nargs="+", default=None, help=f"of {', '.join(c.name for c in CONTENDERS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="by default all there are")
    parser.add_argument("--slots", type=json.loads, default=None, help="slot settings of `refusion` as JSON instead of what serves it best")
    parser.add_argument("--notes", default="", help="a sentence for the result file")
    return parser.parse_args()


def found_models(args: argparse.Namespace) -> list[Model]:
    """Every OBJECTIVE-SEED/final in RUNS. Raises DataError if there is none."""
    found = []
    for path in sorted(args.runs.glob("*-*/final")):
        recipe, _, seed = path.parent.name.rpartition("-")
        if recipe in {c.trained_by for c in CONTENDERS} and seed.isdigit() and (args.seeds is None or int(seed) in args.seeds):
            found.append(Model(recipe, int(seed), path, checksum(path)))
    if not found:
        raise DataError(f"{args.runs} holds no RECIPE-SEED/final; train some first (benchmarks/train_comparison.sh)")
    return found


def checksum(path: Path) -> str:
    """Of all weights of a checkpoint."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def chosen_contenders(args: argparse.Namespace, recipes: set[str]) -> list[Contender]:
    """Those that have models, with --slots set. Raises ConfigError for an unknown name or a decoder that is not here."""
    known = {contender.name: contender for contender in CONTENDERS}
    unknown = [name for name in args.contenders or () if name not in known]
    if unknown:
        raise ConfigError(f"unknown contender {unknown[0]!r}; known are {', '.join(known)}")
    if args.slots is not None:
        known["refusion"] = replace(known["refusion"], slots=SlotParams(**args.slots))
    if args.contenders is not None:
        known = {name: replace(known[name], is_main=True) for name in args.contenders}
    chosen = [contender for contender in known.values() if contender.trained_by in recipes]
    missing = [contender.objective for contender in chosen if contender.objective not in DECODERS]
    if missing:
        raise ConfigError(f"decoder {missing[0]} is not part of this version; leave it out with --contenders")
    return chosen


def read_tasks(args: argparse.Namespace) -> list[Task]:
    """The held-out problems; every reasoning family is a task of its own."""
    files = {"predictable": "tasks_heldout", "gsm8k": "gsm8k_test", "reasoning": "rg_heldout"}
    unknown = [name for name in args.tasks if name not in files]
    if unknown:
        raise ConfigError(f"unknown task {unknown[0]!r}; known are {', '.join(files)}")
    found = []
    for name in args.tasks:
        rows = tasks.problems(args.data / f"{files[name]}.jsonl.gz")
        groups = {name: rows}
        if name == "reasoning":
            groups = {family: [row for row in rows if row["family"] == family] for family in dict.fromkeys(row["family"] for row in rows)}
        found += [Task(group, some[: args.limit], args.max_tokens) for group, some in groups.items()]
    return found


def settings_of(args: argparse.Namespace, models: Sequence[Model], contenders: Sequence[Contender]) -> dict[str, Any]:
    counts = ("limit", "chat_rows", "likelihood_rows", "speed_prompts", "slow_prompts", "batch_sizes", "batch_size", "max_tokens")
    described = {contender.name: contender for contender in contenders}
    named = {name: getattr(args, name) for name in (*counts, "base", "dtype")}
    return named | {"weights": {m.name: m.sha256 for m in models}, "contenders": described}


class Bench:
    """Asks, judges and times; what is in the log already is not done again."""

    def __init__(
        self, args: argparse.Namespace, contenders: Sequence[Contender], asked: Sequence[Task], chat: Task, log: SampleLog
    ) -> None:
        self.args, self.contenders, self.asked, self.chat, self.log = args, contenders, asked, chat, log
        self.deadline = time.monotonic() + args.seconds
        self.is_cuda = args.device.startswith("cuda")
        self.batch_size = args.batch_size or (128 if self.is_cuda else 4)
        self.known = {(row["task"], row["doc_id"]) for contender in contenders for row in log.rows(contender.name)}

    def measure(self, models: Sequence[Model]) -> None:
        """Everything about the models of one seed: task by task what all main contenders answer, then speed."""
        llms: dict[str, LLM] = {}
        pairs = [(contender, model) for contender in self.contenders for model in models if model.recipe == contender.trained_by]
        main = [(contender, model) for contender, model in pairs if contender.is_main and not self.args.speed_only]
        for task in (*self.asked, self.chat):
            for contender, model in main:
                self.ask(contender, model, task, llms)
        for contender, model in main:
            self.likelihoods(contender, model, llms)
        for size in self.args.batch_sizes:
            for kind in ("chat", "tasks"):
                self.time(kind, size, pairs, llms)

    def ask(self, contender: Contender, model: Model, task: Task, llms: dict[str, LLM]) -> None:
        """Answers of one task, in groups that keep the batch full."""
        key = key_of(contender, model, task.name)
        left = [i for i in range(contender.size(task)) if (key, i) not in self.known]
        group_size = 8 * self.batch_size  # a group ends with empty seats
        for start in range(0, len(left), group_size):
            group = left[start : start + group_size]
            self.check_time()
            llm = self.llm(model, llms)
            prompts = [harness.chat(task.rows[i]["query"]) for i in group]
            sampling = SamplingParams(max_tokens=task.max_tokens)
            slots, batch_size = self.all_lengths(contender, llm)
            outputs = llm.generate(prompts, sampling, slots, contender.objective, batch_size=batch_size, progress=True, **contender.options)
            scores = self.agreement(outputs) if task is self.chat else self.rights([task.rows[i] for i in group], outputs)
            self.append(contender, key, group, outputs, scores)
            print(f"{key}: {start + len(group)} of {len(left)}", file=sys.stderr)

    def all_lengths(self, contender: Contender, llm: LLM) -> tuple[SlotParams, int]:
        """Slots that prepare all their lengths in every forward, and how many prompts may do so together."""
        if contender.objective != "refusion":
            return contender.slots, self.batch_size
        return replace(contender.slots, max_candidates=llm.resolve_slots(contender.slots).candidates()), min(self.batch_size, SLOT_SEATS)

    def rights(self, rows: Sequence[Row], outputs: Sequence[Any]) -> list[dict[str, float]]:
        return [{"right": float(is_right)} for is_right in tasks.judge(rows, [out.text for out in outputs])]

    def agreement(self, outputs: Sequence[Any]) -> list[dict[str, float]]:
        """How many tokens are the base's argmax, and their negative log-likelihood."""
        base = self.base
        prompts, answers = [out.prompt_ids for out in outputs], [out.token_ids for out in outputs]
        found = answer_scores(base.model, prompts, answers, 64 if self.is_cuda else 4, banned_ids=base.banned_ids().tolist())
        return [{"agreed": float(sum(score.is_argmax)), "nats": -score.total} for score in found]

    def likelihoods(self, contender: Contender, model: Model, llms: dict[str, LLM]) -> None:
        """Nats of held-out answers under the model's own factorisation: exact left to right, else a bound. Once a model."""
        if contender.name != contender.trained_by:
            return
        key = key_of(contender, model, "likelihood")
        rows = self.chat.rows[: self.args.likelihood_rows]
        if (key, len(rows) - 1) in self.known:
            return
        self.check_time()
        llm = self.llm(model, llms)
        assert llm.tokenizer is not None, "trained models have one"
        pairs = [(llm.encode(harness.chat(row["query"])), [*llm.tokenizer.encode(row["response"]), llm.eos_ids()[0]]) for row in rows]
        found = own_likelihoods(llm, contender, pairs, 32 if self.is_cuda else 4)
        rows_of_log = [
            {"task": key, "doc_id": i, "scores": {"nats": -each.log_prob}, "num_tokens": len(answer)}
            for i, ((_, answer), each) in enumerate(zip(pairs, found, strict=True))
        ]
        self.log.append(contender.name, rows_of_log)

    def time(self, kind: str, size: int, pairs: Sequence[tuple[Contender, Model]], llms: dict[str, LLM]) -> None:
        """Every contender on the same prompts: alone in turns, else one after the other for --speed-seconds each."""
        if size > 1:
            pairs = [(contender, model) for contender, model in pairs if contender.fixed_tokens is None]
        keys = [key_of(contender, model, f"speed_{kind}_{size}") for contender, model in pairs]
        if all((key, 0) in self.known for key in keys):
            return
        self.check_time()  # before all models are loaded
        queries = [row["query"] for row in self.chat.rows] if kind == "chat" else [row["query"] for row in mixed(self.asked)]
        prompts = [harness.chat(query) for query in queries[: max(self.args.speed_prompts, 4 * size)]]
        servers = [self.server(contender, model, llms) for contender, model in pairs]
        if size == 1:
            self.time_alone(prompts[: self.args.speed_prompts], pairs, keys, servers)
            return
        for key, server, (contender, _) in zip(keys, servers, pairs, strict=True):
            if (key, 0) in self.known:
                continue
            self.check_time()
            make_ready(server, contender.objective, prompts, cycled(prompts, 2 * size), size)
            for _ in range(MOST_TRIES):
                load = Load()
                server.serve_for(load, contender.objective, prompts, size, self.args.speed_seconds)
                if not load.num_first_runs:
                    break
            # Which prompts there was time for differs, so only the sums mean something.
            total = {"num_tokens": load.num_tokens, "num_forwards": sum(out.stats.num_forwards for out in load.outputs)}
            about = {"num_requests": len(load.outputs), "num_first_runs": load.num_first_runs, "prepared": prepared_in(load)}
            self.log.append(contender.name, [{"task": key, "doc_id": 0, "scores": {"wall": load.seconds}, **about, **total}])
            self.known.add((key, 0))
            print(f"{key}: {load.tokens_per_second:.0f} tokens/s", file=sys.stderr)

    def time_alone(
        self, prompts: Sequence[Any], pairs: Sequence[tuple[Contender, Model]], keys: Sequence[str], servers: Sequence[Server]
    ) -> None:
        """Prompt by prompt in turns; who always writes the whole room takes part in the first --slow-prompts only."""
        turns = [Turns(server, contender.objective) for server, (contender, _) in zip(servers, pairs, strict=True)]
        is_slow = [contender.fixed_tokens is not None for contender, _ in pairs]
        everybody = prompts[: self.args.slow_prompts]
        for turn, slow in zip(turns, is_slow, strict=True):
            make_ready(turn.server, turn.decoder, prompts, everybody if slow else prompts, 1)
        take_turns([turn.take for turn in turns], everybody)
        take_turns([turn.take for turn, slow in zip(turns, is_slow, strict=True) if not slow], prompts[len(everybody) :])
        for key, turn, (contender, _) in zip(keys, turns, pairs, strict=True):
            about = [{"prepared": prepared} for prepared in turn.prepared]
            walls = [{"wall": wall} for wall in turn.walls]
            self.append(contender, key, range(len(turn.load.outputs)), turn.load.outputs, walls, about)
            print(f"{key}: {turn.load.tokens_per_second:.0f} tokens/s", file=sys.stderr)

    def server(self, contender: Contender, model: Model, llms: dict[str, LLM]) -> Server:
        sampling = SamplingParams(max_tokens=contender.fixed_tokens or self.args.max_tokens)
        return Server(self.llm(model, llms), contender.slots, sampling, contender.options)

    def llm(self, model: Model, llms: dict[str, LLM]) -> LLM:
        """Loaded once a seed; the cache is bounded, for all of a seed are there together when they are timed."""
        if model.name not in llms:
            rows = ROOM * (DECODE_ROWS if self.is_cuda else 4) if model.recipe not in ("autoregressive", "block_diffusion") else None
            seats = max([self.batch_size, *self.args.batch_sizes])
            engine = EngineSettings(max_num_seqs=seats, cache_tokens=seats * ROOM, max_decode_rows=rows, prefix_caching=False)
            llms[model.name] = LLM.from_pretrained(model.path, device=self.args.device, dtype=self.args.dtype, engine=engine)
        return llms[model.name]

    @cached_property
    def base(self) -> LLM:
        return LLM.from_pretrained(self.args.base, device=self.args.device, dtype="float32")

    def append(
        self,
        contender: Contender,
        key: str,
        numbers: Sequence[int],
        outputs: Sequence[Any],
        scores: Sequence[dict[str, float]],
        about: Sequence[Row] | None = None,
    ) -> None:
        """about: what else is to stand in each row."""
        rows = []
        for i, out, score, more in zip(numbers, outputs, scores, about or [{}] * len(outputs), strict=True):
            stats = out.stats
            cost = {"num_tokens": stats.num_tokens, "num_forwards": stats.num_forwards, "is_cut": out.finish_reason == "length"}
            rows.append({"task": key, "doc_id": i, "scores": score, **more, **cost})
        self.log.append(contender.name, rows)
        self.known |= {(key, i) for i in numbers}

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime


def own_likelihoods(llm: LLM, contender: Contender, pairs: Sequence[Pair], batch_size: int) -> list[Likelihood]:
    """By the factorisation that the contender decodes with."""
    if contender.objective == "autoregressive":
        return chain_likelihoods(llm.model, pairs, batch_size)
    mask_id = llm.config.mask_token_id
    assert mask_id is not None, "a diffusion model has one"
    if contender.objective == "refusion":
        bound = BoundSettings(slot_size=llm.resolve_slots(contender.slots).slot_size, num_samples=BOUND_SAMPLES)
        return slot_bounds(llm.model, pairs, mask_id, bound, batch_size)
    from refusion.evaluation.diffusion_likelihood import diffusion_bounds

    # As the decoders read the settings: a block length left out is the one the checkpoint was trained with.
    settings = llm.new_request([0], None, None, contender.objective, **contender.options).diffusion
    assert settings is not None, f"{contender.objective} is a diffusion decoder"
    return diffusion_bounds(llm.model, pairs, mask_id, settings, num_samples=BOUND_SAMPLES, seed=0, batch_size=batch_size)


@dataclass(slots=True)
class Turns:
    """One contender's turns at batch 1, how long each took and, as `prepared_in` tells it, what it prepared."""

    server: Server
    decoder: str
    load: Load = field(default_factory=Load)
    walls: list[float] = field(default_factory=list)
    prepared: list[list[int]] = field(default_factory=list)

    def take(self, prompts: Sequence[Any]) -> None:
        for _ in range(MOST_TRIES):
            turn = Load()
            self.server.serve(turn, self.decoder, prompts, 1)
            if not turn.num_first_runs:
                break
        self.load.add(turn)
        self.walls.append(turn.seconds)
        self.prepared.append(prepared_in(turn))


def make_ready(server: Server, decoder: str, prompts: Sequence[Any], tried: Sequence[Any], concurrency: int) -> None:
    """Compile and capture what the prompts can need, by answering `tried`.

    Slots need more shapes than those answers show: experience, which they add to, decides how many lengths are prepared.
    """
    longest = max(len(server.llm.encode(prompt)) for prompt in prompts)
    varied = ["refusion"] if decoder == "refusion" else []
    server.warm_up(varied, longest, concurrency)
    server.serve(Load(), decoder, tried, concurrency)
    server.warm_up(varied, longest, concurrency)


def prepared_in(load: Load) -> list[int]:
    """Forwards of slot decoding, the lengths that they prepared together, and those that the last one did; nothing without slots."""
    lengths = load.prepared_lengths
    return [len(lengths), sum(lengths), lengths[-1]] if lengths else []


def mixed(asked: Sequence[Task]) -> Iterator[Row]:
    """A row of every task in turn, without end of the shorter ones."""
    longest = max(len(task.rows) for task in asked)
    return (task.rows[i] for i in range(longest) for task in asked if i < len(task.rows))


def key_of(contender: Contender, model: Model, task: str) -> str:
    return comparison_figures.key_of(contender.name, model.seed, model.sha256, task)


if __name__ == "__main__":
    harness.script(main)
