"""Convert the tokens of a job to events for its client, and score prompts."""

import codecs
from itertools import accumulate

import torch

from nanochat.common import autocast
from nanochat.decode import compute_dtype
from nanochat.kv_cache import KVCache
from nanochat.sampling import logprobs
from nanochat.serving.job import Piece, Token
from nanochat.streaming import Parts


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
    """Emits the events of a job: call `take` for each token, and `end` if the tokens end before it returns "stop"."""

    def __init__(self, job, tokenizer, worker):
        self.job, self.worker = job, worker
        self.parts, self.cut = Parts(tokenizer), Cut(job.stop)
        self.chars = 0  # characters of text so far
        self.shown = 0  # characters of text that the client has
        self.tokens = []  # Tokens whose text the client does not have yet

    def take(self, id, logprob=None, top=()) -> str | None:
        """Process a token (with log probabilities if the job wants them). Return "stop" if it completes the answer."""
        self.job.tokens += 1
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

    A generator, so that others need not wait for a long prompt: yields None after each part, then the list of Tokens.
    """
    model, tokenizer = engine.model, engine.tokenizer
    ids = torch.tensor(prompt, device=model.get_device())
    dtype = engine.dtype or compute_dtype(model)
    cache, ranks = KVCache(model.config.n_layer, len(prompt)), [(None, [])]
    for start in range(0, len(prompt) - 1, SCORED_AT_ONCE):
        end = min(start + SCORED_AT_ONCE, len(prompt) - 1)
        with autocast(ids.device, dtype):
            logits = model(ids[None, start:end], kv_cache=cache)[0]
        ranks += ranked(logits, ids[start + 1 : end + 1], top)
        yield None
    offsets = list(accumulate(map(len, texts(tokenizer, prompt)), initial=0))
    yield [Token(id, offset, *rank) for id, offset, rank in zip(prompt, offsets, ranks, strict=False)]


def texts(tokenizer, ids) -> list[str]:
    """The text that each id completes. Joined, they are the decoded ids."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.id_to_bytes(id), final=i == len(ids) - 1) for i, id in enumerate(ids)]
