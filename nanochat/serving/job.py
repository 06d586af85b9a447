"""A job: one answer to generate. The worker thread turns its tokens into events and passes them to the event loop."""

import asyncio
import codecs
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from nanochat.kv_cache import KVCache
from nanochat.sampling import Sampling, logprobs
from nanochat.tokenizer import Parts


@dataclass(frozen=True)
class Token:
    """
    A token with natural-log probabilities of the model, before any sampling setting.

    offset: number of characters of text before it. logprob: None for the first token of a prompt. top: (id, log
    probability) of the likeliest tokens at this position, best first.
    """

    id: int
    offset: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """
    A part of the answer. kind: "text", "python" or "python_output".

    tokens: those whose text begins in this part, if the job wants log probabilities.
    """

    kind: str
    text: str
    worker: int
    tokens: list[Token] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """The answer is complete. reason: "stop" or "length"."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The answer failed."""

    message: str


@dataclass(frozen=True)
class FocusState:
    """The current focus of the session. state: JSON values."""

    state: dict


class Outbox(list):
    """(job, event) pairs that a thread passes on together at the end of a step, since waking an event loop is slow."""

    def send(self):
        """Hand over what is there, each event to its job's loop."""
        pairs = self[:]
        self.clear()
        for loop in {job.loop for job, _ in pairs}:
            loop.call_soon_threadsafe(_deliver, [pair for pair in pairs if pair[0].loop is loop])


def _deliver(pairs):
    for job, event in pairs:
        job.events.put_nowait((job, event))


