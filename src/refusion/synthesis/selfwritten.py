"""Chat pairs the base model writes about itself: user turns first, then the answers, filtered and saved shard by shard.

Drafts are numbered, and the number keys the noise of a draft: the same seed gives the same rows, whatever the batch size and however
often the run was interrupted. Sampling itself is in `refusion.synthesis.sampler`, what is kept is decided in `filters`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from refusion.atomic import atomic_file
from refusion.errors import ConfigError, DataError
from refusion.synthesis.filters import QueryFilter, answer_reason, has_special_text
from refusion.synthesis.jsonl import write_rows
from refusion.synthesis.sampler import Sampler, Sampling
from refusion.tokenizer import Tokenizer

MIN_ANSWER_TOKENS = 12
MAX_REPETITION = 0.2
HOPELESS_DRAFTS = 256
"""If none of so many is kept, none will be: usually one of four is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisSettings:
    """What is written; two runs with equal settings write the same rows."""

    query_temperature: float = 0.9
    """Temperature of the user turns, >= 0."""
    answer_temperature: float = 0.0
    """Temperature of the answers, >= 0; 0 writes the base model's own argmax."""
    top_p: float = 0.95
    """Nucleus of both, (0, 1]."""
    top_k: int = 64
    """Candidates of both, >= 1."""
    max_length: int = 512
    """Tokens of template, query and answer together."""
    max_query_tokens: int = 80
    """Tokens of a self-written user turn."""
    seed: int = 0
    """Keys the noise of every draft."""

    def query_sampling(self) -> Sampling:
        return Sampling(
            temperature=self.query_temperature, top_p=self.top_p, top_k=self.top_k, max_length=self.max_length,
            max_new_tokens=self.max_query_tokens, seed=2 * self.seed,
        )  # fmt: skip

    def answer_sampling(self) -> Sampling:
        return Sampling(
            temperature=self.answer_temperature, top_p=self.top_p, top_k=self.top_k, max_length=self.max_length, seed=2 * self.seed + 1
        )


@dataclass(slots=True)
class Progress:
    """How far a run is; saved beside the shards after each of them."""

    settings: dict[str, object]
    num_drafts: int = 0
    num_pairs: int = 0
    num_parts: int = 0
    num_answer_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def main_reason(self) -> str:
        """Why most drafts were dropped; empty if none was."""
        return max(self.dropped, key=self.dropped.__getitem__, default="")


