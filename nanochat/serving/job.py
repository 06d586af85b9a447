"""A job: one answer to be made by a worker thread, and what comes of it, handed back to the event loop."""

import asyncio
import time
from dataclasses import dataclass, field

from nanochat.sampling import Sampling


@dataclass(frozen=True)
class Token:
    """
    A token and how likely it was: natural logarithms of probabilities, before any setting of sampling.

    offset: characters of text before it. top: (id, log probability) of the likeliest in its place, best first.
    logprob: None for the first token of a prompt.
    """

    id: int
    offset: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """
    A bit of the answer. kind: "text", "python" or "python_output".

    tokens: of a job that asks for logprobs, those whose text begins in this bit.
    """

    kind: str
    text: str
    worker: int
    tokens: list[Token] = field(default_factory=list)


@dataclass(frozen=True)
class Scored:
    """How likely the prompt was, for a job with `score`; comes before all Pieces."""

    tokens: list[Token]


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
    One answer to be made. Created on the event loop that reads `events`, a queue that several jobs may share, of (job,
    event) pairs: of each job Pieces, then one Done or Failed.

    logprobs: how many likely tokens to tell of in each place, None for none, nor of those that were chosen. score:
    whether to tell it of the prompt, too. index: of this answer among those of its request. conversation: a name that
    only those who take part in it know, None if they gave none. focus: whether `events` is to get a Focus now and then,
    too. created, first: when it was asked for and its first Piece came, by time.monotonic(). compacted: the session
    that answers let summaries stand in for older tokens. home: the Worker that has the conversation at hand, if one
    does.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: list[str] = field(default_factory=list)
    logprobs: int | None = None
    score: bool = False
    index: int = 0
    conversation: str | None = None
    focus: bool = False
    ids: list[int] = field(default_factory=list)  # generated so far
    tokens: int = 0  # generated so far, a tool's answers and the end token included
    cancelled: bool = False
    compacted: bool = False
    first: float | None = None
    home: object = None
    events: asyncio.Queue = field(default_factory=asyncio.Queue)

    def __post_init__(self):
        self.loop = asyncio.get_running_loop()
        self.created = time.monotonic()

    def emit(self, event):
        """From any thread."""
        if self.first is None and isinstance(event, Piece):
            self.first = time.monotonic()
        self.loop.call_soon_threadsafe(self.events.put_nowait, (self, event))
