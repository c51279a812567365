"""Rows of data: forms that are read, mistakes that are named with file and line, rows that must not be trained on."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refusion.errors import DataError
from refusion.tokenizer import Tokenizer
from refusion.training import data, encoder
from refusion.training.data import Examples, load_examples, split_validation
from refusion.training.recipe import DataSettings, ObjectiveSettings, Source

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
    with pytest.raises(DataError, match=r"nothing to train on: all 1 rows are longer than data\.pack_length .*\(8 tokens\)"):
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


def test_answers_longer_than_the_context_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (GOOD, {"query": "Count.", "response": "one two " * 200})))
    settings = DataSettings(sources=(Source(path=str(path)),), pack_length=1024)
    examples = load_examples(settings, tokenizer=tokenizer, mask_token_id=16, vocab_size=49152, context_length=128)
    assert (len(examples), examples.num_too_long) == (1, 1)


def test_what_fits_depends_on_the_objective() -> None:
    """Block diffusion holds the answer nearly twice."""
    settings = DataSettings(sources=(Source(toy=100),), pack_length=32)
    plain, blocks = (
        load_examples(settings, tokenizer=None, mask_token_id=2, vocab_size=64, objective=ObjectiveSettings(name=name))
        for name in ("masked_diffusion", "block_diffusion")
    )
    narrow = load_examples(
        settings, tokenizer=None, mask_token_id=2, vocab_size=64, objective=ObjectiveSettings(name="block_diffusion", block_size=4)
    )
    assert len(narrow) < len(blocks) == len(plain), "an answer of one block has no clean half"
    assert (narrow.prompt_lengths + 2 * narrow.answer_lengths - 4 <= 32).all()


FORMS = ["rows.json", "rows.json.gz", "lines.json", "rows.jsonl.gz", "rows.parquet"]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_holds_the_same_rows(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    messages = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "A."}]
    rows = [GOOD, {"messages": messages}]
    expected = _load(tmp_path, rows, tokenizer)
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([{"messages": None, **GOOD}, {"query": None, "response": None, **rows[1]}]), path)
    else:
        text = json.dumps(rows, indent=1) if name.startswith("rows.json") and "jsonl" not in name else "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = _load_files([path], tokenizer)
    assert np.array_equal(found.tokens, expected.tokens)
    assert found.checksum == expected.checksum != 0


def test_rows_of_arrays_are_named_by_their_number(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, {"query": "q"}]))
    with pytest.raises(DataError, match=r"rows\.json, row 2: needs strings"):
        _load_files([path], tokenizer)
    path.write_text('[{"query": ')
    with pytest.raises(DataError, match=r"cannot read .*rows\.json: "):
        _load_files([path], tokenizer)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="need pyarrow; `pip install pyarrow`"):
        _load_files([path], tokenizer)


def test_a_broken_parquet_file_is_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 this is none")
    with pytest.raises(DataError, match=r"cannot read .*rows\.parquet: "):
        _load_files([path], tokenizer)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"query": "\xff", "response": "x"}', "can't decode byte 0xff"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"query": "\\ud800", "response": "x"}', "surrogates not allowed"),
        (b'{"query": null, "response": "x"}', "needs strings"),
    ],
)
def test_rows_that_no_tokenizer_could_read_are_named(tmp_path: Path, tokenizer: Tokenizer, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: ") as error:
        _load_files([path], tokenizer)
    assert reason in str(error.value)


def test_an_unknown_kind_of_file_names_those_that_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("query,response\n")
    with pytest.raises(DataError, match=r"must be one of \.jsonl, .*\.parquet"):
        _load_files([path], tokenizer)


def test_a_model_without_template_is_told_where_to_name_one_whatever_may_be_skipped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bare = Tokenizer(tokenizer._file, dataclasses.replace(tokenizer._settings, chat_template=None))
    with pytest.raises(DataError, match=r"no chat template; set model\.chat_template to a Jinja file or to \"chatml\""):
        _load(tmp_path, [GOOD] * 3, bare, max_skipped=3)


def test_many_rows_keep_their_order_over_processes(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "CHUNK_ROWS", 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    rows = [{"prompt_ids": [20 + i], "answer_ids": [30 + i] * (1 + i % 5)} for i in range(100)]
    examples = _load(tmp_path, rows, tokenizer)
    assert [examples.pair(i)[0].tolist() for i in range(100)] == [row["prompt_ids"] for row in rows]
    assert [examples.pair(i)[1].tolist() for i in range(100)] == [row["answer_ids"] for row in rows]


def test_tokenised_rows_on_disk_are_those_in_memory_and_are_made_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [GOOD, {"query": "Else?", "response": "Yes."}, {"query": "Long.", "response": "one two " * 200}]
    cache = str(tmp_path / "cache")
    in_memory = _load(tmp_path, rows, tokenizer, pack_length=128)
    on_disk = _load_files([tmp_path / "rows.jsonl"], tokenizer, pack_length=128, cache=cache)
    assert isinstance(on_disk.tokens, np.memmap)
    _assert_same_examples(in_memory, on_disk)
    monkeypatch.setattr(data, "encode_rows", lambda *_: pytest.fail("tokenised again"))
    _assert_same_examples(in_memory, _load_files([tmp_path / "rows.jsonl"], tokenizer, pack_length=128, cache=cache))
    monkeypatch.undo()
    changed = _load(tmp_path, [*rows, GOOD], tokenizer, pack_length=128, cache=cache)
    assert len(changed) == 3


def test_cached_rows_are_not_those_of_another_padding(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Which rows fit a packed row depends on what their answers are padded to."""
    path = tmp_path / "rows.jsonl"
    answer = [30, tokenizer.eos_token_ids[0]]
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({"prompt_ids": [20] * 90, "answer_ids": answer}) + "\n")
    settings = DataSettings(sources=(Source(path=str(path)),), pack_length=128, cache=str(tmp_path / "cache"))
    for padding, count in ((0, 2), (64, 1)):
        objective = ObjectiveSettings(name="masked_diffusion", pad_answers=padding)
        found = load_examples(settings, tokenizer=tokenizer, mask_token_id=16, vocab_size=49152, objective=objective)
        assert (len(found), found.num_too_long) == (count, 2 - count)