@dataclass(eq=False)
class Job:
    """
    One answer to generate. Created in the event loop that reads `events`, a queue of (job, event) pairs which several
    jobs may share. The events of a job are Pieces, then one Done or Failed.

    logprobs: number of likeliest tokens to report per position; None for no log probabilities. echo_from: number of the
    first prompt token that the first Piece repeats, None for no repetition; score: whether that Piece has their log
    probabilities. index: position of the answer among those of its request. conversation: secret name of the
    conversation, None if the client gave none. focus: whether `events` also gets FocusStates. created, first: times of
    the request and of the first Piece, by time.monotonic(). compacted: whether gists replaced tokens of the context.
    home: the Worker that holds the session of this conversation, if any. outbox: that of the generating thread.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: list[str] = field(default_factory=list)
    logprobs: int | None = None
    echo_from: int | None = None
    score: bool = False
    index: int = 0
    conversation: str | None = None
    focus: bool = False
    ids: list[int] = field(default_factory=list)  # generated so far, a tool's answers and the end token included
    cancelled: bool = False
    compacted: bool = False
    first: float | None = None
    home: object = None
    outbox: Outbox | None = None
    events: asyncio.Queue = field(default_factory=asyncio.Queue)

    def __post_init__(self):
        self.loop = asyncio.get_running_loop()
        self.created = time.monotonic()

    def emit(self, event):
        """Pass an event to the event loop, through the outbox if there is one. Thread-safe."""
        outbox = self.outbox  # another thread may take it away
        if outbox is None:
            Outbox([(self, event)]).send()
        else:
            outbox.append((self, event))
        if self.first is None and isinstance(event, Piece):
            self.first = time.monotonic()


class Cut:
    """Cuts streamed text at the first complete stop string."""

    def __init__(self, stop):
        self.stop = [text for text in stop if text]
        self.held = ""  # possibly the beginning of a stop string
        self.done = False

    def push(self, text) -> str:
        """Add text; return what can be shown now."""
        self.held += text
        found = [(self.held.find(s) + len(s), self.held.find(s)) for s in self.stop if s in self.held]
        self.done = bool(found)
        end = min(found)[1] if found else len(self.held) - self._begun()
        shown, self.held = self.held[:end], "" if found else self.held[end:]
        return shown

    def _begun(self):
        """Number of characters at the end that could begin a stop string."""
        return max(
            (n for s in self.stop for n in range(1, min(len(s), len(self.held) + 1)) if self.held.endswith(s[:n])),
            default=0,
        )

    def close(self) -> str:
        """The text held back, when no more follows."""
        held, self.held = self.held, ""
        return held


class Answer:
    """
    Emits the events of a job: call `take` for each token, and `end` if the tokens end before it returns "stop".

    started: time.monotonic(). context: a context manager that the worker exits when the answer is over.
    """

    def __init__(self, job, tokenizer, worker):
        self.job, self.worker, self.started, self.context = job, worker, time.monotonic(), ExitStack()
        self.parts, self.cut = Parts(tokenizer), Cut(job.stop)
        self.chars = 0  # characters of text so far
        self.shown = 0  # characters of text that the client has
        self.tokens = []  # Tokens whose text the client does not have yet

    def echo(self, scored=()):
        """Repeat the prompt. scored: its Tokens, if their log probabilities are asked for."""
        pieces, start = texts(self.parts.tokenizer, self.job.prompt), self.job.echo_from
        text, hidden = "".join(pieces[start:]), sum(map(len, pieces[:start]))
        self.chars = self.shown = len(text)
        tokens = [replace(token, offset=token.offset - hidden) for token in scored[start:]]
        self.job.emit(Piece("text", text, self.worker, tokens))

    def take(self, id, logprob=None, top=()) -> str | None:
        """Process a token (with log probabilities if the job wants them). Return "stop" if it completes the answer."""
        self.job.ids.append(id)
        if logprob is not None and self.parts.kind == "text":
            self.tokens.append(Token(id, self.chars, logprob, list(top)))
        self._emit(self.parts.push(id))
        if not (self.parts.ended or self.cut.done):
            return None
        self._finish()
        return "stop"

    def end(self) -> str:
        """No more tokens follow. Return "length", or "stop" if the rest of the text completes a stop string."""
        self._emit(self.parts.close())
        self._finish()
        return "stop" if self.cut.done else "length"

    def _finish(self):
        if self.cut.done:  # the rest, and its tokens, are beyond the stop string
            return
        self._show("text", self.cut.close())
        if self.tokens:  # tokens without text, such as the end of the turn
            self.job.emit(Piece("text", "", self.worker, self.tokens))

    def _emit(self, pieces):
        for kind, text in pieces:
            if self.cut.done:
                break
            if kind == "text":
                self.chars += len(text)
                text = self.cut.push(text)
            self._show(kind, text)

    def _show(self, kind, text):
        if not text:
            return
        tokens = []
        if kind == "text":
            self.shown += len(text)
            tokens = [token for token in self.tokens if token.offset < self.shown]
            self.tokens = self.tokens[len(tokens) :]
        self.job.emit(Piece(kind, text, self.worker, tokens))


def ranked(logits, ids, top):
    """For each id [B], given logits [B, V]: (its log probability, [(id, log probability)] of the `top` likeliest)."""
    chosen, (values, best) = logprobs(logits, ids, top)
    pairs = (list(zip(*row, strict=True)) for row in zip(best.tolist(), values.tolist(), strict=True))
    return list(zip(chosen.tolist(), pairs, strict=True))


SCORED_AT_ONCE = 128  # positions per forward pass, to bound the logits [128, V]


@torch.inference_mode()
def score_prompt(engine, prompt, top):
    """
    Log probabilities of each token of a prompt given those before it, in the precision of generation.

    A generator, so that other answers do not wait for a long prompt: yields None after each part, then the Tokens.
    """
    decoder, tokenizer = engine.decoder, engine.tokenizer
    ids = torch.tensor(prompt, device=decoder.device)
    cache, ranks = KVCache(decoder.config.n_layer, len(prompt)), [(None, [])]
    for start in range(0, len(prompt) - 1, SCORED_AT_ONCE):
        end = min(start + SCORED_AT_ONCE, len(prompt) - 1)
        logits = decoder.extend(ids[None, start:end], cache, last=0)
        ranks += ranked(logits, ids[start + 1 : end + 1], top)
        yield None
    offsets = list(accumulate(map(len, texts(tokenizer, prompt)), initial=0))
    yield [Token(id, offset, *rank) for id, offset, rank in zip(prompt, offsets, ranks, strict=False)]


def texts(tokenizer, ids) -> list[str]:
    """The text that each id completes. Joined, they are the decoded ids."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.id_to_bytes(id), final=i == len(ids) - 1) for i, id in enumerate(ids)]
