"""
Run Python code written by a model in a sandbox.

Each program gets a new bubblewrap sandbox: its own namespaces for users, processes, network, mounts and IPC, no
capabilities, no /proc, a read-only view of the interpreter and the system's libraries, one writable folder of
bounded size (/tmp, in memory), an empty environment, a system-call filter, and limits on memory, CPU, processes,
open files, file size and output. Without bubblewrap nothing runs: SandboxUnavailable.

Code can manipulate anything in its own interpreter, including tests that judge it. Therefore give tests as `check`:
they run in a second sandbox that the code cannot reach, and exchange only plain data with the function under test.
Exiting early, an object that equals everything, or a patched `assert` do not pass there.

    execute_code("print(1 + 1)").stdout                                        # "2\\n"
    execute_code("def f(x): return x + 1", check="def check(f): assert f(1) == 2", entry_point="f").success
"""

import contextlib
import fcntl
import functools
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError
from nanochat.seccomp import filter_program

MAX_OUTPUT = 1 << 20  # bytes kept of each stream; the rest is discarded
MAX_FILES = 8 << 20  # bytes in the private /tmp
MAX_OPEN_FILES = 32
MAX_PROCESSES = 8  # processes and threads together, the sandbox's own two included
NOBODY = "65534"
CHILD = Path(__file__).with_name("execution_child.py")


class SandboxUnavailable(UserError):
    """This machine cannot isolate a program, so none is run."""


@dataclass
class ExecutionResult:
    """Result of a program. `success`: it ran to its end and passed its check, if there was one."""

    success: bool
    stdout: str
    stderr: str
    error: str | None = None
    timeout: bool = False
    memory_exceeded: bool = False


# ---------------------------------------------------------------------------------------------------------
# The command line of the sandbox


def _python() -> str:
    """The interpreter outside of a virtual environment."""
    return f"{os.path.realpath(sys.base_prefix)}/bin/python{sys.version_info.major}.{sys.version_info.minor}"


def _bind(*paths: str) -> list[str]:
    """Mounts of `paths`, read-only, where they exist. Parent folders are made so that all may enter."""
    mounts = []
    for path in dict.fromkeys(path for path in paths if os.path.exists(path)):
        for folder in reversed(Path(path).parents[:-1]):
            mounts += ["--dir", str(folder)]
        mounts += ["--ro-bind", path, path]
    return mounts


def _view() -> list[str]:
    """Read-only mounts of the interpreter and the shared libraries."""
    prefix = os.path.realpath(sys.base_prefix)
    mounts = _bind("/usr/lib", "/usr/lib32", "/usr/lib64", f"{prefix}/lib", f"{prefix}/lib64", _python())
    for path in ["/lib", "/lib64"]:
        mounts += ["--symlink", os.readlink(path), path] if os.path.islink(path) else _bind(path)  # merged /usr
    return mounts + _bind("/etc/ld.so.cache")


