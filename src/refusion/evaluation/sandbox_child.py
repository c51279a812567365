"""What runs inside the sandbox process: fence off, then execute. Started by `sandbox.py` as a script; standard library only.

stdin holds JSON {"program", "tests", "verdict_fd", "nonce", "memory_bytes", "cpu_seconds", "file_bytes", "num_files"}. The nonce is written
to the verdict file only after program and tests ran to their end, so leaving early with status 0 does not count as passing.
"""

import ctypes
import json
import os
import resource
import signal
import sys

CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

FORBIDDEN_EVENTS = (
    "socket.", "subprocess.", "ctypes.", "os.kill", "os.fork", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile",
    "os.unshare", "os.setns", "os.chroot", "os.mount", "pty.", "signal.pthread_kill", "syslog.", "ftplib.", "smtplib.", "urllib.",
    "http.client.", "webbrowser.", "shutil.", "sys.remote_exec",
)  # fmt: skip
PATH_EVENTS = (
    "open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
    "os.truncate", "os.utime", "os.chdir", "glob.glob", "pathlib.Path.glob",
)  # fmt: skip

CREATING_EVENTS = ("open", "os.mkdir", "os.rename", "os.link", "os.symlink")


def main() -> None:
    job = json.loads(sys.stdin.read())
    own_namespaces()
    limit(job)
    watch(job["num_files"])
    signal.alarm(job["cpu_seconds"])
    run(job)


def own_namespaces() -> None:
    """Own user, process and network namespaces where the kernel permits; the child is the first process of its own world."""
    libc = ctypes.CDLL(None, use_errno=True)
    rest = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC
    is_apart = libc.unshare(CLONE_NEWUSER | rest) == 0 or libc.unshare(rest) == 0
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if not is_apart:
        return
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # As first process of its namespace it would ignore signals without a handler, the alarm among them.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(124))


def limit(job: dict) -> None:
    for name, value in (
        ("RLIMIT_AS", job["memory_bytes"]),
        ("RLIMIT_CPU", job["cpu_seconds"]),
        ("RLIMIT_FSIZE", job["file_bytes"]),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_CORE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))


def watch(num_files: int) -> None:
    """An audit hook, which no Python code can take off again, refuses processes, sockets, signals, too many files and foreign paths."""
    here = os.path.realpath(os.getcwd())
    library = tuple({os.path.realpath(os.path.dirname(os.__file__)), os.path.realpath(sys.base_prefix) + "/lib"})
    realpath, fspath, fsdecode = os.path.realpath, os.fspath, os.fsdecode
    created = set()
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def inside(path: str, place: str) -> bool:
        return path == place or path.startswith(place + "/")

    def hook(event: str, args: tuple) -> None:
        if event.startswith(FORBIDDEN_EVENTS):
            raise PermissionError(f"{event} is not allowed in the sandbox")
        if event not in PATH_EVENTS:
            return
        for path in args[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            if path is None or isinstance(path, int):
                continue
            place = realpath(fsdecode(fspath(path)))
            is_reading = event in ("os.listdir", "os.scandir") or (event == "open" and not ((args[2] or 0) & writing))
            if inside(place, here) and not is_reading and event in CREATING_EVENTS:
                created.add(place)
                if len(created) > num_files:
                    raise PermissionError(f"more than {num_files} files are not allowed in the sandbox")
            if inside(place, here) or (is_reading and any(inside(place, root) for root in library)):
                continue
            raise PermissionError(f"{event} outside the sandbox: {place}")

    sys.addaudithook(hook)


def run(job: dict) -> None:
    names = {"__name__": "__main__"}
    exec(compile(job["program"], "<answer>", "exec"), names)
    for test in job["tests"]:
        exec(compile(test, "<test>", "exec"), names)
    os.write(job["verdict_fd"], job["nonce"].encode())


if __name__ == "__main__":
    main()
