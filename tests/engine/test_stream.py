from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refusion.decoding.events import Event
from refusion.decoding.params import SamplingParams
from refusion.engine.stream import AnswerStream
from refusion.tokenizer import Tokenizer

EOS = 2


@pytest.fixture(scope="module")
def byte_tokenizer(byte_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(byte_tokenizer_dir)


def commits(token_ids: list[int], slot_size: int) -> list[Event]:
    """One committed event per slot."""
    return [
        Event("committed", 0, 1, start // slot_size, start, tuple(token_ids[start : start + slot_size]))
        for start in range(0, len(token_ids), slot_size)
    ]


def test_text_appears_once_all_before_it_is_final(byte_tokenizer: Tokenizer) -> None:
    stream = AnswerStream(byte_tokenizer, SamplingParams(), [EOS])
    first, second, third = commits(byte_tokenizer.encode("abcdef"), 2)
    assert [stream.push(event) for event in (third, first, second)] == ["", "ab", "cdef"]
    assert stream.text == "abcdef"


def test_drafts_are_never_shown(byte_tokenizer: Tokenizer) -> None:
    stream = AnswerStream(byte_tokenizer, SamplingParams(), [EOS])
    for kind in ("planned", "verified", "infilled", "finished"):
        assert stream.push(Event(kind, 0, 1, 0, 0, tuple(byte_tokenizer.encode("no")))) == ""


def test_nothing_follows_the_first_eos_or_the_last_wanted_token(byte_tokenizer: Tokenizer) -> None:
    ended = [*byte_tokenizer.encode("ab"), EOS, *byte_tokenizer.encode("cd")]
    for token_ids, sampling, text in (
        (ended, SamplingParams(), "ab"),
        (byte_tokenizer.encode("abcde"), SamplingParams(max_tokens=3), "abc"),
    ):
        stream = AnswerStream(byte_tokenizer, sampling, [EOS])
        assert "".join(map(stream.push, commits(token_ids, 2))) == text


def test_a_character_is_shown_whole(byte_tokenizer: Tokenizer) -> None:
    stream = AnswerStream(byte_tokenizer, SamplingParams(), [EOS])
    assert [stream.push(event) for event in commits(byte_tokenizer.encode("aéb"), 1)] == ["a", "", "é", "b"]


def test_the_beginning_of_a_stop_string_is_held_back(byte_tokenizer: Tokenizer) -> None:
    stream = AnswerStream(byte_tokenizer, SamplingParams(stop=("<x>", "zz")), [EOS])
    events = commits(byte_tokenizer.encode("a<b<x>c"), 1)
    assert [stream.push(event) for event in events] == ["a", "", "<b", "", "", "", ""]
    assert stream.text == "a<b"


@settings(max_examples=100, deadline=None)
@given(st.text("ab<é", max_size=20), st.lists(st.text("ab<é", min_size=1, max_size=3), max_size=2), st.integers(1, 4), st.integers(0, 99))
def test_any_order_of_commits_gives_the_text_before_the_first_stop(
    byte_tokenizer: Tokenizer, text: str, stops: list[str], slot_size: int, seed: int
) -> None:
    stream = AnswerStream(byte_tokenizer, SamplingParams(stop=tuple(stops)), [EOS])
    events = commits([*byte_tokenizer.encode(text), EOS], slot_size)
    random.Random(seed).shuffle(events)
    shown = "".join(map(stream.push, events))
    whole = text[: min([len(text), *(place for stop in stops if (place := text.find(stop)) >= 0)])]
    assert shown == stream.text == whole
