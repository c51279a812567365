from __future__ import annotations

import pytest

from refusion.evaluation.final_answer import final_answer, is_right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\nAnswer: 7", "7"),
        ("He pays $1,234.00 in all.\n#### 1,234", "1234"),
        ("So the answer is $18.", "18"),
        ("The answer is 18 dollars.", "18"),
        ("First 3, then 5. That makes 8", "8"),
        ("Answer: 3\nNo, wait.\nAnswer: -128", "-128"),
        ("Letters: s u n\nBackward: n u s\nAnswer: Nus", "nus"),
        ('Answer: "nus".', "nus"),
        ("#### 70,000", "70000"),
        ("Answer: 5.00", "5"),
    ],
)
def test_right_answers_in_their_many_forms(text: str, answer: str) -> None:
    assert is_right(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 8", "7"),
        ("Answer: 17", "7"),
        ("", "7"),
        ("no number", "7"),
        ("Answer: the sun", "sun"),
        ("Answer: 7\nAnswer: 8", "7"),
        ("5.01", "5"),
    ],
)
def test_wrong_answers(text: str, answer: str) -> None:
    assert not is_right(text, answer)


def test_a_mark_goes_before_a_later_number() -> None:
    assert final_answer("Answer: 12\nChecked 3 times") == "12"
    assert final_answer("nothing here") is None