class SelfWriter:
    """Writes pairs into `output`; calling `write` again in the same directory goes on where the last finished shard ended."""

    def __init__(
        self, sampler: Sampler, tokenizer: Tokenizer, output: Path, settings: SynthesisSettings, *, batch_size: int,
        queries: Sequence[str] | None = None, held_out: Iterable[str] = (), on_batch: Callable[[Progress], None] | None = None,
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be >= 1")
        self.sampler, self.tokenizer, self.output, self.settings = sampler, tokenizer, Path(output), settings
        self.batch_size, self.queries, self.on_batch = batch_size, queries, on_batch
        eos = set(tokenizer.eos_token_ids)
        rows = sampler.embedding.shape[0]
        self.banned_ids = sorted((tokenizer.special_ids - eos) | set(range(tokenizer.vocab_size, rows)))
        self.special_texts = [tokenizer.decode([i], skip_special_tokens=False) for i in sorted(tokenizer.special_ids)]
        self.output.mkdir(parents=True, exist_ok=True)
        self.progress = self._resumed()
        self.filter = QueryFilter(held_out, (row["query"] for row in self.rows()))

    def write(self, num_pairs: int | None = None) -> Progress:
        """Draft, filter and save until `num_pairs` are kept in all, or the given queries are used up.

        Raises `DataError` where nothing the model writes itself is ever kept.
        """
        if num_pairs is None and self.queries is None:
            raise ConfigError("num_pairs is needed when the model writes the queries itself")
        while num_pairs is None or self.progress.num_pairs < num_pairs:
            missing = None if num_pairs is None else num_pairs - self.progress.num_pairs
            first = self.progress.num_drafts
            drafts = self._draft_numbers(first, missing)
            if not drafts:
                break
            self._write_part(drafts, missing)
            if self.on_batch is not None:
                self.on_batch(self.progress)
            self._check_hope()
        return self.progress

    def _check_hope(self) -> None:
        progress = self.progress
        if self.queries is None and progress.num_pairs == 0 and progress.num_drafts >= HOPELESS_DRAFTS:
            raise DataError(
                f"none of {progress.num_drafts} drafts was kept, most for this reason: {progress.main_reason}; raise max_length "
                f"({self.settings.max_length}) or max_query_tokens ({self.settings.max_query_tokens}), or lower the temperatures"
            )

    def rows(self) -> Iterable[dict[str, str]]:
        """The pairs of all finished shards."""
        for index in range(self.progress.num_parts):
            with (self.output / part_name(index)).open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def _draft_numbers(self, first: int, missing: int | None) -> range:
        # About four drafts make a pair; the last batches are small so that a short run stays short.
        size = self.batch_size if missing is None else min(self.batch_size, -(-4 * missing // 64) * 64)
        last = first + size if self.queries is None else min(first + size, len(self.queries))
        return range(first, last)

    def _write_part(self, drafts: range, missing: int | None) -> None:
        """Draft, judge in order of the numbers, and stop right behind the last pair that was asked for."""
        queries, reasons = self._queries(drafts)
        pending = [i for i, reason in zip(drafts, reasons, strict=True) if reason is None]
        asked = [self.tokenizer.encode_chat([{"role": "user", "content": queries[i - drafts.start]}]) for i in pending]
        answers = dict(zip(pending, self._sample(asked, self.settings.answer_sampling(), pending), strict=True))

        rows, dropped, num_tokens, used = [], Counter[str](), 0, 0
        for i, query, reason in zip(drafts, queries, reasons, strict=True):
            used += 1
            if reason is None:
                reason = self.filter.reason(query)  # once more: a pair of this very batch may hold the same query
            text = ""
            if reason is None:
                reason, text = self._judge(answers[i])
            if reason is not None:
                dropped[reason] += 1
                continue
            self.filter.add(query)
            num_tokens += len(answers[i])
            rows.append({"query": query, "response": text})
            if len(rows) == missing:
                break
        self._save(rows, dropped, num_tokens, used)

    def _judge(self, answer: list[int]) -> tuple[str | None, str]:
        tokenizer = self.tokenizer
        reason = answer_reason(
            answer, tokenizer.eos_token_ids, tokenizer.special_ids, min_tokens=MIN_ANSWER_TOKENS, max_repetition=MAX_REPETITION
        )
        if reason is not None:
            return reason, ""
        text = tokenizer.decode(answer[:-1]).strip()
        return ("special-token text" if has_special_text(text, self.special_texts) else None), text

    def _queries(self, drafts: range) -> tuple[list[str], list[str | None]]:
        """The user turn of each draft and why it is dropped, None for a good one."""
        if self.queries is not None:
            queries = [self.queries[i] for i in drafts]
            return queries, [self.filter.reason(query) for query in queries]
        prefix = user_turn_prefix(self.tokenizer)
        drawn = self._sample([prefix] * len(drafts), self.settings.query_sampling(), list(drafts))
        queries, reasons = [], []
        for tokens in drawn:
            is_closed = bool(tokens) and tokens[-1] in self.tokenizer.eos_token_ids
            query = self.tokenizer.decode(tokens[:-1]).strip() if is_closed else ""
            queries.append(query)
            if not is_closed:
                reasons.append("query not closed")
            elif has_special_text(query, self.special_texts):
                reasons.append("special-token text")
            else:
                reasons.append(self.filter.reason(query))
        return queries, reasons

    def _sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, row_ids: Sequence[int]) -> list[list[int]]:
        return self.sampler.sample(
            prompts, sampling, eos_token_ids=self.tokenizer.eos_token_ids, banned_ids=self.banned_ids, batch_size=self.batch_size,
            row_ids=row_ids,
        )  # fmt: skip

    def _save(self, rows: list[dict[str, str]], dropped: Counter[str], num_tokens: int, num_drafts: int) -> None:
        progress = self.progress
        write_rows(self.output / part_name(progress.num_parts), rows)
        self.progress = Progress(
            progress.settings, progress.num_drafts + num_drafts, progress.num_pairs + len(rows), progress.num_parts + 1,
            progress.num_answer_tokens + num_tokens, dict(Counter(progress.dropped) + dropped),
        )  # fmt: skip
        with atomic_file(self.output / "state.json") as path:
            path.write_text(json.dumps(asdict(self.progress), indent=2) + "\n", encoding="utf-8")

    def _resumed(self) -> Progress:
        """The saved progress, or a new one; settings that differ from the saved ones are refused."""
        settings: dict[str, object] = {**asdict(self.settings), "num_queries": None if self.queries is None else len(self.queries)}
        path = self.output / "state.json"
        if not path.exists():
            return Progress(settings)
        try:
            progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); choose another output directory") from error
        if progress.settings != settings:
            names = sorted(name for name in settings if progress.settings.get(name) != settings[name])
            raise ConfigError(f"{self.output} was begun with another {', '.join(names)}; use the same settings or another directory")
        return progress


def part_name(index: int) -> str:
    return f"part-{index:05d}.jsonl"


def user_turn_prefix(tokenizer: Tokenizer) -> list[int]:
    """The ids in front of a user's first words: the template of two different queries as far as they agree."""
    first, second = (tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=False) for text in ("A", "7"))
    length = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return first[:length]
