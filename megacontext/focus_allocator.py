"""
The focus allocator: LensNet's scores and a budget become edits of a working context. Pure.

Shapes: W entries and P tiles of a working context, K = block_size. The length of the stream does not count.

An edit either *expands* a node into its K children, which costs K − 1 entries, or *collapses* K siblings into
their parent, which saves as many. An expansion gains the score of its node, a collapse minus the worth of its group:
of gists, the score of the best; of tokens, the mean score, as LensNet was trained. Equal gains: the finer level goes
first, then the older blocks.
"""

import heapq
from bisect import bisect_left
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megacontext.config import MCConfig
from megacontext.working_context import Edit, WorkingContext, smallest_length
from nanochat.common import UserError


class Change(NamedTuple):
    """An edit that was made, and the level that its first block had before."""

    first_block: int
    num_blocks: int
    old_lod: int
    new_lod: int

    @property
    def expands(self) -> bool:
        return self.new_lod < self.old_lod


class Move(NamedTuple):
    """An edit that could be made, and what it would gain; cost +1 expands, −1 collapses (units of K − 1 entries)."""

    gain: float
    cost: int
    edit: Edit


def plan(scores, context: WorkingContext, budget: int, settings: MCConfig, recent=(), generator=None) -> list[Edit]:
    """
    Edits, to be applied in order, of a context of one row whose entries have these scores [W].

    The result has at most `budget` entries. If there are more now, the lowest-scored siblings collapse, whatever
    their score and, if need be, right after they were expanded and in more than allocator_max_replacements edits.
    What is left of that number goes to wishes, the highest gain first ("greedy"), or each drawn from the
    allocator_sample_top_k highest by softmax(gain / allocator_sample_temperature) ("stochastic_greedy"). Wishes are

    - expansions that gain allocator_expand_threshold or more. Where there is no room for one, the collapse that
      gains most pays for it, wished for or not, if the two together gain both thresholds and more than nothing;
    - collapses that gain allocator_collapse_threshold or more.

    The last allocator_recent_tokens tokens and the unfinished last block never collapse. What was done lately is not
    undone: blocks may be expanded or collapsed further by what the last of the Changes `recent` did to them, but not
    back. Each block is edited once. `settings` must be resolved.
    Raises UserError if no context is as small as the budget.
    """
    length = int(context.lengths()[0])
    if context.num_rows != 1 or scores.shape != (length,) or not scores.isfinite().all():
        raise ValueError(
            f"expected one row and, for its {length} entries, finite scores [{length}], "
            f"got {context.num_rows} rows and scores {list(scores.shape)}: {scores}"
        )
    newest = settings.allocator_recent_tokens
    smallest = smallest_length(context.num_tokens, context.block_size, newest)
    if budget < smallest:
        raise UserError(
            f"expected a budget of {smallest} entries or more, the fewest for {context.num_tokens} tokens of which the "
            f"last {newest} stay at full detail, got {budget}: raise the budget or keep fewer recent tokens"
        )
    row = _Row(scores, context, newest, recent)
    row.fit(length - budget)
    room = (budget - length) // (row.K - 1) + len(row.edits)
    row.grant_wishes(room, settings, generator)
    return row.edits


