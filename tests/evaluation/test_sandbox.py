from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from refusion.errors import ConfigError
from refusion.evaluation.sandbox import SandboxLimits, run_many, run_python

SHORT = SandboxLimits(seconds=2.0)


def test_right_and_wrong_answers_are_told_apart() -> None:
    program = "def double(x):\n    return 2 * x"
    assert run_python(program, ["assert double(2) == 4", "assert double(0) == 0"]).passed
    wrong = run_python(program, ["assert double(2) == 5"])
    assert wrong.outcome == "failed"
    assert "AssertionError" in wrong.output


def test_the_standard_library_is_there() -> None:
    program = "import collections, decimal, difflib, heapq, itertools, json, math, random, re, statistics, string, textwrap, typing"
    assert run_python(program, ["assert math.gcd(12, 18) == 6"]).passed


EARLY_EXITS = ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "quit = 1 / 0", "def f(:", "\0"]


@pytest.mark.parametrize("program", EARLY_EXITS)
def test_leaving_before_the_tests_is_no_pass(program: str) -> None:
    assert run_python(program, ["assert False"]).outcome == "failed"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import os\nos.setsid() if os.getpid() != os.getsid(0) else 0\nwhile True: pass",
    ],
)
def test_endless_programs_end(program: str) -> None:
    started = time.monotonic()
    assert run_python(program, [], SandboxLimits(seconds=1.0)).outcome == "timeout"
    assert time.monotonic() - started < 4


def test_fork_bomb_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # so that the processes of this test can be told by their HOME
    result = run_python("import os\nwhile True:\n    os.fork()", [], SHORT)
    assert result.outcome == "failed"
    assert run_python("import subprocess\nsubprocess.run(['sleep', '60'])", [], SHORT).outcome == "failed"
    threads = "import threading, time\nfor _ in range(10**5): threading.Thread(target=time.sleep, args=(60,)).start()"
    assert run_python(threads, [], SHORT).outcome in ("failed", "timeout")
    time.sleep(0.2)
    assert processes_at_home_in(tmp_path) == []


def test_memory_hogs_and_floods_of_output_fail() -> None:
    assert run_python("x = bytearray(4 << 30)", [], SHORT).outcome == "failed"
    result = run_python("while True: print('x' * 10000)", [], SHORT)
    assert result.outcome in ("failed", "timeout")
    assert len(result.output) <= SHORT.output_bytes
    assert run_python("open('big', 'wb').write(b'x' * (64 << 20))", [], SHORT).outcome == "failed"


def test_only_so_many_files_fit() -> None:
    flood = "import os\nfor i in range(100):\n    {}"
    for what in ("open(f'f{i}', 'w').close()", "os.mkdir(f'd{i}')", "os.symlink('x', f'l{i}')"):
        result = run_python(flood.format(what), [], SHORT)
        assert result.outcome == "failed", what
        assert "more than 64 files" in result.output
    assert run_python("for i in range(100):\n    open('same', 'w').write(str(i))", ["assert open('same').read() == '99'"], SHORT).passed


def test_the_users_home_and_environment_stay_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do not tell")
    assert run_python("import os", ["assert 'SECRET_TOKEN' not in os.environ"], SHORT).passed
    home = os.path.expanduser("~")
    for attack in (
        f"import os; print(os.listdir({home!r}))",
        f"print(open({home + '/.bashrc'!r}).read())",
        "print(open('/proc/1/environ').read())",
    ):
        assert run_python(attack, [], SHORT).outcome == "failed", attack


def test_foreign_files_can_neither_be_read_nor_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("do not tell")
    result = run_python(f"print(open({str(secret)!r}).read())")
    assert result.outcome == "failed"
    assert "do not tell" not in result.output
    for attack in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.remove({str(secret)!r})",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.symlink({str(secret)!r}, 'link'); open('link').read()",
        f"import pathlib; print(list(pathlib.Path({str(Path.home())!r}).iterdir()))",
        "open('/etc/passwd').read()",
    ):
        assert run_python(attack).outcome == "failed", attack
    assert [p.name for p in tmp_path.iterdir()] == ["secret.txt"]


def test_home_is_an_empty_directory_of_its_own() -> None:
    program = "import os\nassert os.path.realpath(os.path.expanduser('~')) == os.getcwd()\nassert os.listdir('.') == []"
    assert run_python(program, ["open('note', 'w').write('x')", "assert open('note').read() == 'x'"]).passed


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('127.0.0.1', 80), 1)",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1')",
        "import _socket; _socket.socket()",
        "import ctypes; ctypes.CDLL(None).getppid()",
    ],
)
def test_sockets_and_foreign_functions_are_refused(program: str) -> None:
    result = run_python(program, [], SHORT)
    assert result.outcome == "failed"
    assert "not allowed in the sandbox" in result.output or "Error" in result.output


def test_the_parent_survives_its_children() -> None:
    for attack in ("os.kill(os.getppid(), 9)", f"os.kill({os.getpid()}, 9)", "os.kill(-1, 9)", "os.killpg(os.getpgid(0), 9)"):
        assert run_python(f"import os\n{attack}", [], SHORT).outcome == "failed"


def test_many_programs_keep_their_order() -> None:
    results = run_many([(f"x = {i}", ["assert x % 2 == 0"]) for i in range(12)])
    assert [result.passed for result in results] == [i % 2 == 0 for i in range(12)]


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="seconds"):
        SandboxLimits(seconds=0)
    with pytest.raises(ConfigError, match="num_files"):
        SandboxLimits(num_files=-1)


def processes_at_home_in(place: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HOME={place}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (OSError, ValueError):  # gone in the meantime, or not ours
            continue
    return found
