from __future__ import annotations

import ast
import gzip
import json
from email.message import Message
from pathlib import Path

import pytest

from refusion.errors import DataError
from refusion.synthesis.corpora import arc, functions, gsm8k, is_permissive, is_wanted, mbpp
from refusion.synthesis.jsonl import read_rows, write_rows

SOURCE = '''
def count_vowels(text: str) -> int:
    """Count the vowels of a text, upper case too.

    More words that nobody needs.
    """
    total = 0
    for letter in text.lower():
        total += letter in "aeiou"
    return total

def undocumented(x):
    y = x + 1
    return y

def short(x):
    """Return x plus one, quickly and correctly."""
    return x + 1

class Thing:
    def again(self, text):
        """The same body under another name, which is a repetition."""
        total = 0
        for letter in text.lower():
            total += letter in "aeiou"
        return total
'''


def rows_file(path: Path, *rows: object) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_gsm8k_loses_the_calculator_marks_and_keeps_the_answer(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl.gz", {"question": "How many? ", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"})
    assert list(gsm8k(path)) == [{"query": "How many?", "response": "48/2 = 24 clips.\n#### 24", "source": "gsm8k"}]


def test_arc_answers_with_letter_and_text(tmp_path: Path) -> None:
    row = {"question": "Hot or cold?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
    assert next(arc(rows_file(tmp_path / "a.jsonl.gz", row))) == {
        "query": "Hot or cold?\n\nA. ice\nB. fire", "response": "The answer is B. fire", "source": "arc",
    }  # fmt: skip
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:2"):
        list(arc(rows_file(tmp_path / "a.jsonl.gz", row, row | {"answerKey": "C"})))


def test_mbpp_code_has_plain_line_ends_and_spaces(tmp_path: Path) -> None:
    row = {"text": "Add one.", "code": "def f(x):\r\n\treturn x + 1\r\n", "test_list": ["assert f(1) == 2"]}
    (pair,) = mbpp(rows_file(tmp_path / "a.jsonl.gz", row))
    assert pair["response"] == "```python\ndef f(x):\n    return x + 1\n```"
    assert pair["query"].endswith("assert f(1) == 2")
    with pytest.raises(DataError, match="code"):
        list(mbpp(rows_file(tmp_path / "a.jsonl.gz", {"text": "x"})))


def test_functions_come_documented_bare_and_once(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "bad.py").write_text("def (")
    files = [(tmp_path / "bad.py", "x"), (tmp_path / "a.py", "x"), (tmp_path / "a.py", "x")]
    (pair,) = functions(files, count_tokens=len)
    assert pair["query"] == "Write the Python function `count_vowels(text: str)`: Count the vowels of a text, upper case too."
    assert "nobody" not in pair["response"]
    code = pair["response"].removeprefix("```python\n").removesuffix("\n```")
    assert isinstance(ast.parse(code).body[0], ast.FunctionDef)
    assert list(functions(files, count_tokens=len, max_tokens=20)) == []


def test_only_bsd_and_apache_packages_and_no_tests_are_read() -> None:
    def metadata(**headers: str) -> Message:
        message = Message()
        for name, value in headers.items():
            message[name.replace("_", "-")] = value
        return message

    assert is_permissive(metadata(License_Expression="BSD-3-Clause"))
    assert is_permissive(metadata(Classifier="License :: OSI Approved :: Apache Software License"))
    assert not is_permissive(metadata(License_Expression="MPL-2.0"))
    assert not is_permissive(metadata(License_Expression="Apache-2.0 OR GPL-3.0"))
    assert not is_permissive(metadata(Name="silent"))
    assert is_wanted(Path("json/decoder.py"))
    assert not is_wanted(Path("numpy/tests/a.py"))


def test_rows_survive_writing_and_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    rows = [{"query": "naïve", "response": "日本"}]
    for name in ("a.jsonl", "a.jsonl.gz", "b.jsonl.gz"):
        write_rows(tmp_path / name, rows)
        assert [row for _, row in read_rows(tmp_path / name)] == rows
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_a_truncated_gzip_file_is_one_clear_error(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl.gz", [{"query": str(i)} for i in range(1000)])
    data = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cannot read"):
        list(read_rows(tmp_path / "a.jsonl.gz"))
