from __future__ import annotations

from refusion.evaluation.code_answers import first_block, humaneval_program, longest_valid, mbpp_programs, pass_at_1, reduce_to

PROMPT = 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef area(r):\n    """Area of a circle."""\n'
TESTS = ["assert area(1) == math.pi", "helper(1)"]


def passes(program: str) -> bool:
    return pass_at_1(["\n".join(TESTS)], [[program]]) == 1.0


def test_a_body_and_a_whole_function_both_complete_the_prompt() -> None:
    assert passes(humaneval_program(PROMPT, "    return math.pi * r * r\n```\nThat is all.", "area"))
    whole = "import math\n\ndef area(r):\n    return square(r) * math.pi\n\ndef square(r):\n    return r * r\n"
    assert passes(humaneval_program(PROMPT, whole + "```", "area"))
    assert passes(humaneval_program(PROMPT, "Sure:\n```python\n" + whole + "```\nAnd so on.", "area"))
    assert not passes(humaneval_program(PROMPT, "    return 3 * r * r\n```", "area"))


def test_what_stands_beside_the_function_cannot_fail_it() -> None:
    answer = "def area(r):\n    return math.pi * r * r\n\nprint(area('x'))\nraise SystemExit\nassert False\n```"
    program = humaneval_program(PROMPT, answer, "area")
    assert "print" not in program
    assert passes(program)


def test_an_answer_cut_off_in_a_statement_keeps_what_is_whole() -> None:
    assert passes(humaneval_program(PROMPT, "    return math.pi * r * r\n\ndef more(x):\n    return (x +", "area"))
    assert longest_valid("Here it is\nx = 1\ny = 2\nand that is it") == "x = 1\ny = 2"
    assert longest_valid("") == ""


def test_only_what_the_entry_point_needs_stays_and_helpers_of_the_prompt() -> None:
    code = "LIMIT = 3\n\n@staticmethod\ndef inner():\n    return LIMIT\n\ndef outer():\n    return inner()\n\ndef unused():\n    pass\n"
    reduced = reduce_to(code, "outer")
    assert "unused" not in reduced
    assert "@staticmethod\ndef inner" in reduced
    assert "LIMIT = 3" in reduced
    assert "def unused" in reduce_to(code, "outer", keep=["unused", "absent"])
    assert reduce_to("x = 1", "missing") == "x = 1"


def test_the_first_fence_is_the_code_closed_or_not() -> None:
    assert first_block("```python\nx = 1\n```\nthen\n```python\ny = 2\n```") == "x = 1"
    assert first_block("```\nx = 1") == "x = 1"
    assert first_block("[BEGIN]\nx = 1\n[DONE]\nmore").strip() == "x = 1"
    assert mbpp_programs([["x = 1"]], [{}]) == [["x = 1"]]


def test_a_program_that_ends_early_or_never_does_not_pass() -> None:
    assert pass_at_1(["assert True"], [["import sys; sys.exit(0)"]]) == 0.0
    assert pass_at_1(["assert f(1) == 1"], [["def f(x): return x"]]) == 1.0
