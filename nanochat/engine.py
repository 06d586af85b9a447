"""
Generation: prefill once, then decode all rows together, one token per row and step.

`Engine.generate` answers one prompt, in one or more rows. A Batch answers several (continuous batching): its streams
share the steps of one model, and are added and removed between steps. Up to rounding, a row does not depend on the rows
beside it: each has its own session, cache, sampling settings and tool.

The Engine samples, runs tools and streams. A *session* decides what a token attends to. `generate` calls its
`prefill(tokens) -> logits [rows, V]` and `read(ids [rows]) -> logits [rows, V]`, or None when there is no room for
more. After `read`, `wish` is None or a tensor [1] on the device; pass its value to `follow`, which may return better
logits. A Batch calls `reading`, a prefill in parts, and in place of `read` `enter` and `saw`, before and after the
common step; the session's `cache` takes part in it. CacheSession is the plain one: all tokens so far, in a KV cache.
Others have one row.
"""

from collections import deque
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from nanochat.calculator import calculate
from nanochat.decode import Decoder, compute_dtype, weights_version
from nanochat.kv_cache import CacheSession, RowCaches
from nanochat.ranges import check
from nanochat.sampling import Sampler, Sampling, row_seed

PART = 256  # tokens of prompts that are read at once, where others wait for their next token


class Engine:
    """
    Generates from a model and a tokenizer; runs the calculator when the model calls it.

    dtype: precision of generation; None for that of a surrounding autocast, or else of the weights. graph: CUDA
    graphs; None for "where there is CUDA". Each `generate` uses the weights as they are when it starts, and they must
    not change until it ends. Changes that `decode.weights_version` does not notice need another Engine.
    """

    def __init__(self, model, tokenizer, dtype=None, graph=None):
        self.model, self.tokenizer, self.dtype, self.graph = model, tokenizer, dtype, graph
        self._decoder = self._version = None

    @property
    def decoder(self) -> Decoder:
        """A Decoder of the current weights; kept until they change."""
        dtype, version = self.dtype or compute_dtype(self.model), weights_version(self.model)
        if self._decoder is None or (self._decoder.dtype, self._version) != (dtype, version):
            self._decoder = None  # frees its memory first
            self._decoder, self._version = Decoder(self.model, dtype, self.graph), version
        return self._decoder

    @torch.inference_mode()
    def generate(
        self,
        tokens,
        num_samples=1,
        max_tokens=None,
        temperature=1.0,
        top_k=None,
        seed=42,
        session=None,
        **settings,
    ):
        """
        Yield (ids, mask) per step: one id per row, and 1 where it was sampled, 0 where a tool's answer forced it.

        tokens: the prompt, a list of ids. session: of one row; default: a CacheSession, of all tokens at full detail.
        settings: further fields of Sampling.
        Ends after max_tokens steps, or when every row has ended its turn (until then ended rows still yield ids, to be
        ignored), or when the session has no room for more: by default, after model.max_seq_len tokens and the one that
        these predict.
        """
        if not tokens:
            raise ValueError("expected at least one token as the prompt, got none")
        if num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {num_samples}")
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens must be 0 or more, or None for no limit, got {max_tokens}")
        if max_tokens == 0:
            return
        session = session or CacheSession(self.decoder, num_samples, max_tokens)
        sampler = Sampler(self.model.config.vocab_size, self.model.get_device())
        sampling = Sampling(temperature, top_k, **settings)
        check(sampling)
        for row in range(num_samples):
            sampler.add(replace(sampling, seed=row_seed(seed, row)), tokens)
        rows = [Row(self.tokenizer) for _ in range(num_samples)]
        logits = session.prefill(tokens)
        if len(logits) != num_samples:
            raise ValueError(f"the session has {len(logits)} rows, num_samples is {num_samples}")
        produced = 0
        while logits is not None:
            ids = sampler(logits)
            sampled, [wish] = wait_for(ids, [session.wish])
            if wish is not None and (better := session.follow(wish)) is not None:
                logits, ids = better, sampler(better)
                sampled = ids.tolist()
            column, mask = map(list, zip(*(row.take(id) for row, id in zip(rows, sampled, strict=True)), strict=True))
            if column != sampled:
                ids = torch.tensor(column, device=ids.device)
            yield column, mask
            produced += 1
            if all(row.done for row in rows) or produced == max_tokens:
                return
            sampler.observe(ids)
            logits = session.read(ids)

    def batch(self) -> "Batch":
        """For prompts that come one by one and share their steps."""
        return Batch(self)

    def generate_batch(self, tokens, num_samples=1, keep_end=False, make_session=None, seed=42, **kwargs):
        """
        All rows at once: (ids, masks), lists of num_samples lists that begin with the prompt (mask 0).

        keep_end: include the token that ended a row's turn, if one did. make_session(seed=…): makes the session of each
        row, one row after the other; None for all tokens, at full detail.
        """
        if make_session:
            rows = [], []
            for row in range(num_samples):
                of_its_own = row_seed(seed, row)
                with closing(make_session(seed=of_its_own)) as session:
                    one = self.generate_batch(tokens, 1, keep_end, None, of_its_own, session=session, **kwargs)
                for all_of, of_row in zip(rows, one, strict=True):
                    all_of.extend(of_row)
            return rows
        ends = self.tokenizer.turn_ends
        results = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        done = [False] * num_samples
        for column, mask in self.generate(tokens, num_samples, seed=seed, **kwargs):
            for i, token in enumerate(column):
                if done[i]:
                    continue
                done[i] = token in ends
                if not done[i] or keep_end:
                    results[i].append(token)
                    masks[i].append(mask[i])
        return results, masks


