"""
Many long chats with a MegaContext server at once: does any fail, does any see another's words, does memory grow?

    python dev/soak.py --url http://127.0.0.1:8000 --pid 4711        # of `python -m scripts.chat_web --mc`

Each chat tells the server numbers of its own, turn after turn, begins anew after some turns, and asks the server at
the end of each turn for the text that its session holds: it must be the chat's own. It talks to this machine only.
"""

import json
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


import httpx
import psutil

from nanochat.common import UserError
from nanochat.configurator import run

HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass
class Config:
    url: str = "http://127.0.0.1:8000"
    """of the server, on this machine"""
    pid: int = 0
    """process whose memory is watched; 0 for none"""
    chats: int = 20
    """at once"""
    minutes: float = 10.0
    """until it stops by itself"""
    turns: int = 12
    """of a conversation, before it begins anew"""
    max_tokens: int = 32
    """of an answer"""


def words_of(chat, turn):
    return f"In turn {turn} the secret of chat {chat} is {chat * 7919 + turn}. " * 3


def one_turn(client, config, key, messages):
    """The answer to the messages, and the last focus event; what went wrong raises."""
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
    """Conversations of one chat, one after the other; counts what happened."""
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
                    seen["looked at"] += held is not None  # None: its session had to make room for another
                    seen["mixed up"] += held is not None and held[: len(first)] != first[: len(held)]
                except (RuntimeError, httpx.HTTPError) as error:
                    seen["failed"] += 1
                    print(f"chat {number}, turn {turn}: {error!r}", file=sys.stderr)
                with lock:
                    counts.update(seen)
                if time.monotonic() > end or seen["failed"]:
                    break


def main(config):
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
        raise UserError(f"not as it should be: {dict(counts)}")
    print(f"{counts['turns']:,} turns, {counts['looked at']:,} of them looked at: none failed, none mixed up")


if __name__ == "__main__":
    run(main, Config)
