"""
Demand: what the newest tokens of a session want of the blocks of its stream.

Shapes: B rows, P tokens, n blocks that are asked, C numbers of a key with words.
"""

import torch

from megacontext.lensnet import FADE
from megacontext.tree import RamStore

MOST_BLOCKS = 32768  # a million tokens at block_size 32


class Demand:
    """
    listener: LensNet's. store: of the tree, where keys stand behind the gists of level 1, of gist_size numbers. The
    newest MOST_BLOCKS whole blocks are asked, from number `first` on, and no others: what a token costs has a bound,
    however long the stream.

    What was wanted fades with each token. So that fading costs nothing, values are kept as they would be at token 0.
    """

    def __init__(self, listener, store, gist_size):
        self.listener, self.store, self.gist_size = listener, store, gist_size
        self.keys, self.first = RamStore(), 0  # keys [B, n, C] at level 0
        self.clear()

    def clear(self):
        self._values, self._end = None, 0

    def wanted(self, rows):
        """[B, n] now, of the blocks from `first` on."""
        if self._values is None:
            return torch.zeros(rows, 0)
        return self._values - FADE * self._end

    def listen(self, asking, num_tokens):
        """Add what the newest tokens want, the last of which is token num_tokens − 1: asking [P, 2·D] for each row."""
        self.load(len(asking))
        blocks = self.keys.count(0)
        if blocks:
            now = [self.listener(row, keys)[None] for row, keys in zip(asking, self.keys.all(0), strict=True)]
            now = (now[0] if len(now) == 1 else torch.cat(now)).add_(FADE * num_tokens)
            if self._values is None:
                self._values = now
            else:  # blocks that came since have not been asked for
                before = self._values if self._values.size(1) == blocks else self._grown(blocks)
                self._values = torch.maximum(now, before, out=now)
        self._end = num_tokens

    def load(self, rows):
        """Load the keys of new blocks. Those of the oldest are dropped by the thousand, not one by one."""
        blocks, known = self.store.count(1), self.first + self.keys.count(0)
        if blocks - self.first > MOST_BLOCKS + MOST_BLOCKS // 8:
            first = blocks - MOST_BLOCKS
            kept = self.keys.all(0)[:, first - self.first :].clone() if known > first else None
            self._values = None if self._values is None or kept is None else self._values[:, first - self.first :]
            self.keys, self.first, known = RamStore(), first, max(first, known)
            if kept is not None:
                self.keys.append(0, kept)
        if blocks > known:
            index = torch.arange(known, blocks, device=self.store.device).expand(rows, -1)
            self.keys.append(0, self.store.get(1, index)[..., self.gist_size :].float())

    def _grown(self, blocks):
        grown = self._values.new_full((len(self._values), blocks), -torch.inf)
        grown[:, : self._values.size(1)] = self._values
        return grown

    def most(self, mask):
        """
        The highest z of each row, [B] on the device; None if nothing was asked. The mask [B, m], of blocks from `first`
        on, is added to it.
        """
        n = 0 if self._values is None else min(mask.size(1), self._values.size(1))
        return (self._values[:, :n] + mask[:, :n]).amax(1) - FADE * self._end if n else None

    def truncate(self, blocks):
        """Forget the blocks from this number on."""
        if blocks < self.first:
            self.keys, self.first = RamStore(), 0
            self.clear()
            return
        kept = min(blocks - self.first, self.keys.count(0))
        self.keys.truncate(0, kept)
        if self._values is not None:
            self._values = self._values[:, :kept]

    def repeat(self, rows):
        if self.keys.count(0):
            self.keys.repeat(rows)
        if self._values is not None:
            self._values = self._values.repeat(rows, 1)

    def snapshot(self):
        return None if self._values is None else self._values.clone(), self._end, self.first

    def restore(self, snapshot):
        values, self._end, first = snapshot
        self._values = values if first == self.first else None
