"""
Generation: prefill once, then decode all rows together, a token a row at a time.

The Engine samples, runs tools and streams. What a token attends to is the business of a *session*, which has
two methods: `prefill(tokens) -> logits [rows, V]` and `step(ids [rows]) -> logits [rows, V]`. CacheSession,
here, is the plain one: all tokens so far, in a KV cache.
"""

import torch

from nanochat.gpt import sample


class KVCache:
    """
    Keys and values of all layers, [2, L, B, H_kv, capacity, d], filled up to `pos`; grows when it must.

    `insert` and `advance` are called by the model's forward pass.
    """

    def __init__(self, config, batch_size, capacity, device, dtype):
        head_dim = config.n_embd // config.n_head
        shape = (2, config.n_layer, batch_size, config.n_kv_head, capacity, head_dim)
        self.data = torch.empty(shape, device=device, dtype=dtype)
        self.pos = 0

    def insert(self, layer, k, v):
        """Put k, v [B, H_kv, T, d] after what is there; returns all keys and all values so far."""
        end = self.pos + k.size(2)
        if end > self.data.size(4):
            self._grow(end)
        keys, values = self.data[:, layer]
        keys[:, :, self.pos : end] = k
        values[:, :, self.pos : end] = v
        return keys[:, :, :end].to(k.dtype), values[:, :, :end].to(v.dtype)

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
        device = self.model.get_device()
        dtype = self.model.transformer.h[0].attn.c_k.weight.dtype
        self.cache = KVCache(self.model.config, 1, len(tokens) + self.max_tokens, device, dtype)
        logits = self.model(torch.tensor([tokens], device=device), kv_cache=self.cache)[:, -1]
        self.cache.repeat(self.rows)
        return logits.expand(self.rows, -1)

    def step(self, ids):
        """Logits [rows, V] after one more token a row, ids [rows]."""
        return self.model(ids[:, None], kv_cache=self.cache)[:, -1]
