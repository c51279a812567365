from __future__ import annotations

import sys

import pytest

from refusion.errors import DataError
from refusion.evaluation.final_answer import is_right
from refusion.synthesis.reasoning import FAMILIES, HELD_OUT_SEED, euclid, letters_by_word, make_rows, running_sum, spelled


def test_steps_are_worked_out_from_the_problem() -> None:
    assert running_sum({"expression": "205 - 838 + 505"}) == ["205 - 838 = -633", "-633 + 505 = -128"]
    assert euclid({"numbers": [21, 69]}) == ["69 = 3 * 21 + 6", "21 = 3 * 6 + 3", "6 = 2 * 3 + 0"]
    assert letters_by_word({"target_letter": "n", "span": ["Nine", "men"]}) == ["Nine: N i n e: 2, together 2", "men: m e n: 1, together 3"]
    assert spelled({"word": "sun"}) == ["Letters: s u n", "Backward: n u s"]


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"pip install 'refusion\[comparison\]'"):
        make_rows("gcd", 1, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_fixed_by_the_seed_right_and_never_held_out(family: str) -> None:
    pytest.importorskip("reasoning_gym")
    held_out = make_rows(family, HELD_OUT_SEED, 60)
    rows = make_rows(family, 1, 200, {row["query"] for row in held_out})
    assert rows[:50] == make_rows(family, 1, 200)[:50]
    assert not {row["query"] for row in rows} & {row["query"] for row in held_out}
    assert len({row["query"] for row in rows}) == len(rows)
    for row in rows:
        assert is_right(row["response"], row["answer"])
        assert not is_right(row["response"] + "0", row["answer"])
        last_step = row["response"].splitlines()[-2]
        assert row["answer"].lower() in last_step.replace(" ", "").lower()  # the steps end in the answer
