"""
SplicedCache: the KV cache of a session, and which entries of its working contexts it holds.

What leaves a working context leaves the cache, what comes in is read and sees what stands before it, by position; all
other entries keep their keys and values. An entry is identified by its code, see WorkingContext.codes.

Shapes: B rows, W entries of a context, held or not.
"""

import math

import torch

from megacontext.gaussian_rope import as_positions
from megacontext.working_context import LEVELS, damping
from nanochat.kv_cache import KVCache, RowCaches


class SplicedCache:
    """
    decoder: writes and turns keys. limit: entries, at most, of a row. positional, gist_limit: mc_positional and
    mc_gist_limit.
    """

    def __init__(self, decoder, limit: int, positional: str, gist_limit: int):
        self.decoder, self.limit, self.positional, self.gist_limit = decoder, limit, positional, gist_limit
        self._damping = [0.0]  # of the gists of each row's context
        self.cache = KVCache(decoder.config.n_layer, min(limit, 512), limit=limit)
        self._held, self._held_to = [torch.empty(0, dtype=torch.long)], 0  # see held
        self._ends, self._edited_at = [0], 0  # see newest
        self._stale = [math.inf]  # of each row: what stands from this code on was read before an edit

    @property
    def rows(self) -> list[KVCache]:
        return self.cache.rows if isinstance(self.cache, RowCaches) else [self.cache]

    def held(self, row):
        """The code of the entry at each position of a row's cache: those noted, then the tokens since."""
        held = self._held[row]
        new = self.rows[row].pos - len(held)
        return torch.cat((held, LEVELS * (self._held_to + torch.arange(new)))) if new else held

    def newest(self, num_tokens) -> list[int]:
        """The position of token num_tokens − 1 in each row; the tokens since the last edit follow one another."""
        return [end + num_tokens - self._edited_at - 1 for end in self._ends]

    def splice(self, context, before=None, again=0, fresh=False) -> bool:
        """
        Drop the entries that this context does not have; if there were any, also the newest `again` tokens, which are
        to be read again. Returns whether the cache then holds all entries of the context. before: the context until
        now, if there was one. fresh: drop also what was read before an edit further up.
        """
        self._note(context)
        here, whole, damped = context.codes, True, self._damping
        self._damping = [damping((codes % LEVELS > 0).sum(), self.gist_limit).item() for codes in here]
        stays = [torch.isin(held, row) for held, row in zip(self._held, here, strict=True)]
        again *= not all(kept.all() for kept in stays)
        for row, (cache, held, kept) in enumerate(zip(self.rows, self._held, stays, strict=True)):
            first = LEVELS * (context.num_tokens - again)  # not to be kept
            changed = torch.cat((held[~kept], here[row][~torch.isin(here[row], held)]))
            self._stale[row] = min([self._stale[row], *changed.tolist()])
            if self._damping[row] != damped[row]:
                self._stale[row] = 0
            if fresh:
                first, self._stale[row] = min(first, self._stale[row]), math.inf
            kept = kept & (held < first)
            self._held[row] = held if kept.all() else held[cache.keep(kept)]
            whole &= len(self._held[row]) == len(here[row])
        self.move(context, before)
        for row in range(context.num_rows):
            self._dampen(row)
        return whole

    def move(self, context, before=None):
        """Note where this context's rows end, and rotate the keys of entries that stood elsewhere `before`."""
        _, start, span, _ = as_positions(context.entries, self.positional)
        self._ends = (start + span).gather(1, context.lengths()[:, None] - 1)[:, 0].tolist()
        self._edited_at = context.num_tokens
        if before is None or self.positional != "rank":
            return
        then = as_positions(before.entries, self.positional).start
        for row, (held, new, old) in enumerate(zip(self._held, context.codes, before.codes, strict=True)):
            by = start[row, torch.searchsorted(new, held)] - then[row, torch.searchsorted(old, held)]
            moved = by.nonzero()[:, 0]
            if len(moved):
                self.decoder.turn(self.rows[row], moved, by[moved])

    def unread(self, context) -> list:
        """Of each row, which of the context's entries are not in the cache: their indices."""
        self._note(context)
        return [(~torch.isin(row, held)).nonzero()[:, 0] for row, held in zip(context.codes, self._held, strict=True)]

    def seen(self, row, part):
        """What each entry of `part`, codes, sees of those held and of the part, as Decoder.extend_rows takes it."""
        held, bias = self._held[row], None
        if self.gist_limit:
            bias = self._bias(row, torch.cat((held, part)))
        elif not len(held) or held.max() < part.min():
            return None
        seen = (torch.cat((held, part)) <= part[:, None]).to(self.decoder.device, non_blocking=True)
        return seen if bias is None else bias.expand(len(part), -1).masked_fill(~seen, -torch.inf)

    def took(self, row, part):
        """Note that these entries, codes, were read into a row."""
        self._held[row] = torch.cat((self._held[row], part))
        self._dampen(row)

    def repeat(self, rows):
        """Become `rows` equal rows, which may then differ."""
        self._held, self._stale, self._ends = self._held * rows, self._stale * rows, self._ends * rows
        self._damping = self._damping * rows
        cache, self.cache = self.cache, RowCaches()
        self.cache.join(cache, rows, self.limit)

    def _dampen(self, row):
        """Tell a row's cache what is added to the scores of its keys."""
        self.rows[row].bias = self._bias(row, self._held[row]) if self.gist_limit else None

    def _bias(self, row, codes):
        return ((codes % LEVELS > 0) * self._damping[row]).to(self.decoder.device, self.decoder.dtype)

    def _note(self, context):
        """Add the tokens that were read since the last call to `_held`."""
        self._held = [self.held(row) for row in range(context.num_rows)]
        self._held_to = context.num_tokens
