from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from refusion.errors import ConfigError, DataError
from refusion.synthesis.jsonl import read_queries, read_rows
from refusion.synthesis.sampler import Sampling
from refusion.synthesis.selfwritten import SelfWriter, SynthesisSettings, user_turn_prefix

EOS, START = 1, 2
FIRST = 10  # id of the first letter


class LetterTokenizer:
    """One id per character from `FIRST` on; `<end>` and `<start>` are specials."""

    eos_token_ids = (EOS,)
    special_ids = frozenset({EOS, START})
    vocab_size = 140

    def encode_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        turns = [[START, *self.encode(m["role"] + ":" + m["content"]), EOS] for m in messages]
        return [i for turn in turns for i in turn] + ([START, *self.encode("assistant:")] if add_generation_prompt else [])

    def encode(self, text: str) -> list[int]:
        return [ord(c) + FIRST for c in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        names = {} if skip_special_tokens else {EOS: "<end>", START: "<start>"}
        return "".join(names.get(i, "") if i < FIRST else chr(i - FIRST) for i in ids)


class ScriptedSampler:
    """Says a fixed thing for every draft number."""

    embedding = torch.zeros(140, 1)

    def __init__(self, queries: dict[int, str], answers: dict[int, str]) -> None:
        self.queries, self.answers, self.calls = queries, answers, []

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, row_ids: Sequence[int], **_: object) -> list[list[int]]:
        self.calls.append(len(prompts))
        script = self.queries if sampling.max_new_tokens else self.answers
        return [self.said(script, i) for i in row_ids]

    def said(self, script: dict[int, str], number: int) -> list[int]:
        text = script.get(number, f"text of draft number {number}")
        tokens = LetterTokenizer().encode(text.removesuffix("..."))
        return tokens if text.endswith("...") else [*tokens, EOS]


def writer(output: Path, sampler: ScriptedSampler, **options: object) -> SelfWriter:
    return SelfWriter(sampler, LetterTokenizer(), output, SynthesisSettings(), **({"batch_size": 4096} | options))  # type: ignore[arg-type]


QUERIES = {1: "What is rain?", 2: "what is RAIN", 3: "endless...", 4: "kept aside", 5: "say <end>", 6: "!?"}
ANSWERS = {7: "never closed...", 8: "short", 9: "abcd" * 10, 10: "here is <start> as letters"}


def test_every_reason_is_counted_and_only_good_pairs_are_kept(tmp_path: Path) -> None:
    progress = writer(tmp_path, ScriptedSampler(QUERIES, ANSWERS), held_out=["Kept aside!"]).write(3)
    rows = [row for _, row in read_rows(tmp_path / "part-00000.jsonl")]
    assert [row["query"] for row in rows] == ["text of draft number 0", "What is rain?", "text of draft number 11"]
    assert progress.dropped == {
        "duplicate query": 1, "query not closed": 1, "held-out query": 1, "special-token text": 2, "query empty": 1,
        "answer not closed": 1, "answer short": 1, "repetition": 1,
    }  # fmt: skip
    assert progress.num_drafts == 12
    assert progress.num_pairs == 3


def test_a_run_that_keeps_nothing_ends_and_says_why(tmp_path: Path) -> None:
    sampler = ScriptedSampler({}, dict.fromkeys(range(1000), "never closed..."))
    with pytest.raises(DataError, match=r"none of 256 drafts .* answer not closed; raise max_length \(512\)"):
        writer(tmp_path, sampler, batch_size=64).write(3)
    assert sum(sampler.calls[::2]) == 256


def test_given_queries_may_all_be_dropped(tmp_path: Path) -> None:
    sampler = ScriptedSampler({}, dict.fromkeys(range(1000), "never closed..."))
    progress = writer(tmp_path, sampler, batch_size=64, queries=[f"question {i}" for i in range(300)]).write()
    assert (progress.num_pairs, progress.main_reason) == (0, "answer not closed")


def test_rows_depend_neither_on_batch_size_nor_on_interruptions(tmp_path: Path) -> None:
    def all_rows(output: Path) -> list[object]:
        return [row for part in sorted(output.glob("part-*.jsonl")) for _, row in read_rows(part)]

    writer(tmp_path / "whole", ScriptedSampler(QUERIES, ANSWERS)).write(90)
    for count in (5, 40, 90):
        writer(tmp_path / "parts", ScriptedSampler(QUERIES, ANSWERS), batch_size=7).write(count)
    assert all_rows(tmp_path / "whole") == all_rows(tmp_path / "parts")
    assert len(all_rows(tmp_path / "whole")) == 90


def test_finished_shards_survive_an_interrupt(tmp_path: Path) -> None:
    sampler = ScriptedSampler({}, {})
    interrupted = writer(tmp_path, sampler, batch_size=10)
    interrupted.on_batch = lambda progress: (_ for _ in ()).throw(KeyboardInterrupt) if progress.num_parts == 2 else None
    with pytest.raises(KeyboardInterrupt):
        interrupted.write(100)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part-00000.jsonl", "part-00001.jsonl", "state.json"]
    assert writer(tmp_path, sampler, batch_size=10).write(30).num_pairs == 30


def test_given_queries_are_answered_in_order(tmp_path: Path) -> None:
    queries = ["one?", "two?", "one?", "three?"]
    progress = writer(tmp_path, ScriptedSampler({}, {}), queries=queries, batch_size=2).write()
    assert [row["query"] for part in sorted(tmp_path.glob("part*")) for _, row in read_rows(part)] == ["one?", "two?", "three?"]
    assert progress.dropped == {"duplicate query": 1}


def test_other_settings_in_a_begun_directory_are_refused(tmp_path: Path) -> None:
    writer(tmp_path, ScriptedSampler({}, {})).write(3)
    with pytest.raises(ConfigError, match="seed"):
        SelfWriter(ScriptedSampler({}, {}), LetterTokenizer(), tmp_path, SynthesisSettings(seed=4), batch_size=8)  # type: ignore[arg-type]
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json"):
        writer(tmp_path, ScriptedSampler({}, {}))


def test_the_number_of_pairs_is_needed_without_queries(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_pairs"):
        writer(tmp_path, ScriptedSampler({}, {})).write()


def test_user_turn_prefix_ends_where_the_user_begins() -> None:
    tokenizer = LetterTokenizer()
    assert tokenizer.decode(user_turn_prefix(tokenizer), skip_special_tokens=False) == "<start>user:"  # type: ignore[arg-type]


def test_bad_query_files_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    good = (
        json.dumps({"query": "a"}) + "\n" + json.dumps({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]})
    )
    path.write_text(good + "\n")
    assert read_queries(path) == ["a", "b"]
    for bad in ("{", "[]", '{"text": 1}'):
        path.write_text(good + "\n" + bad + "\n")
        with pytest.raises(DataError, match=r"queries\.jsonl:3"):
            read_queries(path)
    with pytest.raises(DataError, match="cannot read"):
        read_queries(tmp_path / "absent.jsonl")