@pytest.mark.parametrize("name", ["refusion", "masked_diffusion"])
def test_an_answer_without_an_end_is_not_padded_with_its_last_token(tmp_path: Path, tokenizer: Tokenizer, name: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt_ids": [20], "answer_ids": [30, 31]}) + "\n")
    settings = DataSettings(sources=(Source(path=str(path)),))
    for padding, refused in ((0, nullcontext()), (16, pytest.raises(DataError, match="31, no EOS"))):
        with refused:
            load_examples(
                settings, tokenizer=tokenizer, mask_token_id=16, vocab_size=49152,
                objective=ObjectiveSettings(name=name, pad_answers=padding),
            )  # fmt: skip


def test_a_failed_tokenisation_leaves_nothing_in_the_cache(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="line 2"):
            _load(tmp_path, [GOOD, {}], tokenizer, cache=str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_validation_rows_are_held_out_and_the_same_each_time() -> None:
    examples = load_examples(DataSettings(sources=(Source(toy=50),)), tokenizer=None, mask_token_id=2, vocab_size=64)
    training, validation = split_validation(examples, 10, seed=0)
    again = split_validation(examples, 10, seed=0)[1]
    assert (len(training), len(validation)) == (40, 10)
    assert sorted([*training.starts, *validation.starts]) == examples.starts.tolist()
    assert np.array_equal(validation.starts, again.starts)
    assert not np.array_equal(validation.starts, split_validation(examples, 10, seed=1)[1].starts)
    with pytest.raises(DataError, match="leaves nothing to train on"):
        split_validation(examples, 50, seed=0)


def _assert_same_examples(first: Examples, second: Examples) -> None:
    for field in dataclasses.fields(Examples):
        assert np.array_equal(getattr(first, field.name), getattr(second, field.name)), field.name


def _load(tmp_path: Path, rows: list[Mapping[str, Any]], tokenizer: Tokenizer, **settings: Any) -> Examples:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _load_files([path], tokenizer, **settings)


def _load_files(paths: list[Path], tokenizer: Tokenizer, **settings: Any) -> Examples:
    sources = tuple(Source(path=str(p)) for p in paths)
    return load_examples(DataSettings(sources=sources, **settings), tokenizer=tokenizer, mask_token_id=16, vocab_size=49152)
