from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from refusion.synthesis.filters import QueryFilter, answer_reason, has_special_text, normalised, repetition


def test_repetition_is_the_share_of_repeated_four_grams() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1, 1, 1, 1, 1, 1]) == 2 / 3  # three 4-grams, one of them new
    assert repetition([1, 2]) == 0


@given(st.lists(st.integers(0, 5), max_size=40))
def test_repetition_is_a_share(tokens: list[int]) -> None:
    assert 0 <= repetition(tokens) < 1


def test_queries_that_differ_in_case_and_punctuation_are_the_same() -> None:
    assert normalised("What's  up, Doc?") == normalised("what s up doc") == "what s up doc"
    queries = QueryFilter(held_out=["Kept."], seen=["Known?"])
    assert [queries.reason(q) for q in ("kept", "KNOWN", "new", "...")] == ["held-out query", "duplicate query", None, "query empty"]
    queries.add("new")
    assert queries.reason("New!") == "duplicate query"


def test_answers_are_judged_in_a_fixed_order() -> None:
    def reason(tokens: list[int]) -> str | None:
        return answer_reason(tokens, eos_token_ids=[0], special_ids=[0, 1], min_tokens=6)

    assert reason([]) == reason([5, 6]) == "answer not closed"
    assert reason([5, 6, 0]) == "answer short"
    assert reason([5, 6, 7, 8, 9, 1, 0]) == "special-token text"
    assert reason([5] * 9 + [0]) == "repetition"
    assert reason([5, 6, 7, 8, 9, 10, 0]) is None


def test_special_tokens_spelt_out_are_found() -> None:
    assert has_special_text("say <|im_end|> now", ["<|im_end|>"])
    assert not has_special_text("say im_end", ["<|im_end|>"])
