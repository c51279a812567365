"""Rows of data: forms that are read, mistakes that are named with file and line, rows that must not be trained on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from refusion.errors import DataError
from refusion.tokenizer import Tokenizer
from refusion.training.data import Examples, load_examples
from refusion.training.recipe import DataSettings, Source

GOOD = {"query": "Say hi.", "response": "Hi there!"}


@pytest.fixture(scope="module")
def tokenizer(base_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(base_model_dir)


def test_a_pair_is_the_templated_query_and_the_answer_with_its_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompt, answer = _load(tmp_path, [GOOD], tokenizer).pair(0)
    assert prompt.tolist() == tokenizer.encode_chat([{"role": "user", "content": "Say hi."}])
    assert answer.tolist() == [*tokenizer.encode("Hi there!"), tokenizer.eos_token_ids[0]]


def test_the_last_assistant_turn_of_a_conversation_is_the_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [("system", "Be brief."), ("user", "A?"), ("assistant", "A."), ("user", "B?"), ("assistant", "B."), ("user", "never seen")]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt, answer = _load(tmp_path, [{"messages": messages}], tokenizer).pair(0)
    assert prompt.tolist() == tokenizer.encode_chat(messages[:4])
    assert answer.tolist() == [*tokenizer.encode("B."), tokenizer.eos_token_ids[0]]


def test_special_token_text_in_an_answer_stays_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, answer = _load(tmp_path, [{"query": "q", "response": "write <|im_start|> or <empty_output>"}], tokenizer).pair(0)
    assert set(answer.tolist()) & tokenizer.special_ids == {tokenizer.eos_token_ids[0]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "Expecting property name"),
        ("[1]", "a row must be a JSON object"),
        ('{"query": "q"}', 'needs strings "query" and "response", or "messages"'),
        ('{"query": "q", "response": "  "}', "the answer is empty"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "needs an assistant turn after at least one other"),
        ('{"messages": [{"role": "user", "content": 3}]}', '"messages" must be a list'),
        ('{"prompt_ids": [1], "answer_ids": []}', "the answer is empty"),
        ('{"prompt_ids": [1], "answer_ids": [99999]}', "answer_ids must be a list of token ids below 49152"),
        ('{"prompt_ids": [16], "answer_ids": [20]}', "prompt_ids contains the mask token 16"),
        ('{"prompt_ids": [1], "answer_ids": [20, 7]}', "answer_ids contains the special token 7, which is never a target"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path, tokenizer: Tokenizer, line: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: ") as error:
        _load_files([path], tokenizer)
    assert reason in str(error.value)


def test_some_malformed_rows_may_be_skipped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["{", json.dumps(GOOD), "["]))
    assert _load_files([path], tokenizer, max_skipped=2).num_skipped == 2
    with pytest.raises(DataError, match=r"line 1: .*\(2 malformed rows, data.max_skipped = 1\)"):
        _load_files([path], tokenizer, max_skipped=1)


def test_excluded_queries_are_dropped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text(json.dumps({"query": "Say hi. ", "response": "other"}) + "\n")
    examples = _load(tmp_path, [GOOD, {"query": "Else?", "response": "Yes."}], tokenizer, exclude=(str(held_out),))
    assert (len(examples), examples.num_excluded) == (1, 1)


def test_rows_longer_than_a_packed_row_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    examples = _load(tmp_path, [GOOD, {"query": "Count.", "response": "one two " * 200}], tokenizer, pack_length=128)
    assert (len(examples), examples.num_too_long) == (1, 1)
    with pytest.raises(DataError, match=r"nothing to train on: all 1 rows are longer than data\.pack_length = 8"):
        _load(tmp_path, [GOOD], tokenizer, pack_length=8)


def test_compressed_files_globs_columns_limits_and_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for i in range(2):
        with gzip.open(tmp_path / f"part-{i}.jsonl.gz", "wt") as file:
            file.write(json.dumps({"question": f"Q{i}?", "answer": f"A{i}."}) + "\n")
    source = Source(path=str(tmp_path / "part-*.jsonl.gz"), query="question", response="answer", weight=2.5)
    examples = load_examples(DataSettings(sources=(source,)), tokenizer=tokenizer, mask_token_id=16, vocab_size=49152)
    assert [tokenizer.decode(examples.pair(i)[1]) for i in range(2)] == ["A0.", "A1."]
    assert examples.weights.tolist() == [2.5, 2.5]
    limited = Source(path=source.path, query="question", response="answer", limit=1)
    assert len(load_examples(DataSettings(sources=(limited,)), tokenizer=tokenizer, mask_token_id=16, vocab_size=49152)) == 1


def test_missing_and_truncated_files_are_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no data file at"):
        _load_files([tmp_path / "none.jsonl"], tokenizer)
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 100)[:-20])
    with pytest.raises(DataError, match="cannot read"):
        _load_files([path], tokenizer)


def _load(tmp_path: Path, rows: list[Mapping[str, Any]], tokenizer: Tokenizer, **settings: Any) -> Examples:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _load_files([path], tokenizer, **settings)


def _load_files(paths: list[Path], tokenizer: Tokenizer, **settings: Any) -> Examples:
    data = DataSettings(sources=tuple(Source(path=str(p)) for p in paths), **settings)
    return load_examples(data, tokenizer=tokenizer, mask_token_id=16, vocab_size=49152)
