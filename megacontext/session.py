"""
MCSession: one conversation of any length, at a fixed cost per token.

    prefill: tokens → tree → first working context → KV cache → refocuses, guided by the prompt's end → logits
    step:    token → tree, working context, cache → logits; a refocus if the token wants a hidden block

Shapes: N tokens so far, n whole blocks, W entries, D = n_embd, V = vocab_size, K = block_size.

LensNet scores the blocks of the stream by the newest tokens. A *refocus* edits the working context accordingly, at
least every mc_infer_refocus_interval tokens. It leaves room for the tokens until the next refocus, so that no call
ends with more entries than the budget, allocator_soft_max.

A refocus is *spliced* into the cache: removed entries are dropped, new ones are read and attend to the entries before
them in the stream, and the newest tokens are read again so that they attend to the new ones. All others keep their
keys and values until the next prompt. By measurement this is as good as reading everything behind an edit again
(mc_infer_exact), at a cost that does not depend on W.
"""

import math
from typing import NamedTuple

import torch

from megacontext.config import MCConfig
from megacontext.focus_allocator import Focus, focus_state
from megacontext.lensnet import NEWEST, Demand
from megacontext.reader import ASKING, Reader, score
from megacontext.spliced_cache import SplicedCache
from megacontext.streams import scratch_store
from megacontext.tree import GIST_DTYPE, MegaContextTree, RamStore
from megacontext.working_context import LEVELS, WorkingContext, smallest_length
from nanochat.common import Stopwatch, UserError
from nanochat.decode import Decoder

READ_ENTRIES = 4096  # entries per forward pass, to bound its memory
PER_ENTRY = 4  # tokens that GistNet processes in the time in which the model reads one entry
READ_AGAIN = 1  # newest tokens that are read again after a refocus while generating; 8 find no more
BLOCKS_PER_TOKEN = 4096  # blocks that LensNet scores per token on average: in longer streams it skips tokens
MARGIN = 0.2  # after a refocus without edits, z must exceed the value that caused it by this to cause another


class Snapshot(NamedTuple):
    """A session's state at one time, for `restore`; its size has a bound, however long the stream."""

    session: "MCSession"
    cuts: int
    context: WorkingContext | None
    since: int
    focus: tuple
    demand: tuple
    bar: float


