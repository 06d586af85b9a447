"""A job: one answer to be made by a worker thread, and what comes of it, handed back to the event loop."""

import asyncio
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Piece:
    """A bit of the answer. kind: "text", "python" or "python_output"."""

    kind: str
    text: str
    worker: int


@dataclass(frozen=True)
class Done:
    """The answer is complete. reason: "stop" or "length"."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """There will be no more of the answer."""

    message: str


@dataclass(frozen=True)
class Focus:
    """Where the session that answers looks now. state: ready for JSON."""

    state: dict


@dataclass(eq=False)
class Job:
    """
    One answer to be made. Created on the event loop that reads `events`: Pieces, then one Done or Failed.

    conversation: a name that only those who take part in it know, None if they gave none. focus: whether `events` is
    to get a Focus now and then, too. created, first: when it was asked for and its first Piece came, by
    time.monotonic(). compacted: the session that answers let summaries stand in for older tokens. home: the Worker
    that has the conversation at hand, if one does.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float
    top_k: int
    seed: int
    stop: list[str] = field(default_factory=list)
    conversation: str | None = None
    focus: bool = False
    ids: list[int] = field(default_factory=list)  # generated so far
    tokens: int = 0  # generated so far, a tool's answers and the end token included
    cancelled: bool = False
    compacted: bool = False
    first: float | None = None
    home: object = None

    def __post_init__(self):
        self.events = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.created = time.monotonic()

    def emit(self, event):
        """From any thread."""
        if self.first is None and isinstance(event, Piece):
            self.first = time.monotonic()
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


def cut_at(pieces, stop, on_cut):
    """The pieces up to the stop string that is complete first, held back while one may be beginning."""
    held = ""
    for kind, text in pieces:
        if kind != "text":
            yield kind, text
            continue
        held += text
        found = [(held.find(s) + len(s), held.find(s)) for s in stop if s in held]
        if found:
            held = held[: min(found)[1]]
            on_cut()
            break
        begun = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if len(held) > begun:
            yield "text", held[: len(held) - begun]
            held = held[len(held) - begun :]
    if held:
        yield "text", held
