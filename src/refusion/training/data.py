"""Training examples: every source tokenised once into flat arrays, in memory or, for sets larger than that, memory-mapped from disk.

Order, repetition and corruption are the business of `batches`; reading files that of `sources`, rows that of `encoder`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from refusion.atomic import atomic_directory
from refusion.errors import DataError
from refusion.slots import IntArray
from refusion.tokenizer import Tokenizer
from refusion.training.encoder import Limits, RowEncoder, encode_rows
from refusion.training.recipe import DataSettings, ObjectiveSettings, Source
from refusion.training.sources import read_queries, read_source, source_files

CACHE_VERSION = 1
REPORTED_SKIPS = 10
"""Skipped rows that are named one by one; of more, only the number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """N tokenised pairs: prompt n is tokens[starts[n] : answers[n]], its answer tokens[answers[n] : ends[n]]."""

    tokens: npt.NDArray[np.int32]
    starts: IntArray
    answers: IntArray
    ends: IntArray
    weights: npt.NDArray[np.float64]
    """[N] how often an epoch repeats each pair."""
    is_distilled: npt.NDArray[np.bool_]
    """[N] whether the base model's logits may teach a pair."""
    checksum: int = 0
    """CRC-32 of all token ids: a resumed run must have the same."""
    num_skipped: int = 0
    """Malformed rows that were skipped."""
    num_excluded: int = 0
    """Rows whose query is on the exclusion list."""
    num_too_long: int = 0
    """Rows longer than a packed row or than the model's context."""

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def prompt_lengths(self) -> IntArray:
        return self.answers - self.starts

    @property
    def answer_lengths(self) -> IntArray:
        return self.ends - self.answers

    @property
    def num_tokens(self) -> int:
        return int((self.ends - self.starts).sum())

    def pair(self, index: int) -> tuple[IntArray, IntArray]:
        """Prompt and answer ids of one example."""
        start, answer, end = self.starts[index], self.answers[index], self.ends[index]
        return self.tokens[start:answer].astype(np.int64), self.tokens[answer:end].astype(np.int64)

    def select(self, index: IntArray) -> Examples:
        """The examples of `index`; their tokens are not copied."""
        picked = {name: getattr(self, name)[index] for name in ("starts", "answers", "ends", "weights", "is_distilled")}
        return dataclasses.replace(self, **picked)