class MCSession:
    """
    The session that `Engine.generate(session=…)` takes: its tokens attend to a working context of this stream.

    networks: GistNet and LensNet, in eval mode. config: resolved. decoder: None makes one from the model's current
    weights. seed: of stochastic_greedy. on_update(session, entries_read, watch): called after each prefill and
    refocus; watch: a Stopwatch of its duration, including pauses between parts.

    A session keeps the tokens that it has read: if a prompt begins with them, only the rest is read.
    store: where the tree is kept; tokens in it count as read. Its first `past` tokens precede every prompt. state: that
    of the session that wrote the store, see `state`. Without a store the session creates one, as mc_tree says.

    Raises UserError if the budget is too small for the entries that a session needs.
    """

    def __init__(
        self,
        model,
        networks,
        config: MCConfig,
        decoder=None,
        seed=0,
        on_update=None,
        store=None,
        past=0,
        state=None,
    ):
        self.model, self.config, self.on_update = model, config, on_update
        self.reader, self.device = Reader(model, networks, config), model.get_device()
        self.recent, self.interval = config.allocator_recent_tokens, config.mc_infer_refocus_interval
        self.budget = config.allocator_soft_max
        self._least = 2 * math.atanh(min(config.allocator_expand_threshold, 1 - 1e-6))  # z of a score at the threshold
        self.room = config.budget_of_a_refocus
        config.check_session(model.config.sequence_len)
        self.decoder = decoder or Decoder(model)
        self.seed = seed
        self.past, self._store = past, store
        self._cuts = []  # num_tokens after each truncation: it invalidates earlier snapshots of more tokens
        self._reset()
        if self.num_tokens:
            self._resume(state)

    def _reset(self):
        reader, K = self.reader, self.config.block_size
        store = self._store or (scratch_store(K) if self.config.mc_tree == "disk" else RamStore(GIST_DTYPE))
        self.tree = MegaContextTree(reader.node, K, store, reader.embed_for_decoding, self.model.sink, reader.deep)
        c = self.config
        self.demand = Demand(reader.networks.lensnet, store, self.model.config.n_embd + reader.deep, c.mc_beside)
        self.focus = Focus(c, 1, self.seed)
        self.spliced = SplicedCache(self.decoder, self.budget, reader)
        self._context = None  # as of its last edit, on the CPU; later tokens are at LOD 0
        self._closed = None  # (first block, mask), see _closed_blocks; None until it is asked for
        self._since = 0  # tokens since the last refocus
        self._stepper = None
        self._up_to_date = True  # whether the cache holds all entries
        self._bar = self._least  # z above which a wish causes a refocus
        self.wish = None  # of the newest token, see _wish

    # -----------------------------------------------------------------------------------------------------
    # What the Engine calls

    def prefill(self, tokens):
        """
        Logits [1, V] after the prompt, a list of ids, which replaces the tokens of the session.

        Their common beginning is kept with its levels of detail. Raises UserError, without a change, if no working
        context of that many tokens fits into the budget.
        """
        *_, (_, logits) = self.reading(tokens, READ_ENTRIES)
        return logits

    @torch.inference_mode()
    def reading(self, tokens, part):
        """
        The same as a generator, in parts that each take about as long as reading `part` entries.

        Yields (number of entries that take as long, None) after each part, and at the end (0, logits [1, V]). If the
        generator is closed before all tokens are in the tree, the session keeps only the common beginning.
        """
        self._check_open()
        if not tokens:
            raise ValueError("expected at least one token, got none")
        watch, self.wish = Stopwatch(self.device), None
        N = self.past + len(tokens)
        smallest = smallest_length(N, self.config.block_size, self.recent)
        if smallest > self.room:
            raise UserError(
                f"expected room for {smallest} entries, the fewest for {N:,} tokens with {self.recent} at full "
                f"detail, got {self.room} and {self.interval} until the next refocus: raise --allocator_soft_max"
            )
        ids = torch.tensor([tokens], device=self.device)
        kept = self._common_prefix(ids)
        self._keep(kept)
        try:
            for piece in ids[:, kept - self.past :].split(PER_ENTRY * part, dim=1):
                self.tree.append(piece)
                yield piece.size(1) // PER_ENTRY, None
        except GeneratorExit:
            self._keep(kept)
            raise
        self.demand.clear()
        read = 0
        for _ in self._focused(self._collapsed(kept)):
            for n, after in self._read_parts(part):
                logits = after
                read += n
                yield n, None
        self._tell(read, watch)
        yield 0, logits

    def _focused(self, first):
        """Adopt this first context of a prompt, then refocus; yields whenever there are entries to read."""
        anew = self.config.mc_gist_limit > 0
        self._adopt(first, fresh=not anew)
        yield
        for again in range(self.config.mc_infer_allocator_iterations):
            if self._context.coarsest == 0:
                break
            context = self._refocused(self._context, again > 0, eager=True)
            if context is self._context:
                break
            self._adopt(context, NEWEST)  # the tokens whose words are in the query attend to what was opened
            yield
        if anew:
            # A model not trained with gists answers worse from keys that were computed before the right blocks opened
            self._adopt(self._context, fresh=True)
            if not self._up_to_date:
                yield

    def _collapsed(self, kept):
        """
        A context within the budget. The first `kept` tokens keep their levels if possible; the newest of the others
        are in full detail, as far as there is room.
        """
        N, K = self.num_tokens, self.config.block_size
        first_new = min(kept, max(0, N - self.recent)) // K  # first block that is new or recent
        if not first_new:
            return WorkingContext.initial(N, K, self.room, self.recent)
        context = self._context.truncate(first_new * K).append(N - first_new * K)
        context = context.collapse_oldest(self.room, self.recent, first_new)  # old blocks keep their levels if possible
        return context.collapse_oldest(self.room, self.recent)

    @torch.inference_mode()
    def step(self, ids):
        """Logits [1, V] after one more token, ids [1]; None, without a change, if there is no room for it."""
        logits = self.read(ids)
        better = None if self.wish is None else self.follow(self.wish.item())
        return logits if better is None else better

    @torch.inference_mode()
    def read(self, ids):
        """The same without the refocus that the token may want: pass the value of `wish` to `follow` for that."""
        entered = self.enter(ids)
        if not isinstance(entered, int):
            return entered
        if self._stepper is None:
            self._stepper = self.decoder.stepper(self.cache)
        logits = self._stepper(ids, positions=entered)
        self.saw(self.decoder.states)
        return logits

    @torch.inference_mode()
    def enter(self, ids):
        """
        The part of a step before the model reads the token, so that several sessions' tokens can be read in one batch.
        Returns the token's position; or logits, if a refocus was due and the token has been read with it; or None, as
        `step`.
        """
        self._check_begun()
        self.wish = None
        due = self._since + 1 >= self.interval
        watch = Stopwatch(self.device) if due else None
        if due and smallest_length(self.num_tokens + 1, self.config.block_size, self.recent) > self.room:
            return None
        self.tree.append(ids[:, None])
        self._since += 1
        if due:
            before = self._context_now()
            context = self._refocused(before)
            if context is not before:
                self._adopt(context, READ_AGAIN)
        if self.spliced.outdated(self.num_tokens):
            self._adopt(self._context_now())
        if not self._up_to_date:
            logits = self._read(watch)
            self.wish = None if due else self._wish()
            return logits
        if due:
            self._tell(1, watch)
        return self.spliced.newest(self.num_tokens)

    @torch.inference_mode()
    def saw(self, states):
        """Query LensNet with a step's token, from its state [1, D]; called after the step."""
        blocks = self.tree.store.count(1)
        if self._context.coarsest > 0 and not self._since % (1 + blocks // BLOCKS_PER_TOKEN):
            self._listen(states)
            self.wish = self._wish()

    def _listen(self, states):
        """Query LensNet with the newest tokens, from their states [P, D]; P is 0 if gists stand for them."""
        if not len(states):
            return
        embeds = self.tree.newest(NEWEST + len(states) - 1)[0]
        at = torch.arange(len(embeds) - len(states), len(embeds), device=self.device)
        self.demand.listen(self.reader.asking(states, embeds, at), self.num_tokens)

    def _wish(self):
        """The highest z of any hidden block, [1] on the device; None if none is hidden."""
        if self._context.coarsest <= 0:
            return None
        if self._closed is None or self._closed[0] != self.demand.first:
            self._closed = self.demand.first, self._closed_blocks(self.demand.first)
        return self.demand.most(self._closed[1])

    @torch.inference_mode()
    def follow(self, wish):
        """
        Refocus if a hidden block is wanted enough, and read the newest token again: logits [1, V] in place of the
        step's; else None. wish: the value of `wish`, as a float: the caller may fetch several from the device at once.
        """
        self.wish = None
        if wish <= self._bar:
            return None
        watch = Stopwatch(self.device)
        before = self._context_now()
        context = self._refocused(before)
        if context is before:
            self._bar = wish + MARGIN
            self._tell(0, watch)
            return None
        self._adopt(context, READ_AGAIN)
        return self._read(watch)

    # -----------------------------------------------------------------------------------------------------
    # Back and forth

    def snapshot(self) -> Snapshot:
        """The current state, for `restore`; invalid once the session has dropped any of its current tokens."""
        self._check_open()
        context = self._context_now() if self.num_tokens else None
        moment = self._since, self.focus.snapshot(), self.demand.snapshot(), self._bar
        return Snapshot(self, len(self._cuts), context, *moment)

    def restore(self, snapshot: Snapshot):
        """
        Return to the snapshot. Cache entries that are still valid are kept; the next call reads the others. Raises
        ValueError for another session's snapshot, or one whose tokens are no longer there.
        """
        self._check_open()
        num_tokens = snapshot.context.num_tokens if snapshot.context else 0
        if snapshot.session is not self:
            raise ValueError("expected a snapshot of this session, got one of another")
        if any(cut < num_tokens for cut in self._cuts[snapshot.cuts :]):
            raise ValueError(f"the session has forgotten some of the {num_tokens} tokens of this snapshot")
        self._keep(num_tokens)
        if not num_tokens:
            return
        self._adopt(snapshot.context)
        self._since, self._bar = snapshot.since, snapshot.bar
        self.focus.restore(snapshot.focus)
        self.demand.restore(snapshot.demand)

    def note(self, tokens):
        """Append the rest of `tokens`, if they begin with all that the session holds; the next call reads it."""
        if self._common_prefix(torch.tensor([[*tokens, -1]], device=self.device)) == self.num_tokens:
            rest = tokens[self.num_tokens - self.past :]
            if rest:
                self.tree.append(torch.tensor([rest], device=self.device))
                self._since += len(rest)
                self._up_to_date = False

    def state(self) -> dict:
        """The focus as JSON values: with the store, all that another session needs to continue."""
        return {"since": self._since, **self.focus.state(self._context_now())}

    def _resume(self, state):
        for _ in self.tree.complete():
            pass
        self._context = WorkingContext.initial(self.num_tokens, self.config.block_size, self.room, self.recent)
        if state:
            self._context = self.focus.resume(state, self._context)
            self._since = state["since"]
        self._up_to_date = self.spliced.splice(self._context)

    def close(self):
        """Free the memory. Any further use is an error."""
        if self.tree is not None:
            self.tree.store.close()
        self.tree = self.focus = self.spliced = self.decoder = self._stepper = self._context = self.demand = None

    def _check_open(self):
        if self.tree is None:
            raise ValueError("this session was closed")

    def _check_begun(self):
        self._check_open()
        if self._context is None:
            raise ValueError("expected a session that has read something: call prefill first")

    def _common_prefix(self, ids) -> int:
        """
        Length of the beginning that past and prompt [1, N] share with the session, without the prompt's last token.
        """
        n = min(self.num_tokens - self.past, ids.size(1) - 1)
        if n < 1:
            return self.past
        held = self.tree.store.get(0, self.past + torch.arange(n, device=self.device)[None])
        differs = (held != ids[:, :n])[0].nonzero()
        return self.past + (int(differs[0]) if len(differs) else n)

    def _keep(self, num_tokens):
        """Drop all tokens but the first num_tokens, and the cache entries that depend on others."""
        if num_tokens < self.num_tokens:
            self._cuts.append(num_tokens)
        if num_tokens:
            self._adopt(self._context_now().truncate(num_tokens))
            self.tree.truncate(num_tokens)
            self.demand.truncate(num_tokens // self.config.block_size)
        elif self.num_tokens:
            self.tree.truncate(0)
            if self._store is None:
                self.tree.store.close()
            self._reset()

    # -----------------------------------------------------------------------------------------------------
    # Tree, working context, cache

    @property
    def num_tokens(self) -> int:
        """N, with the past."""
        return self.tree.num_tokens

    @property
    def cache(self):
        """A KVCache of one row."""
        return self.spliced.cache

    def _context_now(self):
        """The working context, with the tokens appended since its last edit."""
        new = self.num_tokens - self._context.num_tokens
        return self._context.append(new) if new else self._context

    def _adopt(self, context, again=0, fresh=False):
        """
        Make this the working context and splice it into the cache; again, fresh: see SplicedCache.splice.
        """
        before = self._context and self._context_now()
        self._context, self._closed = context, None
        self._bar = self._least
        self._up_to_date = self.spliced.splice(context, before, again, fresh or self.config.mc_infer_exact)

    def _closed_blocks(self, first):
        """0 for each block from number `first` on that is hidden in a node, −inf for others, [m]."""
        context = self._context
        mask = torch.zeros(context.tiles.shape).masked_fill(context.tiles <= 0, -math.inf)
        mask = mask[0].repeat_interleave(context.blocks_of(first, context.num_blocks)[0])
        return mask.to(self.device, non_blocking=True)

    def _refocused(self, context, again=False, eager=False):
        self._since = 0
        scores = score(self.demand.wanted())[None]
        return self.focus.refocus(context, scores, self.room, again, self.demand.first, eager)

    def _read(self, watch=None):
        """Read the entries that are missing in the cache, at least one; logits [1, V] after the last."""
        parts, logits = zip(*self._read_parts(READ_ENTRIES), strict=True)
        if watch is not None:
            self._tell(sum(parts), watch)
        return logits[-1]

    def _read_parts(self, size):
        """The same, `size` entries at a time: yields (entries read, None), and after the last part (…, logits)."""
        context, states = self._context_now(), []
        codes = context.codes
        asks = (codes % LEVELS == 0) & (codes >= LEVELS * (context.num_tokens - ASKING))
        silent = codes[~asks][-1:]  # the last entry that does not query LensNet; all behind it do
        unread = self.spliced.unread(context)
        x, positions = self.tree.materialize(context, unread[None]), self.reader.positions(context, unread[None])
        for start in range(0, len(unread), size):
            span = slice(start, start + size)
            part = codes[unread[span]]
            angles = tuple(t[:, span] for t in positions)
            logits = self.decoder.extend(x[:, span], self.cache, angles, self.spliced.seen(part))
            self.spliced.took(part)
            asking = int((part > silent).sum()) if len(silent) else len(part)
            states.append(self.decoder.states[len(part) - asking :].clone())
            self._up_to_date = start + size >= len(unread)
            if self._up_to_date:
                self._listen(torch.cat(states))
            yield len(part), logits if self._up_to_date else None

    # -----------------------------------------------------------------------------------------------------
    # To be looked at

    @property
    def context(self) -> WorkingContext:
        """The current working context."""
        self._check_begun()
        return self._context_now()

    def focus_state(self) -> dict:
        """Where the focus is now: see focus_allocator.focus_state."""
        return focus_state(self.context, self.focus.records[0], self.budget)

    def memory(self) -> dict[str, int]:
        """Bytes of the tree and of the KV cache, including allocated but unused memory."""
        self._check_open()
        return {"tree": self.tree.store.nbytes, "cache": self.cache.nbytes}

    def _tell(self, entries_read, watch):
        watch.stop()
        if self.on_update is not None:
            self.on_update(self, entries_read, watch)
