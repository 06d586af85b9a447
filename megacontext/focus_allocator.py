"""
The focus allocator: LensNet's scores and a budget become edits of a working context. Pure.

Shapes: W entries, K = block_size, n_blocks = ceil(N / K). Work is done a block at a time: O(n_blocks + W) in all.

An edit either *expands* a node into its K children, which costs K − 1 entries, or *collapses* K siblings into
their parent, which saves as many. An expansion gains the score of its node, a collapse minus the worth of its group:
of gists, the score of the best; of tokens, the mean score, as LensNet was trained. Equal gains: the finer level goes
first, then the older blocks.
"""

import heapq
from typing import NamedTuple

import torch

from megacontext.config import MCConfig
from megacontext.working_context import Edit, WorkingContext
from nanochat.common import UserError


class Move(NamedTuple):
    """An edit that could be made, and what it would gain; cost +1 expands, −1 collapses (units of K − 1 entries)."""

    gain: float
    cost: int
    edit: Edit


def plan(scores, context: WorkingContext, budget: int, settings: MCConfig, recent=None, generator=None) -> list[Edit]:
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
    undone: `recent` (int8 [n_blocks]) is 1 in blocks that were expanded, −1 in blocks that were collapsed; they may be
    expanded or collapsed further. Each block is edited once. `settings` must be resolved.
    Raises UserError if no context is as small as the budget.
    """
    length = int(context.lengths()[0])
    if context.num_rows != 1 or scores.shape != (length,) or not scores.isfinite().all():
        raise ValueError(
            f"expected one row and, for its {length} entries, finite scores [{length}], "
            f"got {context.num_rows} rows and scores {list(scores.shape)}: {scores}"
        )
    newest = settings.allocator_recent_tokens
    smallest = context.smallest_length(newest)
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
    """A row being edited: lod, value (the score there) and which blocks rest, each [n_blocks], and the edits so far."""

    def __init__(self, scores, context, newest, recent):
        self.K = context.block_size
        self.lod = context.lod_map[0].clone()
        # In float64 the mean of many equal float32 values is exactly that value
        self.value = context.per_block(scores[None].double())[0]
        recent = torch.zeros_like(self.lod) if recent is None else recent
        self.resting = {1: recent == -1, -1: recent == 1}  # cost of a move → blocks that are not to be moved so
        self.old_blocks = context.old_blocks(newest)
        self.edits: list[Edit] = []

    def edit(self, edit):
        self.lod[_blocks(edit)] = edit.new_lod
        for resting in self.resting.values():  # once per plan: scores of what comes in are not known yet
            resting[_blocks(edit)] = True
        self.edits.append(edit)

    def rests(self, move):
        return bool(self.resting[move.cost][_blocks(move.edit)].any())

    def expansions(self, among, most) -> list[Move]:
        """The nodes above the tokens that gain most, of those that lie in blocks `among` [n_blocks]."""
        kinds = [(lod, self.K ** (lod - 1), lod - 1) for lod in range(1, int(self.lod.max()) + 1)]
        return self._moves(kinds, among, 1, most)

    def collapses(self, among) -> list[Move]:
        """The complete groups of siblings that lie in blocks `among` [n_blocks], old enough to collapse."""
        kinds = [(lod, self.K**lod, lod + 1) for lod in range(int(self.lod.max()) + 1)]
        return self._moves(kinds, among[: self.old_blocks], -1)

    def _moves(self, kinds, among, cost, most=None):
        """By falling gain, the runs of blocks to edit: aligned, all of one LOD; kinds: (lod, num_blocks, new_lod)."""
        gains, edits = [], []
        for lod, size, new_lod in kinds:
            runs = len(among) // size
            fits = (self.lod[: runs * size] == lod) & among[: runs * size]
            run = fits.view(runs, size).all(1).nonzero()[:, 0]
            gains.append(cost * self.value[: runs * size].view(runs, size)[run].amax(1))
            first, ones = run * size, torch.ones_like(run)
            edits.append(torch.stack((first, size * ones, new_lod * ones), dim=1))
        if not edits:
            return []
        gains, order = torch.cat(gains).sort(descending=True, stable=True)
        edits = torch.cat(edits)[order[:most]].tolist()
        return [Move(gain, cost, Edit(0, *edit)) for gain, edit in zip(gains[:most].tolist(), edits, strict=True)]

    def fit(self, excess):
        """Collapse until `excess` entries are saved, resting blocks last; also what was collapsed just now."""
        if excess <= 0:
            return
        resting = self.resting[-1].clone()

        def urgency(edit, score):
            return bool(resting[_blocks(edit)].any()), score, edit.new_lod, edit.first_block, edit

        heap = [urgency(move.edit, -move.gain) for move in self.collapses(torch.ones_like(resting))]
        heapq.heapify(heap)
        while excess > 0:
            _, score, *_, edit = heapq.heappop(heap)
            self.edit(edit)
            self.value[_blocks(edit)] = score
            excess -= self.K - 1
            size = edit.num_blocks * self.K
            parent = Edit(0, edit.first_block // size * size, size, edit.new_lod + 1)
            siblings = _blocks(parent)
            if siblings.stop <= self.old_blocks and (self.lod[siblings] == edit.new_lod).all():
                heapq.heappush(heap, urgency(parent, float(self.value[siblings].max())))

    def grant_wishes(self, room, settings, generator):
        """Make edits that promise enough; room: how many expansions fit before anything else collapses."""
        expand, collapse = settings.allocator_expand_threshold, settings.allocator_collapse_threshold
        top_k = 1 if settings.allocator == "greedy" else settings.allocator_sample_top_k
        left = settings.allocator_max_replacements - len(self.edits)
        if left <= 0:
            return
        wanted = (self.lod > 0) & (self.value >= expand)
        # Collapses are few, W / K at most. An edit takes no more than K expansions out of the running.
        collapses = self.collapses(~self.resting[-1])
        wishes = self.expansions(wanted & ~self.resting[1], most=left * self.K + top_k)
        wishes += [m for m in collapses if m.gain >= collapse and not wanted[_blocks(m.edit)].any()]
        turns = _in_turn(wishes, top_k, settings.allocator_sample_temperature, generator)
        while left and (move := next(turns, None)):
            if self.rests(move):
                continue
            moves = [move]
            if move.cost > room:
                payment = next((m for m in collapses if not self.rests(m)), None)
                # Together they gain more than nothing, so what is expanded is not among what collapses for it
                if payment is None or (both := payment.gain + move.gain) < expand + collapse or both <= 0:
                    continue
                moves = [payment, move]
            if len(moves) <= left:
                left -= len(moves)
                room -= sum(m.cost for m in moves)
                for m in moves:
                    self.edit(m.edit)


def _blocks(edit):
    return slice(edit.first_block, edit.first_block + edit.num_blocks)


def _in_turn(moves, top_k, temperature, generator):
    """Yield all moves, each drawn by softmax(gain / temperature) from the top_k of highest gain that are left."""
    moves = sorted(moves, key=lambda move: -move.gain)
    while moves:
        draw = 0
        if top_k > 1:
            gains = torch.tensor([move.gain for move in moves[:top_k]])
            draw = int(torch.multinomial((gains / temperature).softmax(0), 1, generator=generator))
        yield moves.pop(draw)
