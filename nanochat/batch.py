"""
Continuous batching: answers to several prompts share the steps of one model, and come and go between any two.

What a row gets does not depend on the rows beside it, but for rounding: it has a session, a cache, settings of sampling
and a tool of its own.
"""

from collections import deque
from dataclasses import dataclass
from itertools import islice

import torch

from nanochat.calculator import calculate
from nanochat.common import UserError
from nanochat.kv_cache import KVCache, RowCaches
from nanochat.sampling import Sampler, Sampling

PART = 256  # tokens of prompts that are read at once, where others wait for their next token


def wait_for(ids, wishes):
    """
    The values of ids [B] and of each of the wishes, a tensor or None, as lists: the one time per step that the host
    waits for the device.
    """
    values = torch.cat([ids.float(), *(wish for wish in wishes if wish is not None)]).tolist()  # ids are below 2^24
    rest = iter(values[len(ids) :])
    return list(map(int, values[: len(ids)])), [None if w is None else list(islice(rest, len(w))) for w in wishes]


class CacheSession:
    """The plain context: every token, at full detail, as far as the model's positions go."""

    wish = None  # it has all that there is

    def __init__(self, decoder, rows=1, max_tokens=None):
        self.decoder, self.rows, self.max_tokens = decoder, rows, max_tokens or 0
        self.cache = self._step = None

    def prefill(self, tokens):
        """
        Logits [rows, V] after the prompt (a list of ids), read once and shared by all rows.

        Raises UserError when the prompt has more tokens than the model has positions.
        """
        [(_, logits)] = self.reading(tokens, len(tokens))
        if self.rows > 1:
            self.cache.repeat(self.rows)
        self._step = self.decoder.stepper(self.cache)
        return logits.expand(self.rows, -1)

    def reading(self, tokens, part):
        """
        The same for one row, `part` tokens at a time: yields (how many, None) after each part but the last, then the
        same with the logits [1, V].
        """
        decoder, limit = self.decoder, self.decoder.max_seq_len
        if len(tokens) > limit:
            raise UserError(
                f"the prompt has {len(tokens):,} tokens, more than the {limit:,} positions of this model: shorten it"
            )
        self._step = None  # it holds the cache of an earlier prompt
        self.cache = KVCache(decoder.config.n_layer, min(len(tokens) + self.max_tokens, limit))
        for start in range(0, len(tokens), part):
            piece = tokens[start : start + part]
            logits = decoder.extend(torch.tensor([piece], device=decoder.device), self.cache)
            yield len(piece), logits if start + part >= len(tokens) else None

    def step(self, ids):
        """Logits [rows, V] after one more token per row, ids [rows]; None when the model's positions are used up."""
        return self._step(ids) if self.enter(ids) is not None else None

    read = step

    def saw(self, states):
        """Told after a step of the state of its token."""

    def enter(self, ids):
        """For a step that is shared with others: the position of one more token, or None, as in `step`."""
        return self.cache.pos if self.cache.pos < self.decoder.max_seq_len else None