def load_examples(
    settings: DataSettings,
    *,
    tokenizer: Tokenizer | None,
    mask_token_id: int,
    vocab_size: int,
    context_length: int | None = None,
    objective: ObjectiveSettings | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Examples:
    """Read and tokenise every source. DataError names file and line of the first malformed row beyond `settings.max_skipped`.

    With `settings.cache` the token ids lie there on disk, are made once for all processes and runs, and are mapped into memory.
    """
    limits = Limits(
        pack_length=settings.pack_length,
        context_length=settings.pack_length if context_length is None else context_length,
        objective=objective or ObjectiveSettings(),
    )
    excluded = frozenset(query for path in settings.exclude for query in read_queries(path))
    encoders = [
        RowEncoder(
            tokenizer=tokenizer,
            mask_token_id=mask_token_id,
            vocab_size=vocab_size,
            source=source,
            limits=limits,
            excluded_queries=excluded,
        )
        for source in settings.sources
    ]
    examples = _cached(encoders, settings, report) if settings.cache else _Writer(settings, report).run(encoders)
    if not len(examples):
        longest = min(limits.pack_length, limits.context_length)
        reason = f"all {examples.num_too_long} rows are longer than data.pack_length or the model's context ({longest} tokens)"
        raise DataError(f"nothing to train on: {reason if examples.num_too_long else 'the data has no rows'}")
    return examples


def split_validation(examples: Examples, num_rows: int, seed: int) -> tuple[Examples, Examples]:
    """(training, validation): `num_rows` examples drawn by `seed` are held out, whatever their weights."""
    if num_rows >= len(examples):
        raise DataError(f"data.validation_rows = {num_rows} leaves nothing to train on: there are {len(examples)} examples")
    order = np.random.default_rng((seed, 0x7A11D)).permutation(len(examples))
    return examples.select(np.sort(order[num_rows:])), examples.select(np.sort(order[:num_rows]))


class _Writer:
    """Collects what the encoders make: token ids in memory or in an open file, the rest in arrays."""

    def __init__(self, settings: DataSettings, report: Callable[[str], None], file: BinaryIO | None = None) -> None:
        self.settings = settings
        self.report = report
        self.file = file
        self.pieces: list[npt.NDArray[np.int32]] = []
        self.lengths: list[tuple[IntArray, IntArray]] = []
        self.counts: list[int] = []
        self.checksum = 0
        self.num_errors = self.num_excluded = self.num_too_long = 0

    def run(self, encoders: Sequence[RowEncoder]) -> Examples:
        for encoder in encoders:
            before = sum(len(answers) for _, answers in self.lengths)
            for chunk in encode_rows(read_source(encoder.source), encoder):
                self._check_skips(chunk.errors)
                self._keep(chunk.tokens)
                self.lengths.append((chunk.prompt_lengths, chunk.answer_lengths))
                self.num_excluded += chunk.num_excluded
                self.num_too_long += chunk.num_too_long
            self.counts.append(sum(len(answers) for _, answers in self.lengths) - before)
        return self._examples([encoder.source for encoder in encoders])

    def _keep(self, tokens: npt.NDArray[np.int32]) -> None:
        self.checksum = zlib.crc32(tokens.tobytes(), self.checksum)
        if self.file is None:
            self.pieces.append(tokens)
        else:
            self.file.write(tokens.data)

    def _check_skips(self, errors: list[str]) -> None:
        allowed = self.settings.max_skipped
        if self.num_errors + len(errors) > allowed:
            count = self.num_errors + len(errors)
            more = f" ({count} malformed rows, data.max_skipped = {allowed})" if count > 1 else ""
            raise DataError(f"{errors[0]}{more}")
        for message in errors[: max(0, REPORTED_SKIPS - self.num_errors)]:
            self.report(f"skipped: {message}")
        self.num_errors += len(errors)

    def _examples(self, sources: Sequence[Source]) -> Examples:
        nothing = np.zeros(0, np.int64)
        prompt, answer = (np.concatenate([nothing, *(pair[i] for pair in self.lengths)]) for i in (0, 1))
        ends = np.cumsum(prompt + answer)
        return Examples(
            tokens=np.concatenate([np.zeros(0, np.int32), *self.pieces]),
            starts=ends - prompt - answer,
            answers=ends - answer,
            ends=ends,
            weights=np.repeat([float(source.weight) for source in sources], self.counts),
            is_distilled=np.repeat([source.distill for source in sources], self.counts),
            checksum=self.checksum,
            num_skipped=self.num_errors,
            num_excluded=self.num_excluded,
            num_too_long=self.num_too_long,
        )


def _cached(encoders: Sequence[RowEncoder], settings: DataSettings, report: Callable[[str], None]) -> Examples:
    """Tokenise into `settings.cache`, or take what lies there for the same files and settings. One process writes, others wait."""
    from filelock import FileLock

    place = Path(settings.cache) / _fingerprint(encoders, settings)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            with atomic_directory(place) as draft, ExitStack() as stack:
                file = stack.enter_context(open(draft / "tokens.i32", "wb"))
                examples = _Writer(settings, report, file).run(encoders)
                arrays = {name: getattr(examples, name) for name in ("starts", "answers", "ends", "weights", "is_distilled")}
                np.savez(draft / "examples.npz", **arrays)
                counts = {name: getattr(examples, name) for name in ("checksum", "num_skipped", "num_excluded", "num_too_long")}
                (draft / "counts.json").write_text(json.dumps(counts), encoding="utf-8")
    return _map_examples(place)


def _map_examples(place: Path) -> Examples:
    counts = json.loads((place / "counts.json").read_text(encoding="utf-8"))
    path = place / "tokens.i32"
    tokens: Any = np.memmap(path, np.int32, "r") if path.stat().st_size else np.zeros(0, np.int32)
    with np.load(place / "examples.npz", allow_pickle=False) as arrays:
        return Examples(tokens=tokens, **{name: arrays[name] for name in arrays.files}, **counts)


def _fingerprint(encoders: Sequence[RowEncoder], settings: DataSettings) -> str:
    """Changes with anything that the token ids depend on; files count by path, size and time of change."""
    first = encoders[0]
    paths = [path for encoder in encoders for path in source_files(encoder.source)] + list(settings.exclude)
    files = [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]
    objective = first.limits.objective
    limits = (first.limits.pack_length, first.limits.context_length, objective.name, objective.block_size, objective.pad_answers)
    sources = [dataclasses.asdict(encoder.source) for encoder in encoders]
    tokenizer = None if first.tokenizer is None else first.tokenizer.fingerprint
    what = [CACHE_VERSION, sources, files, limits, first.mask_token_id, first.vocab_size, settings.max_skipped, tokenizer]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]