def _command(bwrap: str) -> list[str]:
    inner = [bwrap, "--unshare-user", "--unshare-all", "--disable-userns", "--cap-drop", "ALL", "--uid", NOBODY]
    inner += ["--gid", NOBODY, "--hostname", "sandbox", "--die-with-parent", "--new-session", *_view()]
    for device in ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]:
        inner += ["--dev-bind", device, device]  # not --dev: its /dev/shm is writable without bound
    inner += ["--size", str(MAX_FILES), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    if os.geteuid() != 0:
        return inner
    # The kernel does not limit the number of root's processes, so root becomes nobody first. An outer sandbox
    # keeps the interpreter in reach, which often lives in root's home.
    setpriv = shutil.which("setpriv") or "/usr/bin/setpriv"
    outer = [bwrap, "--die-with-parent", "--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    outer += [*_view(), *_bind(bwrap, setpriv)]
    # Ending it ends the process namespace, and so the processes of the other user.
    outer += ["--unshare-pid", "--proc", "/proc", "--dev-bind", "/dev", "/dev", "--dir", "/tmp"]
    return [*outer, "--", setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--", *inner]


@functools.cache
def find_sandbox() -> list[str]:
    """The command that starts a program in the sandbox, after one trial. Raises SandboxUnavailable."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxUnavailable(
            "running model-written code needs bubblewrap, which is not installed: `apt-get install"
            " bubblewrap` (version 0.8 or newer). Without it no such code is run."
        )
    command = _command(bwrap)
    with _Program(command, "program", "", timeout=20, memory_bytes=256 << 20) as probe:
        _collect([probe], probe, time.monotonic() + 20)
    if probe.outcome() is None:
        raise SandboxUnavailable(
            "bubblewrap is installed but cannot isolate a program here, so model-written code is not run;"
            f" it said: {probe.text('stderr').strip() or 'nothing'}. It needs version 0.8 or newer and the"
            " right to create namespaces (in a container: start it with that right, or use another machine)."
        )
    return command


# ---------------------------------------------------------------------------------------------------------
# One sandboxed process


class _Program:
    """A running sandbox and its output so far. Leaving the `with` block kills it."""

    def __init__(self, command, role, code, timeout, memory_bytes, peer=None, entry_point=None):
        self.token = secrets.token_hex(16)
        limits = {
            "RLIMIT_AS": memory_bytes,
            "RLIMIT_CPU": math.ceil(timeout) + 1,
            "RLIMIT_NPROC": MAX_PROCESSES,
            "RLIMIT_NOFILE": MAX_OPEN_FILES,
            "RLIMIT_FSIZE": MAX_FILES,
            "RLIMIT_CORE": 0,
        }
        with contextlib.ExitStack() as at_failure, contextlib.ExitStack() as after_start:
            status, status_end = os.pipe()
            status = at_failure.enter_context(os.fdopen(status, "rb"))
            after_start.callback(os.close, status_end)
            job = {"role": role, "code": code, "token": self.token, "status": status_end, "limits": limits}
            job |= {"peer": peer and peer.fileno(), "entry_point": entry_point}
            inherited = [status_end] + ([peer.fileno()] if peer else [])
            stdin = _sealed_file(json.dumps(job).encode())
            after_start.callback(os.close, stdin)
            if (program := filter_program()) is not None:
                inherited.append(_sealed_file(program))
                after_start.callback(os.close, inherited[-1])
                command = [*command, "--seccomp", str(inherited[-1])]
            self.process = subprocess.Popen(
                [*command, "--", _python(), "-I", "-S", "-X", "utf8", "-c", CHILD.read_text()],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},  # bubblewrap's own environment would be readable inside, so it is empty too
                pass_fds=inherited,
                start_new_session=True,
            )
            at_failure.pop_all()
        self.files = {"stdout": self.process.stdout, "stderr": self.process.stderr, "status": status}
        self.said = {name: bytearray() for name in self.files}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.process.wait()
        for file in self.files.values():
            file.close()

    def kill(self):
        if self.process.poll() is None:  # not reaped yet, so the group id is still ours
            os.killpg(self.process.pid, signal.SIGKILL)  # this ends its process namespace

    def text(self, name) -> str:
        return bytes(self.said[name]).decode("utf-8", errors="replace")

    def outcome(self) -> dict | None:
        """What the child reported at its end; None if it did not reach it."""
        try:
            outcome = json.loads(self.said["status"])
        except ValueError:
            return None
        if not isinstance(outcome, dict) or not secrets.compare_digest(str(outcome.get("token")), self.token):
            return None
        return outcome


def _sealed_file(data: bytes) -> int:
    """A descriptor of an unnamed, sealed file in memory."""
    fd = os.memfd_create("job", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _collect(programs, decisive, deadline) -> bool:
    """Read all streams until `decisive` closes its own, then kill and drain the rest. Returns whether time ran out."""
    with selectors.DefaultSelector() as selector:
        waiting = set()
        for program in programs:
            for name, file in program.files.items():
                selector.register(file, selectors.EVENT_READ, (program, name))
                waiting.add((program, name))
        late = False
        while waiting:
            if not late and time.monotonic() > deadline:
                late = True
            if late or not any(program is decisive for program, _ in waiting):
                for program in programs:
                    program.kill()
            for key, _ in selector.select(timeout=0.1 if late else max(0.0, deadline - time.monotonic())):
                program, name = key.data
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                    waiting.remove(key.data)
                kept = program.said[name]
                kept += chunk[: MAX_OUTPUT - len(kept)]
        return late


# ---------------------------------------------------------------------------------------------------------


def execute_code(
    code: str,
    timeout: float = 5.0,
    memory_bytes: int = 256 << 20,
    check: str | None = None,
    entry_point: str | None = None,
) -> ExecutionResult:
    """
    Run `code` in a fresh sandbox for at most `timeout` seconds, with `memory_bytes` of memory per process.

    Success means that it ran to its end: sys.exit(0) and os._exit(0) before it are failures. With
    `check` (source that defines check(candidate)) and `entry_point` (the function of `code` to test), the
    check runs in its own sandbox and decides; see the head of this file.

    Raises SandboxUnavailable where programs cannot be isolated.
    """
    command = find_sandbox()
    deadline = time.monotonic() + timeout
    start = functools.partial(_Program, command, timeout=timeout, memory_bytes=memory_bytes)
    if check is None:
        with start("program", code) as program:
            late = _collect([program], program, deadline)
        judge = program
    else:
        ours, theirs = socket.socketpair()
        with ours, theirs, start("candidate", code, peer=theirs, entry_point=entry_point) as program:
            theirs.close()  # each end is open in one sandbox only, so that the other notices its end
            with start("check", check, peer=ours) as judge:
                ours.close()
                late = _collect([program, judge], judge, deadline)
    outcome = judge.outcome()
    own = program.outcome() or {}
    if late:
        error = f"no end within {timeout} seconds"
    elif outcome is None:
        error = "the program left before its end"
    else:
        error = own.get("error") or outcome["error"]
    return ExecutionResult(
        success=error is None,
        stdout=program.text("stdout"),
        stderr=program.text("stderr"),
        error=error,
        timeout=late,
        memory_exceeded=bool(own.get("memory")),
    )
