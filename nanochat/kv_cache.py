"""
KV caches, of one stream and of several that share their steps, and CacheSession, the session of plain decoding.

Shapes: B or R rows, T tokens, K = n_kv_head, d = D / n_head, L layers.
"""

import torch

from nanochat.common import UserError


class KVCache:
    """
    Keys and values of all layers, [2, L, B, K, capacity, d], filled up to `pos`. Grows when it must, up to `limit`.

    `insert` and `advance` are called by the Decoder.
    """

    def __init__(self, n_layer, capacity, limit=None):
        self.n_layer, self.capacity, self.limit = n_layer, capacity, limit
        self.data = None  # made at the first insert, in the precision that the model computes in
        self.pos = 0
        self.bias = None  # what is added to the scores of its first keys, [n]; None: of no key
        self.shared = None  # the RowCaches in which it is a row

    def insert(self, layer, k, v):
        """Put k, v [B, K, T, d] after what is there; returns all keys and all values so far."""
        B, K, T, d = k.shape
        end = self.pos + T
        if self.data is None:
            self.hold(k.new_empty(2, self.n_layer, B, K, max(self.capacity, end), d))
        self.reserve(end)
        keys, values = self.layers[layer]
        keys[:, :, self.pos : end] = k
        values[:, :, self.pos : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, T):
        self.pos += T

    @property
    def longest(self) -> int:
        """Number of positions filled in the fullest row; here all rows are equal."""
        return self.pos

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.data.nbytes

    @torch.inference_mode()
    def keep(self, kept):
        """
        Drop the slots that are not in `kept`, bool [pos] on the CPU. Keys contain their positions, so their order is
        free: the last ones move into the gaps. Returns the previous slot of each remaining one, [new pos].
        """
        n = int(kept.sum())
        order, gaps = torch.arange(n), (~kept[:n]).nonzero()[:, 0]
        order[gaps] = n + kept[n:].nonzero()[:, 0]
        if len(gaps):
            to, moved = gaps.to(self.data.device), order[gaps].to(self.data.device)
            self.data[..., to, :] = self.data[..., moved, :]
        self.pos = n
        return order

    def repeat(self, rows):
        """Turn a cache of one row into one of `rows` equal rows."""
        self.hold(self._copied(rows, self.capacity))

    def reserve(self, end):
        """Make room for `end` positions in all."""
        if end <= self.capacity:
            return
        capacity = max(end, 2 * self.capacity if self.limit is None else min(2 * self.capacity, self.limit))
        if self.shared:
            self.shared.grow(capacity)
        else:
            self.hold(self._copied(self.data.size(2), capacity))

    def _copied(self, rows, capacity):
        old = self.data
        new = old.new_empty(2, self.n_layer, rows, old.size(3), capacity, old.size(5))
        new[..., : self.pos, :] = old[..., : self.pos, :]
        return new

    def hold(self, data, shared=None):
        """Use this memory, a row of `shared` or the cache's own, into which the caller has copied the filled slots."""
        self.data, self.capacity, self.shared = data, data.size(4), shared
        self.layers = [pair.unbind() for pair in data.unbind(1)]  # (keys, values), taken apart once and for all

    def leave(self):
        """Move out of the shared memory, into memory of its own."""
        self.hold(self._copied(1, self.capacity))


def key_bias(caches, length):
    """The bias [R, length] on the scores of the first `length` keys of R one-row caches; None if there is none."""
    biased = [(row, cache.bias) for row, cache in enumerate(caches) if cache.bias is not None]
    if not biased:
        return None
    bias = biased[0][1].new_zeros(len(caches), length)
    for row, values in biased:
        bias[row, : len(values)] = values
    return bias


ROOM = 64  # positions that a row has left when it joins others


class RowCaches:
    """
    One-row KVCaches, `rows`, side by side in data [2, L, R, K, capacity, d], each with its own length.

    Keys contain their positions, so each row may be truncated and edited independently; a step of all rows writes each
    row's key behind its last one. Rows are added and removed between steps; R >= len(rows) and the capacity adapt.
    """

    def __init__(self):
        self.rows, self.data = [], None

    @torch.inference_mode()
    def join(self, cache):
        """Take a KVCache of one row in as the last row."""
        self._make_room(len(self.rows) + 1, max(self.capacity, cache.pos + ROOM), like=cache.data)
        row = self._row(len(self.rows))
        row[..., : cache.pos, :] = cache.data[..., : cache.pos, :]
        row[..., cache.pos :, :] = 0  # masked slots are multiplied by 0: they must not be infinite or NaN
        cache.hold(row, self)
        self.rows.append(cache)

    @torch.inference_mode()
    def leave(self, row, keep):
        """Remove a row; the last one takes its place. keep: copy its contents into memory of its own."""
        cache, last = self.rows[row], self.rows.pop()
        if keep:
            cache.leave()
        if last is not cache:
            place = self._row(row)
            place[..., : last.pos, :] = last.data[..., : last.pos, :]
            last.hold(place, self)
            self.rows[row] = last
        if self.data.size(2) >= 4 * max(len(self.rows), 2):  # half of it, so that it moves seldom
            longest = max((cache.pos for cache in self.rows), default=0)
            self._move(self.data.size(2) // 2, min(self.capacity, longest + ROOM), self.data)

    def grow(self, capacity):
        """Make room for this many positions in each row."""
        self._make_room(len(self.rows), capacity, self.data)

    def _make_room(self, rows, capacity, like):
        old = self.data
        if old is not None and rows <= old.size(2) and capacity <= old.size(4):
            return
        if old is not None:  # twice the rows: else each that joins would move all
            rows = old.size(2) if rows <= old.size(2) else max(rows, 2 * old.size(2))
        self._move(rows, capacity, like)

    def _move(self, rows, capacity, like):
        self.data = like.new_zeros(2, like.size(1), rows, like.size(3), capacity, like.size(5))
        for i, cache in enumerate(self.rows):
            self._row(i)[..., : cache.pos, :] = cache.data[..., : cache.pos, :]
            cache.hold(self._row(i), self)

    def _row(self, i):
        return self.data[:, :, i : i + 1]

    @property
    def pos(self):
        """Where each row's next key goes, [B], on the CPU."""
        return torch.tensor([cache.pos for cache in self.rows])

    @property
    def longest(self) -> int:
        return max(cache.pos for cache in self.rows)

    @property
    def capacity(self) -> int:
        return 0 if self.data is None else self.data.size(4)

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.data.nbytes

    def advance(self, T, rows=None):
        """Count T more positions as filled in the rows of these numbers, or in all."""
        for cache in self.rows if rows is None else [self.rows[i] for i in rows]:
            cache.advance(T)

    def reserve(self, end):
        """Make room for `end` positions in all, in each row."""
        if end > self.capacity:
            max(self.rows, key=lambda cache: cache.pos).reserve(end)


class CacheSession:
    """The plain context: all tokens at full detail, up to the number of the model's positions."""

    wish = None  # nothing is hidden

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
        self._step = None  # the old one refers to the cache of an earlier prompt
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
        """Called after a common step with the token's state [1, D]; not needed here."""

    def enter(self, ids):
        """Called before a common step: the position of one more token, or None, as in `step`."""
        return self.cache.pos if self.cache.pos < self.decoder.max_seq_len else None