class _Row:
    """
    A row being edited: the edits so far, and of each tile of the context as it was given its value (its score, after a
    collapse that of the node) and whether it rests, each [P].
    """

    def __init__(self, scores, context, newest, recent):
        self.context, self.K, self.newest, self.edits = context, context.block_size, newest, []
        self.lod, self.first = context.tiles[0], context.first_blocks[0].tolist()
        # In float64 the mean of many equal float32 values is exactly that value
        self.value = context.per_tile(scores[None].double())[0]
        self.resting = {cost: _last_done(recent, context, expands=cost < 0) for cost in (1, -1)}

    def tiles(self, edit):
        """Where an edit is."""
        return slice(*(bisect_left(self.first, b) for b in (edit.first_block, edit.first_block + edit.num_blocks)))

    def edit(self, edit):
        for resting in self.resting.values():  # once per plan: scores of what comes in are not known yet
            resting[self.tiles(edit)] = True
        self.edits.append(edit)

    def rests(self, edit, cost):
        return bool(self.resting[cost][self.tiles(edit)].any())

    def expansions(self, wanted, most) -> list[Move]:
        """The nodes that gain most, of these tiles [P]."""
        lods = range(1, self.context.coarsest + 1)
        return self._moves(1, [(wanted & (self.lod == lod), 1, self.K ** (lod - 1), lod - 1) for lod in lods], most)

    def collapses(self) -> list[Move]:
        """All complete groups of siblings that are old enough to collapse."""
        of_lod, n = self.context.siblings, self.context.group
        lods = range(self.context.coarsest + 1)
        return self._moves(-1, [(of_lod(lod, self.newest)[0], n(lod), self.K**lod, lod + 1) for lod in lods])

    def _moves(self, cost, kinds, most=None):
        """Moves by falling gain; kinds of them: the first tiles, bool [P]; number of tiles; of blocks; new LOD."""
        gains, edits = [], []
        for begins, n, blocks, new_lod in kinds:
            tile = begins.nonzero()
            gains.append(cost * self.value[tile + torch.arange(n)].amax(1))
            edits += [Edit(0, self.first[i], blocks, new_lod) for i in tile[:, 0].tolist()]
        if not edits:
            return []
        gains, order = torch.cat(gains).sort(descending=True, stable=True)
        best = zip(gains[:most].tolist(), order[:most].tolist(), strict=True)
        return [Move(gain, cost, edits[i]) for gain, i in best]

    def fit(self, excess):
        """Collapse until `excess` entries are saved, resting blocks last; also what was collapsed just now."""
        if excess <= 0:
            return
        lod, resting = self.lod.clone(), self.resting[-1].clone()

        def urgency(edit, score):
            return bool(resting[self.tiles(edit)].any()), score, edit.new_lod, edit.first_block, edit

        heap = [urgency(move.edit, -move.gain) for move in self.collapses()]
        heapq.heapify(heap)
        while excess > 0:
            _, score, *_, edit = heapq.heappop(heap)
            self.edit(edit)
            lod[self.tiles(edit)], self.value[self.tiles(edit)] = edit.new_lod, score
            excess -= self.K - 1
            size = edit.num_blocks * self.K
            parent = Edit(0, edit.first_block // size * size, size, edit.new_lod + 1)
            siblings, old = self.tiles(parent), self.context.old_blocks(self.newest)
            if parent.first_block + size <= old and (lod[siblings] == edit.new_lod).all():
                heapq.heappush(heap, urgency(parent, float(self.value[siblings].max())))

    def grant_wishes(self, room, settings, generator):
        """Make edits that promise enough; room: how many expansions fit before anything else collapses."""
        expand, collapse = settings.allocator_expand_threshold, settings.allocator_collapse_threshold
        top_k = 1 if settings.allocator == "greedy" else settings.allocator_sample_top_k
        left = settings.allocator_max_replacements - len(self.edits)
        if left <= 0:
            return
        wanted = (self.lod > 0) & (self.value >= expand)
        collapses = [m for m in self.collapses() if not self.rests(m.edit, -1)]
        # An edit takes no more than K expansions out of the running
        wishes = self.expansions(wanted & ~self.resting[1], most=left * self.K + top_k)
        wishes += [m for m in collapses if m.gain >= collapse and not wanted[self.tiles(m.edit)].any()]
        turns = _in_turn(wishes, top_k, settings.allocator_sample_temperature, generator)
        while left and (move := next(turns, None)):
            if self.rests(move.edit, move.cost):
                continue
            moves = [move]
            if move.cost > room:
                payment = next((m for m in collapses if not self.rests(m.edit, -1)), None)
                # Together they gain more than nothing, so what is expanded is not among what collapses for it
                if payment is None or (both := payment.gain + move.gain) < expand + collapse or both <= 0:
                    continue
                moves = [payment, move]
            if len(moves) <= left:
                left -= len(moves)
                room -= sum(m.cost for m in moves)
                for m in moves:
                    self.edit(m.edit)


def _last_done(changes, context, expands):
    """Bool [P]: the tiles with a block that the last of the changes there expanded, or collapsed."""
    edges = sorted({edge for c in changes for edge in (c.first_block, c.first_block + c.num_blocks)})
    done = torch.zeros(max(0, len(edges) - 1), dtype=torch.int8)  # between an edge and the next
    for c in changes:
        done[edges.index(c.first_block) : edges.index(c.first_block + c.num_blocks)] = c.expands == expands
    before = F.pad(done.cumsum(0), (1, 0))
    first, edges = context.first_blocks[0], torch.tensor(edges)
    start = torch.searchsorted(edges[1:], first, right=True)
    return before[torch.searchsorted(edges[:-1], first + context.tile_blocks[0])] > before[start]


def _in_turn(moves, top_k, temperature, generator):
    """Yield all moves, each drawn by softmax(gain / temperature) from the top_k of highest gain that are left."""
    moves = sorted(moves, key=lambda move: -move.gain)
    while moves:
        draw = 0
        if top_k > 1:
            gains = torch.tensor([move.gain for move in moves[:top_k]])
            draw = int(torch.multinomial((gains / temperature).softmax(0), 1, generator=generator))
        yield moves.pop(draw)
