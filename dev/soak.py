"""
Load test of a chat server with MegaContext: many long chats at once. Does a request fail, does a chat see the text of
another, does memory grow?

    python dev/soak.py --url http://127.0.0.1:8000 --pid 4711        # a running `python -m scripts.chat_web --mc`

    python dev/soak.py --restarts 20 --serve="-g d4 --device_type=cpu"     # its own server, killed between turns

The second keeps the conversations on disk (--mc_tree disk, these options beside): does one lose what it was told?

Each chat sends numbers of its own, starts a new conversation after some turns, and after each turn asks the server for
the text that its session holds, which must be its own. It connects to this machine only.
"""

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


import httpx
import psutil

from nanochat.common import UserError
from nanochat.configurator import run
from nanochat.ranges import Amount, Count, CountOr0

HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass
class Config:
    url: str = "http://127.0.0.1:8000"
    """address of the server, on this machine"""
    pid: CountOr0 = 0
    """process id of the server, to report its memory; 0 for no report"""
    chats: Count = 20
    """number of simultaneous chats"""
    minutes: Amount = 10.0
    """duration"""
    turns: Count = 12
    """turns of a conversation before the chat starts a new one"""
    max_tokens: Count = 32
    """tokens per answer, at most"""
    restarts: CountOr0 = 0
    """how often a server of its own is ended, every other time by SIGKILL, with a turn of each chat between"""
    serve: str = ""
    """options of scripts.chat_web for --restarts"""


def words_of(chat, turn):
    return f"In turn {turn} the secret of chat {chat} is {chat * 7919 + turn}. " * 3


def one_turn(client, config, key, messages):
    """(answer to the messages, last focus event). Raises RuntimeError or httpx.HTTPError when the request fails."""
    body = {"messages": messages, "max_tokens": config.max_tokens, "conversation": key, "focus": True}
    answer, state = [], None
    with client.stream("POST", "/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {response.read()[:200]!r}")
        for line in response.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(f"error in the stream: {event['error']}")
                answer.append(event.get("token", ""))
                state = event.get("focus", state)
    return "".join(answer), state


def chat_until(end, number, config, counts, lock):
    """Hold conversations as one chat until the time `end`, and add what happened to counts."""
    pick = random.Random(number)
    with httpx.Client(base_url=config.url, timeout=300) as client:
        while time.monotonic() < end:
            key, messages, first = f"{pick.getrandbits(128):032x}", [], f"You: {words_of(number, 0)}"
            for turn in range(config.turns):
                messages.append({"role": "user", "content": words_of(number, turn)})
                seen = Counter()
                try:
                    answer, state = one_turn(client, config, key, messages)
                    messages.append({"role": "assistant", "content": answer})
                    seen["turns"] += 1
                    seen["over budget"] += state is not None and state["entries"] > state["budget"]
                    held = client.post("/focus/text", json={"conversation": key, "start": 0, "end": 60}).json()["text"]
                    seen["looked at"] += held is not None  # None: its session was evicted
                    seen["mixed up"] += held is not None and held[: len(first)] != first[: len(held)]
                except (RuntimeError, httpx.HTTPError) as error:
                    seen["failed"] += 1
                    print(f"chat {number}, turn {turn}: {error!r}", file=sys.stderr)
                with lock:
                    counts.update(seen)
                if time.monotonic() > end or seen["failed"]:
                    break


@contextmanager
def served(config):
    """A server of its own on the port of config.url, whose process it gives; killed at the end."""
    port = httpx.URL(config.url).port
    options = ["--mc", "--mc_tree=disk", f"--port={port}", f"--mc_sessions={config.chats}", *config.serve.split()]
    command = [sys.executable, "-m", "scripts.chat_web", *options]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with suppress(httpx.HTTPError):
                if httpx.get(f"{config.url}/health").json()["ready"]:
                    break
            if process.poll() is not None:
                raise UserError(f"the server did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def turn_after_restart(config, number, turn, chat):
    """One turn of a chat; returns what went wrong, or None. chat: its messages so far."""
    key = f"{random.Random(number).getrandbits(128):032x}"
    with httpx.Client(base_url=config.url, timeout=300) as client:

        def held():
            body = {"conversation": key, "start": 0, "end": 10_000_000}
            return client.post("/focus/text", json=body).json()["text"] or ""

        before = held()
        if turn and not before.startswith(f"You: {words_of(number, 0)}"[:60]):
            return f"chat {number}, turn {turn}: what it was told is gone, or another's: {before[:80]!r}"
        chat.append({"role": "user", "content": words_of(number, turn)})
        answer, state = one_turn(client, config, key, chat)
        chat.append({"role": "assistant", "content": answer})
        if state["entries"] > state["budget"]:
            return f"chat {number}, turn {turn}: over budget"


def restarts(config):
    chats = [[] for _ in range(config.chats)]
    for turn in range(config.restarts + 1):
        with served(config) as server, ThreadPoolExecutor(config.chats) as pool:
            started = time.monotonic()
            faults = list(
                pool.map(lambda i, turn=turn: turn_after_restart(config, i, turn, chats[i]), range(len(chats)))
            )
            faults = [fault for fault in faults if fault]
            sessions = httpx.get(f"{config.url}/stats").json()["workers"][0]["sessions"]
            kept = sessions["kept"]
            print(
                f"start {turn + 1}: {len(chats)} turns in {time.monotonic() - started:.1f} s, {len(faults)} faults; "
                f"{sessions['tokens']:,} tokens, {kept['kept']} chats kept in {kept['bytes']:,} bytes; "
                f"{server.memory_info().rss / 2**20:,.0f} MiB, {server.num_fds()} open files",
                flush=True,
            )
            if faults or (kept["kept"], kept["refused"]) != (len(chats), 0):
                raise UserError("; ".join(faults) or f"expected {len(chats)} conversations kept, got {sessions}")
            if turn % 2:
                server.terminate()
                server.wait(60)
    print(f"{len(chats)} chats went on through {config.restarts} restarts: none lost, none mixed up")


def main(config):
    if config.restarts:
        return restarts(config)
    if httpx.URL(config.url).host not in HOSTS:
        raise UserError(f"--url: expected a server on this machine ({', '.join(HOSTS)}), got {config.url}")
    if config.chats < 1 or config.turns < 1 or not 0 < config.minutes <= 120:
        raise UserError("expected 1 or more chats and turns, and up to 120 minutes")
    server = psutil.Process(config.pid) if config.pid else None
    counts, lock, started = Counter(), threading.Lock(), time.monotonic()
    end = started + 60 * config.minutes
    with ThreadPoolExecutor(config.chats) as pool:
        done = [pool.submit(chat_until, end, number, config, counts, lock) for number in range(config.chats)]
        while not all(chat.done() for chat in done):
            time.sleep(min(30, 3 * config.minutes))
            memory = f", {server.memory_info().rss / 2**20:,.0f} MiB" if server else ""
            with lock:
                told = ", ".join(f"{counts[name]:,} {name}" for name in ("turns", "failed", "mixed up", "over budget"))
            print(f"{time.monotonic() - started:4.0f} s: {told}{memory}", flush=True)
    for chat in done:
        chat.result()
    if counts["failed"] or counts["mixed up"] or counts["over budget"] or not counts["looked at"]:
        raise UserError(f"the test failed: {dict(counts)}")
    print(f"{counts['turns']:,} turns, {counts['looked at']:,} checked for text of others: none failed, none mixed up")


if __name__ == "__main__":
    run(main, Config)
