"""The KV cache of a session whose working context is edited: what is dropped, turned and read again after an edit."""

import math

import torch

from megacontext.reader import Reader, near_from
from megacontext.working_context import LEVELS, damping
from nanochat.kv_cache import KVCache


class SplicedCache:
    """
    The KV cache of a session, and which entries of its working contexts it holds.

    An entry is identified by its code, see WorkingContext.codes. decoder: writes and rotates keys. limit: maximum
    number of entries. reader: gives the positions of entries.
    """

    def __init__(self, decoder, limit: int, reader: Reader):
        self.decoder, self.reader, self.gist_limit = decoder, reader, reader.config.mc_gist_limit
        self.cache = KVCache(decoder.config.n_layer, min(limit, 512), limit=limit)
        self._held, self._held_to = torch.empty(0, dtype=torch.long), 0  # see _note
        self._end, self._edited_at = 0, 0  # see newest
        self._damping = 0.0  # of the context's gists
        self._stale = math.inf  # entries with this code or a higher one were read before an earlier entry was edited

    def newest(self, num_tokens) -> int:
        """The position of token num_tokens − 1; the tokens since the last edit follow one another."""
        return self._end + num_tokens - self._edited_at - 1

    def splice(self, context, before=None, again=0, fresh=False) -> bool:
        """
        Drop cache entries that are not in this context; if there were any, also the newest `again` tokens, to be read
        again. Returns whether the cache then holds the whole context. before: the previous context, if any. fresh: also
        drop entries that were read before an earlier entry was edited.
        """
        self._note(context)
        held, here, damped = self._held, context.codes, self._damping
        self._damping = damping((here % LEVELS > 0).sum(), self.gist_limit).item()
        kept, by = self._moved(context, before)
        first = LEVELS * (context.num_tokens - (0 if kept.all() else again))  # not to be kept
        if not kept.any():
            self._stale = math.inf
        elif self._damping != damped:
            self._stale = 0
        else:
            changed = torch.cat((held[~kept], here[~torch.isin(here, held)]))
            self._stale = min([self._stale, *changed[changed < held[kept].max()].tolist()])
        if fresh:
            first, self._stale = min(first, self._stale), math.inf
        kept &= held < first
        if not kept.all():
            order = self.cache.keep(kept)
            self._held, by = held[order], by[order]
        moved = by.nonzero()[:, 0]
        if len(moved):
            self.decoder.turn(self.cache, moved, by[moved])
        self._dampen()
        return len(self._held) == len(here)

    def outdated(self, num_tokens) -> bool:
        """Whether entries stand elsewhere than at the last edit, though none was edited since."""
        T, mode = self.decoder.config.sequence_len, self.reader.config.mc_positional
        return mode == "near" and near_from(num_tokens, T) != near_from(self._edited_at, T)

    def _moved(self, context, before):
        """
        Of the entries held: which this context has, in as many positions as the one `before` had them, and how many
        positions further on, [n] each. Notes where the context ends.
        """
        places = []
        for one, num_tokens in ((before or context, self._edited_at), (context, None)):
            _, start, span, _ = (t[0] for t in self.reader.placed(one.entries, num_tokens))
            at = torch.searchsorted(one.codes, self._held).clamp(max=len(one.codes) - 1)
            places.append((start[at] + (span[at] - 1).double() / 2, span[at]))
        (then, took), (now, takes) = places
        self._end, self._edited_at = int(start[-1] + span[-1]), context.num_tokens
        return torch.isin(self._held, context.codes) & (took == takes), (now - then).float()

    def unread(self, context):
        """Indices [n] of the context's entries that are not in the cache."""
        self._note(context)
        return (~torch.isin(context.codes, self._held)).nonzero()[:, 0]

    def seen(self, part):
        """Attention mask or bias of the entries `part`, given as codes, over those held and the part: Decoder.extend's
        `seen`."""
        codes = torch.cat((self._held, part))
        bias = self._bias(codes)
        if bias is None and (not len(self._held) or self._held.max() < part.min()):
            return None
        seen = (codes <= part[:, None]).to(self.decoder.device, non_blocking=True)
        return seen if bias is None else bias.expand(len(part), -1).masked_fill(~seen, -torch.inf)

    def took(self, part):
        """Note that the entries with these codes were read."""
        self._held = torch.cat((self._held, part))
        self._dampen()

    def _dampen(self):
        """Set the cache's bias on attention scores."""
        self.cache.bias = self._bias(self._held)

    def _bias(self, codes):
        """The bias on the attention scores of entries as keys; None for no bias."""
        if not self._damping:
            return None
        bias = (codes % LEVELS > 0) * self._damping
        return bias.to(self.decoder.device, self.decoder.dtype, non_blocking=True)

    def _note(self, context):
        """Extend `_held`, the code of the entry in each slot of the cache, by the tokens since the last call."""
        new = torch.arange(self.cache.pos - len(self._held))
        self._held, self._held_to = torch.cat((self._held, LEVELS * (self._held_to + new))), context.num_tokens