class Row:
    """One row while it is generated: tells what it goes on with, runs its tool, and knows when its turn has ended."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ends = tokenizer, tokenizer.turn_ends
        self.call_start, self.call_end = map(tokenizer.encode_special, ("<|python_start|>", "<|python_end|>"))
        self.done = False
        self.forced = deque()  # ids that must come next: what a tool answered
        self.call = None  # ids of the tool call being written, None outside of one

    def take(self, sampled):
        """(id that the row goes on with, 1 if it is the one that was sampled, 0 if a tool's answer forces another)."""
        id, mask = (self.forced.popleft(), 0) if self.forced else (sampled, 1)
        if id in self.ends:
            self.done = True
        elif id == self.call_start:
            self.call = []
        elif id == self.call_end and self.call is not None:
            self.forced.extend(self._answer(self.call))
            self.call = None
        elif self.call is not None:
            self.call.append(id)
        return id, mask

    def _answer(self, call):
        """The ids that the calculator puts after a tool call; none when the call is not for it."""
        answer = calculate(self.tokenizer.decode(call))
        if answer is None:
            return []
        return self.tokenizer.encode(answer, prepend="<|output_start|>", append="<|output_end|>")


@dataclass(eq=False)
class Stream:
    """
    An answer while it is made.

    with_logits: whether it is told what its tokens were chosen from. keep: whether its session is used after it. ended:
    why no more tokens come, "stop", "length" or an exception; None as long as they do.
    """

    prompt: list[int]
    left: int  # tokens that it may still have
    sampling: Sampling
    session: object
    keep: bool
    with_logits: bool
    row: Row
    parts: object = None  # of the prompt, while they are read
    id: int = 0  # its newest token
    logits: torch.Tensor | None = None  # [1, V] that its next token comes from, where they are there already
    position: int = 0  # of its newest token, while that is read with those of others
    ended: str | Exception | None = None


class Batch:
    """
    The streams of an Engine whose weights stay as they are. They are added and removed between steps, by one thread.

    A stream that fails ends alone.
    """

    def __init__(self, engine):
        self.tokenizer, self.decoder = engine.tokenizer, engine.decoder
        self.reading = deque()  # streams whose prompts are being read
        self.streams = []  # those that have read theirs, in the order of their rows in
        self.caches = RowCaches()  # and in
        self.sampler = Sampler(self.decoder.config.vocab_size, self.decoder.device)
        self.stepper = self.decoder.stepper(self.caches)

    def __len__(self):
        return len(self.streams) + len(self.reading)

    def add(self, prompt, max_tokens, sampling, session=None, with_logits=False) -> Stream:
        """
        A new stream; nothing is computed yet.

        session: what its tokens attend to, of one row, the stream's own until it has ended; by default, all tokens at
        full detail.
        """
        if not prompt or max_tokens < 1:
            raise ValueError(f"expected at least one token of a prompt and to make, got {len(prompt)} and {max_tokens}")
        keep, session = session is not None, session or CacheSession(self.decoder)
        stream = Stream(prompt, max_tokens, sampling, session, keep, with_logits, Row(self.tokenizer))
        self.reading.append(stream)
        return stream

    def remove(self, stream):
        """No more of this stream; nothing happens if it has ended."""
        if stream in self.reading:
            self.reading.remove(stream)
            if stream.parts:
                stream.parts.close()
        elif stream in self.streams:
            row, last = self.streams.index(stream), self.streams.pop()
            rows = list(range(len(self.streams)))
            if last is not stream:
                self.streams[row], rows[row] = last, len(rows)
            self.caches.leave(row, stream.keep)
            self.sampler.keep(rows)

    @torch.inference_mode()
    def step(self) -> list[tuple[Stream, int | None, torch.Tensor | None]]:
        """
        Read some tokens of the prompts, in turn, and then make a token of each stream that has read its own.

        Returns (stream, id, logits [1, V] if it asks for them) of each that has something new: a token, or, with id
        None, the news that it has ended.
        """
        self.news, budget = [], PART
        while self.reading and budget > 0:
            budget -= self._read()
        logits = self._logits()
        if self.streams:
            self._sample(logits)
        return self.news

    def _end(self, stream, why):
        stream.ended = why
        self.remove(stream)
        self.news.append((stream, None, None))

    def _read(self):
        """
        A part of the prompt whose turn it is; with the last one its stream gets a row. Returns how many tokens it cost.
        """
        stream = self.reading[0]
        try:
            stream.parts = stream.parts or stream.session.reading(stream.prompt, PART)
            cost, stream.logits = next(stream.parts)
            if stream.logits is not None:
                self.caches.join(stream.session.cache)
        except Exception as error:  # whatever it is, the others go on
            self._end(stream, error)
            return PART
        self.reading.popleft()
        if stream.logits is None:
            self.reading.append(stream)
        else:
            stream.parts.close()  # it holds what it read
            self.streams.append(stream)
            self.sampler.add(stream.sampling, stream.prompt)
        return cost

    def _logits(self):
        """What the next token of each stream comes from, [B, V]; those whose session has no room for more end here."""
        for stream in [stream for stream in self.streams if stream.logits is None]:
            try:
                entered = stream.session.enter(torch.tensor([stream.id], device=self.decoder.device))
            except Exception as error:
                self._end(stream, error)
                continue
            if entered is None:
                self._end(stream, "length")
            elif isinstance(entered, int):
                stream.position = entered
            else:
                stream.logits = entered
        logits, rows = None, [row for row, stream in enumerate(self.streams) if stream.logits is None]
        if rows:
            ids = torch.tensor([stream.id for stream in self.streams], device=self.decoder.device)
            try:
                logits = self.stepper(ids, [stream.position for stream in self.streams], rows)
            except Exception as error:
                for stream in [self.streams[row] for row in rows]:
                    self._end(stream, error)
                rows = []
        states = self.decoder.states
        for row in rows:
            self.streams[row].session.saw(states[row : row + 1])
        if rows and all(stream.logits is None for stream in self.streams):
            return logits
        parts = [logits[i : i + 1] if stream.logits is None else stream.logits for i, stream in enumerate(self.streams)]
        return torch.cat(parts) if parts else None

    def _sample(self, logits):
        ids = self.sampler(logits)
        sampled, wishes = wait_for(ids, [stream.session.wish for stream in self.streams])
        better = list(map(self._follow, self.streams, wishes))
        if any(row is not None for row in better):
            logits = torch.cat([row if row is not None else logits[i : i + 1] for i, row in enumerate(better)])
            ids = self.sampler(logits)
            sampled = ids.tolist()
        for stream, id in zip(self.streams, sampled, strict=True):
            stream.id, _ = stream.row.take(id)
            stream.logits, stream.left = None, stream.left - 1
            if not stream.ended and (stream.row.done or not stream.left):
                stream.ended = "stop" if stream.row.done else "length"
        column = [stream.id for stream in self.streams]
        self.sampler.observe(ids if column == sampled else torch.tensor(column, device=ids.device))
        for row, stream in enumerate(list(self.streams)):
            failed = isinstance(stream.ended, Exception)
            seen = logits[row : row + 1] if stream.with_logits and not failed else None
            self.news.append((stream, None if failed else stream.id, seen))
            if stream.ended:
                self.remove(stream)

    def _follow(self, stream, wish):
        """Better logits for a stream's next token, or None."""
        try:
            return stream.session.follow(wish) if wish else None
        except Exception as error:  # whatever it is, the others go on
            stream.ended = error
            return None
