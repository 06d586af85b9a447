"""
Generation: prefill once, then decode all rows together, a token a row at a time.

The Engine samples, runs tools and streams. What a token attends to is the business of a *session*, which has
two methods: `prefill(tokens) -> logits [rows, V]` and `step(ids [rows]) -> logits [rows, V]`. CacheSession,
here, is the plain one: all tokens so far, in a KV cache.
"""

from collections import deque

import torch

from nanochat.calculator import calculate
from nanochat.gpt import sample


class KVCache:
    """
    Keys and values of all layers, [2, L, B, H_kv, capacity, d], filled up to `pos`; grows when it must.

    `insert` and `advance` are called by the model's forward pass.
    """

    def __init__(self, n_layer, capacity):
        self.n_layer, self.capacity = n_layer, capacity
        self.data = None  # made at the first insert, in the precision that the model computes in
        self.pos = 0

    def insert(self, layer, k, v):
        """Put k, v [B, H_kv, T, d] after what is there; returns all keys and all values so far."""
        end = self.pos + k.size(2)
        if self.data is None:
            B, H, _, d = k.shape
            self.data = k.new_empty(2, self.n_layer, B, H, max(self.capacity, end), d)
        if end > self.data.size(4):
            self._grow(end)
        keys, values = self.data[:, layer]
        keys[:, :, self.pos : end] = k
        values[:, :, self.pos : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, T):
        self.pos += T

    def truncate(self, pos):
        """Forget everything from position `pos` on."""
        self.pos = min(self.pos, pos)

    def repeat(self, rows):
        """Turn a cache of one row into one of `rows` equal rows."""
        self.data = self.data.repeat_interleave(rows, dim=2)

    def _grow(self, needed):
        capacity = max(needed, 2 * self.data.size(4))
        bigger = self.data.new_empty(*self.data.shape[:4], capacity, self.data.size(5))
        bigger[..., : self.pos, :] = self.data[..., : self.pos, :]
        self.data = bigger


class CacheSession:
    """The plain context: every token, at full detail."""

    def __init__(self, model, rows=1, max_tokens=None):
        self.model, self.rows, self.max_tokens = model, rows, max_tokens or 0
        self.cache = None

    def prefill(self, tokens):
        """Logits [rows, V] after the prompt (a list of ids), read once and shared by all rows."""
        self.cache = KVCache(self.model.config.n_layer, len(tokens) + self.max_tokens)
        ids = torch.tensor([tokens], device=self.model.get_device())
        logits = self.model(ids, kv_cache=self.cache)[:, -1]
        self.cache.repeat(self.rows)
        return logits.expand(self.rows, -1)

    def step(self, ids):
        """Logits [rows, V] after one more token a row, ids [rows]."""
        return self.model(ids[:, None], kv_cache=self.cache)[:, -1]


class _Row:
    """What is known of one row while it is generated."""

    def __init__(self):
        self.done = False
        self.forced = deque()  # ids that must come next: what a tool answered
        self.call = None  # ids of the tool call being written, None outside of one


class Engine:
    """Generates from a model and a tokenizer; runs the calculator when the model calls it."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def generate(self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42, session=None):
        """
        Yield (ids, mask) a step: one id a row, and 1 where it was sampled, 0 where a tool's answer forced it.

        tokens: the prompt, a list of ids. Ends after max_tokens steps, or when every row has produced
        <|assistant_end|> or <|bos|>; a row that is done goes on in its column, to be ignored. session:
        what the tokens attend to (default: all of them, at full detail).
        """
        if not tokens:
            raise ValueError("expected at least one token as the prompt, got none")
        session = session or CacheSession(self.model, num_samples, max_tokens)
        generator = torch.Generator(device=self.model.get_device()).manual_seed(seed)
        special = self.tokenizer.encode_special
        ends = {special("<|assistant_end|>"), self.tokenizer.get_bos_token_id()}
        call_start, call_end = special("<|python_start|>"), special("<|python_end|>")
        rows = [_Row() for _ in range(num_samples)]
        logits = session.prefill(tokens)
        produced = 0
        while max_tokens is None or produced < max_tokens:
            sampled = sample(logits, temperature, top_k, generator)[:, 0].tolist()
            column, mask = [], []
            for row, token in zip(rows, sampled, strict=True):
                mask.append(0 if row.forced else 1)
                token = row.forced.popleft() if row.forced else token
                column.append(token)
                if token in ends:
                    row.done = True
                elif token == call_start:
                    row.call = []
                elif token == call_end and row.call is not None:
                    row.forced.extend(self._tool_answer(row.call))
                    row.call = None
                elif row.call is not None:
                    row.call.append(token)
            yield column, mask
            produced += 1
            if all(row.done for row in rows) or produced == max_tokens:
                return
            logits = session.step(torch.tensor(column, device=logits.device))

    def _tool_answer(self, call):
        """The ids that the calculator puts after a tool call; none when the call is not for it."""
        answer = calculate(self.tokenizer.decode(call))
        if answer is None:
            return []
        return self.tokenizer.encode(answer, prepend="<|output_start|>", append="<|output_end|>")

    def generate_batch(self, tokens, num_samples=1, **kwargs):
        """All rows at once: (ids, masks), lists of num_samples lists that begin with the prompt (mask 0)."""
        ends = {self.tokenizer.encode_special("<|assistant_end|>"), self.tokenizer.get_bos_token_id()}
        results = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        done = [False] * num_samples
        for column, mask in self.generate(tokens, num_samples, **kwargs):
            for i, token in enumerate(column):
                done[i] = done[i] or token in ends
                if not done[i]:
                    results[i].append(token)
                    masks[i].append(mask[i])
        return results, masks
