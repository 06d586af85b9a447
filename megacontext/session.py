"""
MCSession: one conversation of any length, at a fixed cost per token.

    prefill: tokens → tree → a first working context → KV cache → refocuses, by what the prompt asks → logits
    step:    token → tree, working context, cache → logits; a refocus when the token wants a block that is hidden

Shapes: B rows, N tokens so far, n whole blocks, W entries, D = n_embd, V = vocab_size, K = block_size.

The newest tokens tell LensNet what they want of the stream. A *refocus* edits the working context by that, and at
least every mc_infer_refocus_interval tokens. It leaves room for the tokens until the next one, so that no call ends
with more entries than the budget, allocator_soft_max.

A refocus is *spliced* into the cache: what is gone leaves it, what comes in is read and sees what stands before it, by
position, and the newest tokens are read again to see it. All others stay as they were read, until the next prompt.
Measured, that is as good as reading all again that follows an edit (mc_infer_exact), at a cost that does not depend
on W.
"""

import math
import operator
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

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

READ_ENTRIES = 4096  # that the model reads at once, to bound the memory it needs
PER_ENTRY = 4  # tokens that GistNet takes up while the model reads one entry
READ_AGAIN = 1  # newest tokens that see at once what a refocus brought in, while an answer is made; 8 find no more
BLOCKS_PER_TOKEN = 4096  # that LensNet looks through, on average: in longer streams not every token is listened to
MARGIN = 0.2  # z above which a token is listened to again after a refocus that found nothing to do


class Snapshot(NamedTuple):
    """A moment of one session; its size does not grow with the stream."""

    session: "MCSession"
    cuts: int
    context: WorkingContext | None
    since: int
    focus: tuple
    heard: tuple


