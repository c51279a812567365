from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from refusion.errors import DataError
from refusion.evaluation import sample_log
from refusion.evaluation.sample_log import SampleLog

SETTINGS = {"decoder": "refusion", "seed": 0}


def row(doc_id: int, score: float = 1.0) -> dict[str, object]:
    return {"task": "t", "doc_id": doc_id, "scores": {"acc": score}}


def test_rows_come_back_once_each_and_a_broken_line_goes(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "run.samples", SETTINGS, resume=False)
    log.append("gsm8k", [row(0), row(1)])
    log.append("gsm8k", [row(1, 0.0)])
    with log.path("gsm8k").open("a") as file:
        file.write('{"task": "t", "doc_id": 2, "sco')  # a crash while writing
    again = SampleLog(tmp_path / "run.samples", SETTINGS, resume=True)
    assert again.rows("gsm8k") == [row(0), row(1)]
    again.append("gsm8k", [row(2)])
    assert [found["doc_id"] for found in again.rows("gsm8k")] == [0, 1, 2]
    assert again.rows("mbpp") == []


def test_answers_are_neither_overwritten_nor_mixed(tmp_path: Path) -> None:
    SampleLog(tmp_path / "run.samples", SETTINGS, resume=False)
    with pytest.raises(DataError, match="add --resume"):
        SampleLog(tmp_path / "run.samples", SETTINGS, resume=False)
    with pytest.raises(DataError, match="made with decoder=refusion, not autoregressive"):
        SampleLog(tmp_path / "run.samples", SETTINGS | {"decoder": "autoregressive"}, resume=True)
    (tmp_path / "run.samples" / "settings.json").write_text("{")
    with pytest.raises(DataError, match="cannot read"):
        SampleLog(tmp_path / "run.samples", SETTINGS, resume=True)


def test_what_is_appended_while_another_process_mends_the_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = (SampleLog(tmp_path / "run.samples", SETTINGS, resume=True) for _ in range(2))
    ours.append("gsm8k", [row(0), row(0)])  # one too many, so that reading writes the file anew
    appending = Thread(target=other.append, args=("gsm8k", [row(1)]))
    atomic_file = sample_log.atomic_file

    @contextmanager
    def slow(target: Path) -> Iterator[Path]:
        with atomic_file(target) as draft:
            yield draft
            appending.start()
            appending.join(timeout=0.3)

    monkeypatch.setattr(sample_log, "atomic_file", slow)
    assert ours.rows("gsm8k") == [row(0)]
    appending.join()
    assert ours.rows("gsm8k") == [row(0), row(1)]


def test_answers_may_hold_line_separators_that_are_no_line_feeds(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "run.samples", SETTINGS, resume=True)
    written = [row(0) | {"response": "one\u2028two\x85three\r\nfour"}, row(1)]
    log.append("gsm8k", written)
    assert log.rows("gsm8k") == written


def test_a_line_that_another_process_left_half_written_spoils_no_other(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "run.samples", SETTINGS, resume=True)
    log.append("gsm8k", [row(0)])
    with log.path("gsm8k").open("a") as file:
        file.write('{"task": "gsm8k", "doc_')
    log.append("gsm8k", [row(1), row(2)])
    assert log.rows("gsm8k") == [row(0), row(1), row(2)]
