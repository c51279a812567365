"""Training rows: JSONL files and toy tasks, tokenised once into flat arrays. Order, repetition and corruption are `batches`' business."""

from __future__ import annotations

import glob
import gzip
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refusion.errors import DataError, RequestError
from refusion.slots import IntArray
from refusion.tokenizer import Tokenizer
from refusion.training.recipe import DataSettings, Source

CHUNK_ROWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """N tokenised pairs: prompt n is tokens[starts[n] : answers[n]], its answer tokens[answers[n] : starts[n + 1]]."""

    tokens: npt.NDArray[np.int32]
    starts: IntArray
    """[N + 1]"""
    answers: IntArray
    """[N]"""
    weights: npt.NDArray[np.float64]
    """[N] how often an epoch repeats each pair."""
    is_distilled: npt.NDArray[np.bool_]
    """[N] whether the base model's logits may teach a pair."""
    num_skipped: int = 0
    """Malformed rows that were skipped."""
    num_excluded: int = 0
    """Rows whose query is on the exclusion list."""
    num_too_long: int = 0
    """Rows longer than a packed row."""

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def prompt_lengths(self) -> IntArray:
        return self.answers - self.starts[:-1]

    @property
    def answer_lengths(self) -> IntArray:
        return self.starts[1:] - self.answers

    def pair(self, index: int) -> tuple[IntArray, IntArray]:
        """Prompt and answer ids of one example."""
        start, answer, end = self.starts[index], self.answers[index], self.starts[index + 1]
        return self.tokens[start:answer].astype(np.int64), self.tokens[answer:end].astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowEncoder:
    """Turns one JSON row into (prompt ids, answer ids), or None for an excluded query. Raises ValueError with the reason."""

    tokenizer: Tokenizer | None
    mask_token_id: int
    vocab_size: int
    source: Source
    excluded_queries: frozenset[str] = frozenset()

    def encode(self, row: Any) -> tuple[list[int], list[int]] | None:
        if not isinstance(row, dict):
            raise ValueError("a row must be a JSON object")  # noqa: TRY004  (reported with file and line as DataError)
        if "prompt_ids" in row:
            return self._ready_ids(row)
        messages, response = self._conversation(row)
        if messages[-1]["content"].strip() in self.excluded_queries:
            return None
        if not response.strip():
            raise ValueError("the answer is empty")
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: give prompt_ids and answer_ids")
        try:
            prompt = self.tokenizer.encode_chat(messages)
        except RequestError as error:
            raise ValueError(str(error)) from error
        return prompt, [*self.tokenizer.encode(response), self.tokenizer.eos_token_ids[0]]

    def _conversation(self, row: dict[str, Any]) -> tuple[list[dict[str, str]], str]:
        """What precedes the last assistant turn, and that turn."""
        if "messages" not in row:
            query, response = row.get(self.source.query), row.get(self.source.response)
            if not isinstance(query, str) or not isinstance(response, str):
                raise ValueError(f'needs strings "{self.source.query}" and "{self.source.response}", or "messages"')
            return [{"role": "user", "content": query}], response
        messages = row["messages"]
        if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
            raise ValueError('"messages" must be a list of {"role", "content"} with text content')
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns or turns[-1] == 0:
            raise ValueError('"messages" needs an assistant turn after at least one other')
        return messages[: turns[-1]], messages[turns[-1]]["content"]

    def _ready_ids(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        prompt, answer = row["prompt_ids"], row.get("answer_ids")
        for name, ids in (("prompt_ids", prompt), ("answer_ids", answer)):
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
                raise ValueError(f"{name} must be a list of token ids below {self.vocab_size}")
            if self.mask_token_id in ids:
                raise ValueError(f"{name} contains the mask token {self.mask_token_id}")
        if not answer:
            raise ValueError("the answer is empty")
        if self.tokenizer is not None:
            stray = (self.tokenizer.special_ids & set(answer)) - set(self.tokenizer.eos_token_ids)
            if stray:
                raise ValueError(f"answer_ids contains the special token {min(stray)}, which is never a target")
        return prompt, answer


def load_examples(
    settings: DataSettings,
    *,
    tokenizer: Tokenizer | None,
    mask_token_id: int,
    vocab_size: int,
    report: Callable[[str], None] = lambda line: None,
) -> Examples:
    """Read and tokenise every source. DataError names file and line of the first malformed row beyond `settings.max_skipped`."""
    excluded = frozenset(query for path in settings.exclude for query in _queries(path))
    parts: list[_Tokenised] = []
    for source in settings.sources:
        encoder = RowEncoder(
            tokenizer=tokenizer, mask_token_id=mask_token_id, vocab_size=vocab_size, source=source, excluded_queries=excluded
        )
        tokenised = _tokenise(_numbered_lines(source), encoder)
        for message in tokenised.errors[: settings.max_skipped]:
            report(f"skipped: {message}")
        parts.append(tokenised)
        _check_skips(parts, settings.max_skipped)
    return _join(parts, settings)


def toy_rows(count: int, seed: int = 0) -> Iterator[dict[str, list[int]]]:
    """String tasks over ids: prompt [BOS, letters, task], answer [letters copied, reversed or sorted, EOS]; ids as in `toy_config`."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        letters = generator.integers(8, 64, int(generator.integers(6, 25)))
        task = int(generator.integers(3))
        answer = (letters, letters[::-1], np.sort(letters))[task]
        yield {"prompt_ids": [3, *letters.tolist(), 4 + task], "answer_ids": [*answer.tolist(), 1]}


@dataclass(frozen=True, slots=True)
class _Tokenised:
    prompts: list[npt.NDArray[np.int32]]
    answers: list[npt.NDArray[np.int32]]
    errors: list[str]
    num_excluded: int
    source: Source


def _tokenise(lines: Iterator[tuple[str, int, str]], encoder: RowEncoder) -> _Tokenised:
    """Tokenise (file, line number, text) triples, over all cores where there are many of them. Order is kept."""
    result = _Tokenised([], [], [], 0, encoder.source)
    num_excluded = 0
    for pairs, errors, excluded in _map_chunks(encoder, lines):
        num_excluded += excluded
        result.errors.extend(errors)
        for prompt, answer in pairs:
            result.prompts.append(prompt)
            result.answers.append(answer)
    return _Tokenised(result.prompts, result.answers, result.errors, num_excluded, result.source)


_Chunk = list[tuple[str, int, str]]
_ChunkResult = tuple[list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]], list[str], int]


def _map_chunks(encoder: RowEncoder, lines: Iterator[tuple[str, int, str]]) -> Iterator[_ChunkResult]:
    chunks = list(_chunked(lines))
    num_processes = min(len(os.sched_getaffinity(0)), len(chunks))
    if num_processes < 2:
        yield from (_encode_chunk(encoder, chunk) for chunk in chunks)
        return
    # fork shares the tokenizer without loading it again; the children only tokenise, they touch neither torch nor its threads.
    with multiprocessing.get_context("fork").Pool(num_processes, _set_encoder, (encoder,)) as pool:
        yield from pool.imap(_encode_in_worker, chunks)


_worker_encoder: RowEncoder | None = None


def _set_encoder(encoder: RowEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder


def _encode_in_worker(chunk: _Chunk) -> _ChunkResult:
    assert _worker_encoder is not None, "the pool sets the encoder first"
    return _encode_chunk(_worker_encoder, chunk)


def _encode_chunk(encoder: RowEncoder, chunk: _Chunk) -> _ChunkResult:
    pairs, errors, excluded = [], [], 0
    for name, number, line in chunk:
        try:
            pair = encoder.encode(json.loads(line))
        except ValueError as error:  # json.JSONDecodeError included
            errors.append(f"{name}, line {number}: {error}")
            continue
        if pair is None:
            excluded += 1
        else:
            pairs.append((np.asarray(pair[0], np.int32), np.asarray(pair[1], np.int32)))
    return pairs, errors, excluded


def _chunked(lines: Iterator[tuple[str, int, str]]) -> Iterator[_Chunk]:
    chunk: _Chunk = []
    for line in lines:
        chunk.append(line)
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _numbered_lines(source: Source) -> Iterator[tuple[str, int, str]]:
    count = 0
    for name, number, line in _source_lines(source):
        if source.limit and count >= source.limit:
            return
        if line.strip():
            count += 1
            yield name, number, line


def _source_lines(source: Source) -> Iterator[tuple[str, int, str]]:
    if source.toy:
        for number, row in enumerate(toy_rows(source.toy), 1):
            yield "toy", number, json.dumps(row)
        return
    paths = sorted(glob.glob(source.path))
    if not paths:
        raise DataError(f"no data file at {source.path}; see data.sources in the recipe")
    for path in paths:
        yield from _file_lines(path)


def _file_lines(path: str) -> Iterator[tuple[str, int, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield path, number, line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _queries(path: str) -> Iterator[str]:
    """The queries (or last user turns) of a file whose rows must not be trained on."""
    if not Path(path).exists():
        raise DataError(f"no file at {path}; see data.exclude in the recipe")
    for name, number, line in _file_lines(path):
        try:
            row = json.loads(line)
            query = row.get("query", row.get("question"))
            if query is None:
                query = [m["content"] for m in row["messages"] if m["role"] == "user"][-1]
            yield query.strip()
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise DataError(f'{name}, line {number}: an excluded row needs "query", "question" or "messages"') from None


def _check_skips(parts: Sequence[_Tokenised], max_skipped: int) -> None:
    errors = [message for part in parts for message in part.errors]
    if len(errors) > max_skipped:
        more = f" ({len(errors)} malformed rows, data.max_skipped = {max_skipped})" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}")


def _join(parts: Sequence[_Tokenised], settings: DataSettings) -> Examples:
    prompts = [p for part in parts for p in part.prompts]
    answers = [a for part in parts for a in part.answers]
    weights = np.concatenate([np.full(len(part.prompts), part.source.weight) for part in parts])
    is_distilled = np.concatenate([np.full(len(part.prompts), part.source.distill) for part in parts])
    fits = np.array([len(p) + len(a) <= settings.pack_length for p, a in zip(prompts, answers, strict=True)], dtype=bool)
    if not fits.any():
        reason = f"all {len(fits)} rows are longer than data.pack_length = {settings.pack_length}" if len(fits) else "the data has no rows"
        raise DataError(f"nothing to train on: {reason}")
    pieces = [piece for p, a, fit in zip(prompts, answers, fits, strict=True) if fit for piece in (p, a)]
    ends = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    return Examples(
        tokens=np.concatenate(pieces),
        starts=ends[::2],
        answers=ends[1::2],
        weights=weights[fits],
        is_distilled=is_distilled[fits],
        num_skipped=sum(len(part.errors) for part in parts),
        num_excluded=sum(part.num_excluded for part in parts),
        num_too_long=int((~fits).sum()),
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