class MCSession:
    """
    What the tokens of `Engine.generate(session=…)` attend to: the newest at full detail, all others as focus has it.

    networks: GistNet and LensNet, in eval mode. config: resolved. rows: streams that share their prompts and have a
    focus each. decoder: None makes one from the model's weights as they are now. seed: of stochastic_greedy.
    on_update(session, entries_read, watch): called after each prefill and refocus; entries_read in all rows, watch: a
    Stopwatch of what it took, with what was done between its parts.

    A session keeps what it has read: a prompt that begins with it goes on where it was, and only what is new is read.
    store: where its tree is kept, for one row; what is in it has been read. The first `past` tokens of it come before
    all prompts. state: of the session that wrote it, see `state`. Without a store it has one of its own, of the kind
    that mc_tree names.

    Raises UserError when the budget is too small for what has to be in it.
    """

    def __init__(
        self,
        model,
        networks,
        config: MCConfig,
        rows=1,
        decoder=None,
        seed=0,
        on_update=None,
        store=None,
        past=0,
        state=None,
    ):
        self.model, self.config, self.rows, self.on_update = model, config, rows, on_update
        self.reader, self.device = Reader(model, networks, config), model.get_device()
        self.recent, self.interval = config.allocator_recent_tokens, config.mc_infer_refocus_interval
        self.budget = config.allocator_soft_max
        self._least = 2 * math.atanh(min(config.allocator_expand_threshold, 1 - 1e-6))  # z that is worth a refocus
        self.room = config.budget_of_a_refocus
        config.check_session(model.config.sequence_len)
        self.decoder = decoder or Decoder(model)
        self.seed = seed
        self._listener = networks.lensnet.listener()
        self.closed, self.past, self._store = False, past, store
        self._cuts = []  # num_tokens of each time that some were forgotten; snapshots of more tokens are void
        self._reset()
        if self.num_tokens:
            self._resume(state)

    def _reset(self):
        reader, K = self.reader, self.config.block_size
        store = self._store or (scratch_store(K) if self.config.mc_tree == "disk" else RamStore(GIST_DTYPE))
        self.tree = MegaContextTree(reader.node, K, store, reader.embed_for_decoding, self.model.sink, reader.deep)
        self.demand = Demand(self._listener, store, self.model.config.n_embd + reader.deep)
        self.focus = Focus(self.config, 1, self.seed)
        c = self.config
        self.spliced = SplicedCache(self.decoder, self.budget, c.mc_positional, c.mc_gist_limit)
        self._context = None  # on the CPU, as it was when it was last edited: tokens since then are at LOD 0
        self._since = 0  # tokens since the last refocus
        self._stepper = None
        self._up_to_date = True  # whether the cache holds all entries
        self._bar = [self._least]  # z of each row above which focus moves
        self.wish = None  # see _wish, of the newest token

    # -----------------------------------------------------------------------------------------------------
    # What the Engine calls

    @torch.inference_mode()
    def prefill(self, tokens):
        """
        Logits [B, V] after the prompt, a list of ids, which takes the place of what the session held.

        With one row, what both begin with stays, in focus as it is. Rows that may have gone apart begin anew.
        Raises UserError when no working context of so many tokens is small enough; then nothing has changed.
        """
        *_, (_, logits) = self.reading(tokens, READ_ENTRIES)
        if self.rows > 1:
            self._become_many()
        return logits.expand(self.rows, -1)

    @torch.inference_mode()
    def reading(self, tokens, part):
        """
        The same for one row, in parts that take about as long as the model takes to read `part` entries.

        Yields (how many it could have read meanwhile, None) after each part but the last, then the same with the logits
        [1, V]. Closed before all tokens are in the tree, the session holds what the prompt shared with what it held.
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
        self._adopt(self._collapsed(kept), fresh=True)
        for again in range(self.config.mc_infer_allocator_iterations + 1):
            if again:
                context = self._refocused(self._context, again > 1, eager=True)
                if context is self._context:
                    break
                self._adopt(context, NEWEST)  # all whose words asked see what was found
            for n, after in self._read_parts(part):
                logits = after
                read += n
                yield n, None
            if self._context.coarsest == 0:
                break
        self._tell(read, watch)
        yield 0, logits

    def _collapsed(self, kept):
        """All in the budget: the first `kept` in focus as they were if possible, the rest as fine as can be."""
        N, K = self.num_tokens, self.config.block_size
        first_new = min(kept, max(0, N - self.recent)) // K  # first block that is new or recent
        if not first_new:
            return WorkingContext.initial(N, K, self.room, self.recent)
        context = self._context.truncate(first_new * K).append(N - first_new * K)
        context = context.collapse_oldest(self.room, self.recent, first_new)  # what was in focus stays, if it can
        return context.collapse_oldest(self.room, self.recent)

    @torch.inference_mode()
    def step(self, ids):
        """
        Logits [B, V] after one more token per row, ids [B]; None if there is no room for it, and nothing has changed.
        """
        logits = self.read(ids)
        better = None if self.wish is None else self.follow(self.wish.tolist())
        return logits if better is None else better

    @torch.inference_mode()
    def read(self, ids):
        """The same, before focus moves by what the token wants: that is `wish`, to `follow` once it is known."""
        entered = self.enter(ids)
        if not isinstance(entered, int):
            return entered
        logits = self._step(ids)
        self.saw(self.decoder.states)
        return logits

    @torch.inference_mode()
    def enter(self, ids):
        """
        What a step does before the model reads the token, which it may then read together with others' tokens: the
        position; or logits, if a refocus had to be read, this token with it; or None, as `step`.
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
        if not self._up_to_date:
            logits = self._read(watch)
            self.wish = None if due else self._wish()
            return logits
        if due:
            self._tell(self.rows, watch)
        return self.spliced.newest(self.num_tokens)[0]

    @torch.inference_mode()
    def saw(self, states):
        """Take up what the tokens of a step want, from their states [B, D]; called after the step."""
        blocks = self.tree.store.count(1)
        if self._context.coarsest > 0 and not self._since % (1 + blocks // BLOCKS_PER_TOKEN):
            self._listen(states.unsqueeze(1).unbind())
            self.wish = self._wish()

    def _listen(self, states):
        """Take up what the newest tokens of each row want, from their states [P, D]."""
        embeds = self.tree.newest(NEWEST + max(map(len, states)) - 1, len(states))
        newest = torch.arange(embeds.size(1), device=self.device)
        rows = zip(states, embeds, strict=True)
        self.demand.listen([self.reader.asking(h, x, newest[len(x) - len(h) :]) for h, x in rows], self.num_tokens)

    def _wish(self):
        """How much each row wants the hidden block that it wants most, z [B] on the device; None if there is none."""
        if self._context.coarsest <= 0:
            return None
        if self._closed is None or self._closed[0] != self.demand.first:
            self._closed = self.demand.first, self._closed_blocks(self.demand.first)
        return self.demand.most(self._closed[1])

    @torch.inference_mode()
    def follow(self, wish):
        """
        Move focus if a hidden block is wanted enough, and read the newest tokens again: logits [B, V] in place of the
        step's. Else None. wish: the values of `wish`, a list, since whoever waits for them may wait for more at once.
        """
        self.wish = None
        if not any(map(operator.gt, wish, self._bar)):
            return None
        watch = Stopwatch(self.device)
        before = self._context_now()
        context = self._refocused(before)
        if context is before:
            self._bar = [z + MARGIN for z in wish]
            self._tell(0, watch)
            return None
        self._adopt(context, READ_AGAIN)
        return self._read(watch)

    # -----------------------------------------------------------------------------------------------------
    # Back and forth

    def snapshot(self) -> Snapshot:
        """This moment, to `restore` later; void once the session has forgotten tokens that it had by then."""
        self._check_open()
        context = self._context_now() if self.num_tokens else None
        heard = self.demand.snapshot(), self._bar
        return Snapshot(self, len(self._cuts), context, self._since, self.focus.snapshot(), heard)

    def restore(self, snapshot: Snapshot):
        """
        As if nothing had happened since the snapshot. Of the cache, what still holds is kept; the next call reads
        the rest. Raises ValueError for another session's snapshot, or one whose tokens are no longer there.
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
        self._since = snapshot.since
        self.focus.restore(snapshot.focus)
        demand, self._bar = snapshot.heard
        self.demand.restore(demand)

    def note(self, tokens):
        """Append the rest of `tokens`, if they begin with all that the session holds; the next call reads it."""
        if self._common_prefix(torch.tensor([[*tokens, -1]], device=self.device)) == self.num_tokens:
            rest = tokens[self.num_tokens - self.past :]
            if rest:
                self.tree.append(torch.tensor([rest], device=self.device))
                self._up_to_date = False

    def state(self) -> dict:
        """Where the session looks, ready for JSON: with the store, all that another needs to go on (of one row)."""
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
        if not self.closed:
            self.tree.store.close()
        self.closed = True
        self.tree = self.focus = self.spliced = self.decoder = self._stepper = None
        self._context = self.demand = None

    def _check_open(self):
        if self.closed:
            raise ValueError("this session was closed")

    def _check_begun(self):
        self._check_open()
        if self._context is None:
            raise ValueError("expected a session that has read something: call prefill first")

    def _common_prefix(self, ids) -> int:
        """
        How many tokens of past and prompt [1, N] this session holds already; the last one of the prompt never counts.
        """
        n = min(self.num_tokens - self.past, ids.size(1) - 1)
        if self.rows > 1 or n < 1:
            return self.past
        held = self.tree.store.get(0, self.past + torch.arange(n, device=self.device)[None])
        differs = (held != ids[:, :n])[0].nonzero()
        return self.past + (int(differs[0]) if len(differs) else n)

    def _begin_anew(self):
        if self.num_tokens:
            self._forget(0)
            self.tree.truncate(0)
            if self._store is None:
                self.tree.store.close()
            self._reset()

    def _forget(self, num_tokens):
        if num_tokens < self.num_tokens:
            self._cuts.append(num_tokens)

    def _keep(self, num_tokens):
        """Forget all tokens but the first num_tokens."""
        if num_tokens:
            self._cut(num_tokens)
        else:
            self._begin_anew()

    def _cut(self, num_tokens):
        """Forget all tokens but the first num_tokens >= 1, and the entries of the cache that know of others."""
        self._forget(num_tokens)
        before = self._context_now()
        self._adopt(before.truncate(num_tokens))
        self.tree.truncate(num_tokens)
        self.demand.truncate(num_tokens // self.config.block_size)

    # -----------------------------------------------------------------------------------------------------
    # Tree, working context, cache

    @property
    def num_tokens(self) -> int:
        """N, of each row."""
        return self.tree.num_tokens

    @property
    def cache(self):
        """KVCache, or RowCaches for several rows."""
        return self.spliced.cache

    def _context_now(self):
        """The working context with the tokens since it was last edited."""
        new = self.num_tokens - self._context.num_tokens
        return self._context.append(new) if new else self._context

    def _adopt(self, context, again=0, fresh=False):
        """
        Go on with this context and splice it into the cache, see SplicedCache.splice; `again` and `fresh` are its.
        """
        before = self._context and self._context_now()
        self._context, self._closed = context, None
        self._bar = [self._least] * context.num_rows
        self._up_to_date = self.spliced.splice(context, before, again, fresh or self.config.mc_infer_exact)

    def _closed_blocks(self, first):
        """0 for each block from number `first` on that is hidden in a node, −inf for others, [B, m]."""
        context = self._context
        mask = torch.zeros(context.tiles.shape).masked_fill(context.tiles <= 0, -math.inf)
        mask = mask.flatten().repeat_interleave(context.blocks_of(first, context.num_blocks).flatten())
        return mask.view(context.num_rows, -1).to(self.device, non_blocking=True)

    def _become_many(self):
        """Become self.rows equal rows, which may then differ."""
        self.tree.repeat(self.rows)
        self.focus.repeat(self.rows)
        self._context = self._context.select([0] * self.rows)
        self._closed, self._bar, self._stepper = None, self._bar * self.rows, None
        self.demand.repeat(self.rows)
        self.spliced.repeat(self.rows)

    def _refocused(self, context, again=False, eager=False):
        self._since = 0
        scores = score(self.demand.wanted(context.num_rows))
        return self.focus.refocus(context, scores, self.room, again, self.demand.first, eager)

    def _step(self, ids):
        if self._stepper is None:
            self._stepper = self.decoder.stepper(self.cache)
        now = self.spliced.newest(self.num_tokens)
        return self._stepper(ids, positions=now if len(now) > 1 else now[0])

    def _read(self, watch=None):
        """Logits [B, V] after all entries that the cache does not hold yet have gone into it: one or more per row."""
        parts, logits = zip(*self._read_parts(READ_ENTRIES), strict=True)
        if watch is not None:
            self._tell(sum(parts), watch)
        return logits[-1]

    def _read_parts(self, size):
        """The same, `size` entries at a time: yields (how many, None) after each part, the last one with the logits."""
        context, caches = self._context_now(), self.spliced.rows
        rows, unread, entries = range(context.num_rows), self.spliced.unread(context), context.codes
        at = pad_sequence(unread, batch_first=True)
        x, positions = self.tree.materialize(context, at), self.reader.positions(context, at)
        done, logits, states = [0] * len(rows), [None] * len(rows), [[] for _ in rows]
        while these := [row for row in rows if done[row] < len(unread[row])]:  # all of them at once
            spans = [range(done[row], len(unread[row]))[: size // len(rows)] for row in these]
            index = torch.tensor([(row, i) for row, span in zip(these, spans, strict=True) for i in span])
            index = index.to(self.device, non_blocking=True).unbind(1)
            parts = [entries[row][unread[row][span.start : span.stop]] for row, span in zip(these, spans, strict=True)]
            seen = list(map(self.spliced.seen, these, parts))
            counts, of_rows = list(map(len, parts)), [caches[row] for row in these]
            after = self.decoder.extend_rows(x[index], of_rows, counts, [t[index] for t in positions], seen)
            news = zip(these, spans, parts, after.split(1), self.decoder.states.split(counts), strict=True)
            for row, span, part, logits[row], state in news:
                done[row] = span.stop
                self.spliced.took(row, part)
                states[row].append(state[(part >= LEVELS * (context.num_tokens - ASKING)).to(self.device)])
            self._up_to_date = all(done[row] == len(unread[row]) for row in rows)
            if self._up_to_date:
                self._listen(list(map(torch.cat, states)))
            yield len(index[0]), torch.cat(logits) if self._up_to_date else None

    # -----------------------------------------------------------------------------------------------------
    # To be looked at

    @property
    def context(self) -> WorkingContext:
        """The working context as it is now."""
        self._check_begun()
        return self._context_now()

    def focus_state(self, row=0) -> dict:
        """Where a row's focus is now: see focus.focus_state."""
        return focus_state(self.context, self.focus.records[row], self.budget, row)

    def memory(self) -> dict[str, int]:
        """Bytes of the tree and of the KV cache, with what they keep ready."""
        self._check_open()
        return {"tree": self.tree.store.nbytes, "cache": self.cache.nbytes}

    def _tell(self, entries_read, watch):
        watch.stop()
        if self.on_update is not None:
            self.on_update(self, entries_read, watch)