def wait_for(ids, wishes):
    """
    The values of ids [B] and of each of the wishes, a tensor [1] or None: the one time per step that the host waits for
    the device.
    """
    values = torch.cat([ids.float(), *(wish for wish in wishes if wish is not None)]).tolist()  # ids are below 2^24
    rest = iter(values[len(ids) :])
    return list(map(int, values[: len(ids)])), [None if wish is None else next(rest) for wish in wishes]


class Row:
    """A row being generated: runs its tool, forces the tool's answer into it, and detects the end of the turn."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ends = tokenizer, tokenizer.turn_ends
        self.call_start, self.call_end = map(tokenizer.encode_special, ("<|python_start|>", "<|python_end|>"))
        self.done = False
        self.forced = deque()  # ids that must come next: what a tool answered
        self.call = None  # ids of the tool call being written, None outside of one

    def take(self, sampled):
        """(next id of the row, 1 if it is the sampled one, 0 if a tool's answer forces another)."""
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
    An answer being generated.

    with_logits: whether `Batch.step` returns its logits, too. keep: whether its session is used afterwards. ended: why
    generation ended: "stop", "length" or an exception; None before that.
    """

    prompt: list[int]
    left: int  # tokens that it may still generate
    sampling: Sampling
    session: object
    keep: bool
    with_logits: bool
    row: Row
    parts: object = None  # the generator that reads the prompt
    id: int = 0  # its newest token
    logits: torch.Tensor | None = None  # [1, V] for its next token, if they are known already
    position: int = 0  # of its newest token, while it is read in a batch with others
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

        session: of one row, for this stream alone until it has ended; by default, of all tokens at full detail.
        """
        if not prompt or max_tokens < 1:
            raise ValueError(f"expected at least one token of a prompt and to make, got {len(prompt)} and {max_tokens}")
        keep, session = session is not None, session or CacheSession(self.decoder)
        stream = Stream(prompt, max_tokens, sampling, session, keep, with_logits, Row(self.tokenizer))
        self.reading.append(stream)
        return stream

    def remove(self, stream):
        """End this stream; no effect if it has ended."""
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
        Read about PART tokens of waiting prompts, in turn, then generate a token of each stream whose prompt is read.

        Returns (stream, id, logits [1, V] or None if it does not ask for them) for each new token; id None means that
        the stream has ended.
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
        Read a part of the next prompt; after the last part its stream gets a row. Returns the cost in tokens.
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
        """Logits [B, V] of the next token of each stream; streams whose session has no room for more end here."""
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
            try:
                self.streams[row].session.saw(states[row : row + 1])
            except Exception as error:  # whatever it is, the others go on
                self.streams[row].ended = error
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
            return stream.session.follow(wish) if wish is not None else None
        except Exception as error:  # whatever it is, the others go on
            stream.ended = error
            return None
