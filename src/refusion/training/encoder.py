"""From rows to token ids: which turn is the answer, the chat template, every mistake a row can hold; over all cores, order kept.

Nothing here remembers a row that it has passed on; where token ids are kept is `data`'s business.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from refusion.errors import DataError, RequestError
from refusion.slots import IntArray
from refusion.tokenizer import Tokenizer
from refusion.training.layouts import shortest_lengths
from refusion.training.recipe import ObjectiveSettings, Source
from refusion.training.sources import PlacedRow

CHUNK_ROWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Which examples are short enough."""

    pack_length: int
    """Tokens of a packed row, which must hold the example's row under the objective."""
    context_length: int
    """Positions that the model has, for prompt and answer."""
    objective: ObjectiveSettings

    def fit(self, prompt: IntArray, answer: IntArray) -> npt.NDArray[np.bool_]:
        """[N] which examples of these prompt and answer lengths can be trained on."""
        return (shortest_lengths(self.objective, prompt, answer) <= self.pack_length) & (prompt + answer <= self.context_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowEncoder:
    """Turns one row into (prompt ids, answer ids), or None for an excluded query. Raises ValueError with the reason."""

    tokenizer: Tokenizer | None
    mask_token_id: int
    vocab_size: int
    source: Source
    limits: Limits
    excluded_queries: frozenset[str] = frozenset()

    def encode(self, row: Any) -> tuple[list[int], list[int]] | None:
        if not isinstance(row, dict):
            raise ValueError("a row must be a JSON object")  # noqa: TRY004  (reported with file and line as DataError)
        if row.get("prompt_ids") is not None:
            return self._ready_ids(row)
        messages, response = self._conversation(row)
        if messages[-1]["content"].strip() in self.excluded_queries:
            return None
        if not response.strip():
            raise ValueError("the answer is empty")
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: give prompt_ids and answer_ids")
        if not self.tokenizer.has_chat_template:
            raise DataError('the model has no chat template; set model.chat_template to a Jinja file or to "chatml", or give prompt_ids')
        for text in (response, *(message["content"] for message in messages)):
            text.encode()  # a lone surrogate is a ValueError here and a crash in the tokenizer
        try:
            prompt = self.tokenizer.encode_chat(messages)
        except RequestError as error:
            raise ValueError(str(error)) from error
        return prompt, [*self.tokenizer.encode(response), self.tokenizer.eos_token_ids[0]]

    def _conversation(self, row: dict[str, Any]) -> tuple[list[dict[str, str]], str]:
        """What precedes the last assistant turn, and that turn."""
        if row.get("messages") is None:
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
        return [{"role": m["role"], "content": m["content"]} for m in messages[: turns[-1]]], messages[turns[-1]]["content"]

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
            if self.limits.objective.pad_answers and answer[-1] not in self.tokenizer.eos_token_ids:
                raise ValueError(f"answer_ids ends in {answer[-1]}, no EOS, and objective.pad_answers would repeat that")
        return prompt, answer


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedChunk:
    """The examples of some consecutive rows, prompt and answer of each side by side, and what became of the other rows."""

    tokens: npt.NDArray[np.int32]
    prompt_lengths: IntArray
    answer_lengths: IntArray
    errors: list[str]
    num_excluded: int
    num_too_long: int


def encode_rows(rows: Iterable[PlacedRow], encoder: RowEncoder) -> Iterator[EncodedChunk]:
    """Encode rows chunk by chunk, over all cores where there are several chunks; a few chunks are in memory at a time."""
    chunks = _chunked(rows)
    first = list(itertools.islice(chunks, 2))
    num_processes = len(os.sched_getaffinity(0))
    if len(first) < 2 or num_processes < 2:
        yield from (_encode_chunk(encoder, chunk) for chunk in itertools.chain(first, chunks))
        return
    # fork shares the tokenizer without loading it again; the children only tokenise, they touch neither torch nor its threads.
    with multiprocessing.get_context("fork").Pool(num_processes, _set_encoder, (encoder,)) as pool:
        pending: deque[Any] = deque()
        for chunk in itertools.chain(first, chunks):
            pending.append(pool.apply_async(_encode_in_worker, (chunk,)))
            if len(pending) > 4 * num_processes:
                yield pending.popleft().get()
        while pending:
            yield pending.popleft().get()


_worker_encoder: RowEncoder | None = None


def _set_encoder(encoder: RowEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder


def _encode_in_worker(chunk: list[PlacedRow]) -> EncodedChunk:
    assert _worker_encoder is not None, "the pool sets the encoder first"
    return _encode_chunk(_worker_encoder, chunk)


def _encode_chunk(encoder: RowEncoder, chunk: list[PlacedRow]) -> EncodedChunk:
    pairs: list[tuple[list[int], list[int]]] = []
    errors: list[str] = []
    num_excluded = 0
    for row in chunk:
        try:
            pair = encoder.encode(row.value())
        except ValueError as error:  # broken JSON and broken UTF-8 included
            errors.append(f"{row.file}, {row.place}: {error}")
            continue
        if pair is None:
            num_excluded += 1
        else:
            pairs.append(pair)
    prompt_lengths, answer_lengths = (np.array([len(pair[i]) for pair in pairs], dtype=np.int64) for i in (0, 1))
    fits = encoder.limits.fit(prompt_lengths, answer_lengths)
    kept = [np.asarray([*prompt, *answer], np.int32) for (prompt, answer), fit in zip(pairs, fits, strict=True) if fit]
    return EncodedChunk(
        tokens=np.concatenate([np.zeros(0, np.int32), *kept]),
        prompt_lengths=prompt_lengths[fits],
        answer_lengths=answer_lengths[fits],
        errors=errors,
        num_excluded=num_excluded,
        num_too_long=int((~fits).sum()),
    )


def _chunked(rows: Iterable[PlacedRow]) -> Iterator[list[PlacedRow]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, CHUNK_ROWS)):
        yield chunk


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
