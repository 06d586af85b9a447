"""
Demand: what the newest tokens of a session want of all blocks of its stream.

Shapes: B rows, P tokens, n whole blocks of the stream, D = n_embd, C = KEY.
"""

import math

import torch

from megacontext.lensnet import FADE, KEY
from megacontext.tree import RamStore


class Demand:
    """
    listener: LensNet's. store: of the tree, where keys stand behind the gists of level 1.

    What was wanted fades with each token. So that fading costs nothing, values are kept as they would be at token 0.
    """

    def __init__(self, listener, store):
        self.listener, self.store = listener, store
        self.keys = RamStore()  # of all whole blocks, [B, n, C] at level 0
        self.clear()

    def clear(self):
        self._values, self._end = None, 0

    def wanted(self, rows):
        """[B, n] now."""
        if self._values is None:
            return torch.zeros(rows, 0)
        return self._values - FADE * self._end

    def listen(self, states, num_tokens):
        """Take up what the newest tokens want, one of which is the last of num_tokens: states [P, D] for each row."""
        blocks, known = self.store.count(1), self.keys.count(0)
        if blocks > known:
            index = torch.arange(known, blocks, device=self.store.device).expand(len(states), -1)
            self.keys.append(0, self.store.get(1, index)[..., -KEY:].float())
        if blocks:
            now = [self.listener(row, keys)[None] for row, keys in zip(states, self.keys.all(0), strict=True)]
            now = (now[0] if len(now) == 1 else torch.cat(now)).add_(FADE * num_tokens)
            if self._values is None:
                self._values = now
            else:  # blocks that came since have not been asked for
                before = self._values if self._values.size(1) == blocks else self._grown(blocks)
                self._values = torch.maximum(now, before, out=now)
        self._end = num_tokens

    def _grown(self, blocks):
        grown = self._values.new_full((len(self._values), blocks), -torch.inf)
        grown[:, : self._values.size(1)] = self._values
        return grown

    def most(self, mask):
        """The highest z of the first blocks of each row, to which the mask [B, m] is added: a list of B numbers."""
        n = 0 if self._values is None else min(mask.size(1), self._values.size(1))
        if not n:
            return [-math.inf] * len(mask)
        return [most - FADE * self._end for most in (self._values[:, :n] + mask[:, :n]).amax(1).tolist()]

    def truncate(self, blocks):
        self.keys.truncate(0, min(blocks, self.keys.count(0)))
        if self._values is not None:
            self._values = self._values[:, :blocks]

    def repeat(self, rows):
        if self.keys.count(0):
            self.keys.repeat(rows)
        if self._values is not None:
            self._values = self._values.repeat(rows, 1)

    def snapshot(self):
        return self._values, self._end

    def restore(self, snapshot):
        self._values, self._end = snapshot
