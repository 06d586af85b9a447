"""
The program inside the sandbox of execution.py, run as `python -I -S -c <this text>`: standard library only.

It reads one JSON job from standard input. The job's role is one of
    program    run the code; report whether it reached its end
    candidate  run the code, then answer calls of its function until the other side closes the connection
    check      run the code, whose check(candidate) calls the function of a candidate in another sandbox
Calls and replies are lines of Python literals over a socket, so that only data is exchanged.
"""

import ast
import contextlib
import json
import os
import resource
import socket
import sys
import traceback

MAX_REPLY = 1 << 20  # characters


class CandidateFailed(Exception):
    """The function under test raised, ended its process, or returned something that is not plain data."""


def to_literal(value):
    """`value` as text for ast.literal_eval; subclasses of the plain types become the plain types."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, float):
        return {"inf": "1e999", "-inf": "-1e999"}.get(float.__repr__(value), float.__repr__(value))
    for kind in (int, complex, str, bytes):
        if isinstance(value, kind):
            return kind.__repr__(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_literal(k)}: {to_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple | set):
        items = "".join(f"{to_literal(item)}, " for item in value)
        if isinstance(value, list):
            return f"[{items}]"
        if isinstance(value, tuple):
            return f"({items})"
        return f"{{{items}}}" if items else "set()"
    raise TypeError(f"{type(value).__name__} is not plain data")


def serve(function, peer):
    """Answer each line of arguments with the function's result."""
    for line in peer:
        try:
            reply = "ok " + to_literal(function(*ast.literal_eval(line)))
        except BaseException as error:  # also SystemExit: the caller is told of whatever happened
            reply = "error " + describe(error).replace("\n", " ")
        with contextlib.suppress(OSError, ValueError):  # closed ones
            sys.__stdout__.flush()  # before the reply, because this process is ended once the check has its answers
        peer.write(reply + "\n")
        peer.flush()


def remote_function(peer):
    """A function that sends its arguments to serve() in the other sandbox and returns the result."""

    def candidate(*args):
        peer.write(to_literal(args) + "\n")
        peer.flush()
        reply = peer.readline(MAX_REPLY)
        if not reply.endswith("\n"):
            raise CandidateFailed("it ended its process" if not reply else "its result is too long")
        status, _, text = reply.rstrip("\n").partition(" ")
        if status != "ok":
            raise CandidateFailed(text)
        return ast.literal_eval(text)

    return candidate


def describe(error):
    if isinstance(error, SystemExit):
        return f"SystemExit: {error.code}: the program left before its end"
    return "".join(traceback.format_exception_only(error)).strip()[:2000]


def run(job):
    namespace = {"__name__": "__main__" if job["role"] == "program" else "program"}
    exec(compile(job["code"], "<program>", "exec"), namespace)
    if job["role"] == "program":
        return
    with socket.socket(fileno=job["peer"]) as connection, connection.makefile("rw", encoding="utf-8") as peer:
        if job["role"] == "candidate":
            serve(namespace[job["entry_point"]], peer)
        else:
            namespace["check"](remote_function(peer))


def main():
    job = json.loads(sys.stdin.buffer.read())
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    own_pid = os.getpid()
    outcome = {"token": job["token"], "error": None, "memory": False}
    try:
        run(job)
        sys.stdout.flush()
        sys.stderr.flush()
    except MemoryError:
        outcome.update(error="MemoryError: the memory limit was reached", memory=True)
    except BaseException as error:  # the code is free to raise anything
        outcome["error"] = describe(error)
        if job["role"] == "program":
            with contextlib.suppress(OSError, ValueError):  # it may have closed its stderr
                traceback.print_exc(limit=-3)
    if os.getpid() == own_pid:  # not in a child that the code forked and that also reached the end
        os.write(job["status"], json.dumps(outcome).encode())
    os._exit(0)  # so that no exit handler of the code runs after the report


main()
