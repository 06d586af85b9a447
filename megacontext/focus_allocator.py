"""
The focus allocator: LensNet's scores and a budget become edits of a working context. Pure.

Shapes: W entries, K = block_size, n_blocks = ceil(N / K). All work is at the granularity of blocks, O(n_blocks + W).

An edit either *expands* a node into its K children, which costs K − 1 entries, or *collapses* K siblings into
their parent, which saves as many. An expansion gains the score of its node; a collapse gains minus the mean score
of the siblings that it merges.
"""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import torch

from megacontext.config import MCConfig
from megacontext.working_context import Edit, WorkingContext
from nanochat.common import UserError


class Move(NamedTuple):
    """A possible edit: its gain, and +1 if it expands, −1 if it collapses (in units of K − 1 entries)."""

    gain: float
    cost: int
    edit: Edit


def plan(scores, context: WorkingContext, budget: int, settings: MCConfig, resting=None, generator=None) -> list[Edit]:
    """
    Edits, to be applied in order, of a context of one row whose entries have these scores [W].

    The result has at most `budget` entries. If there are more now, the lowest-scored siblings collapse, whatever
    their score and, if need be, though they rest and though it takes more than allocator_max_replacements edits.
    What is left of that number goes to wishes, the highest gain first ("greedy"), or each drawn from the
    allocator_sample_top_k highest by softmax(gain / allocator_sample_temperature) ("stochastic_greedy"):
    expansions that gain at least allocator_expand_threshold and collapses that gain at least
    allocator_collapse_threshold. An expansion for which there is no room takes along the collapse that gains most,
    also one that nobody wished for, if together they gain both thresholds. Greedy's total gain is the greatest
    there is.

    Never collapsed: the last allocator_recent_tokens tokens, the unfinished last block, siblings of which one asks
    to be expanded (but for the budget). Blocks in `resting` [n_blocks] (bool), and those edited here, stay as they
    are. `settings` must be resolved. Raises UserError if no context can be as small as the budget.
    """
    length = int(context.lengths()[0])
    if context.num_rows != 1 or scores.shape != (length,) or not scores.isfinite().all():
        raise ValueError(
            f"expected one row and finite scores, one for each of its {length} entries, got {context.num_rows} rows and "
            f"scores {list(scores.shape)} from {scores.min()} to {scores.max()}"
        )
    smallest = context.smallest_length(settings.allocator_recent_tokens)
    if budget < smallest:
        raise UserError(
            f"expected a budget of at least {smallest} entries, the fewest that can hold {context.num_tokens} tokens "
            f"of which the last {settings.allocator_recent_tokens} stay as they are, got {budget}: raise the budget or "
            f"lower --allocator_recent_tokens"
        )
    row = _Row(scores, context, settings.allocator_recent_tokens, resting)
    row.fit(length - budget)
    row.grant_wishes((budget - length) // (row.K - 1) + len(row.edits), settings, generator)
    return row.edits


class _Row:
    """A row at the granularity of blocks: lod, value (mean score) and resting, each [n_blocks], and edits so far."""

    def __init__(self, scores, context, recent_tokens, resting):
        self.K = context.block_size
        self.lod = context.lod_map[0].cpu().clone()
        self.value = context.per_block(scores[None].double())[0].cpu()
        self.resting = torch.zeros(context.num_blocks, dtype=torch.bool) if resting is None else resting.cpu().clone()
        self.old_blocks = context.old_blocks(recent_tokens)
        self.edits: list[Edit] = []

    def edit(self, edit: Edit):
        blocks = slice(edit.first_block, edit.first_block + edit.num_blocks)
        self.lod[blocks] = edit.new_lod
        self.resting[blocks] = True
        self.edits.append(edit)

    def expansions(self, blocked, most) -> list[Move]:
        """The highest-scored nodes above the tokens, free of `blocked` [n_blocks] blocks."""
        sizes = [(lod, self.K ** (lod - 1), lod - 1) for lod in range(1, int(self.lod.max()) + 1)]
        return self._moves(1, sizes, len(self.lod), blocked, most)

    def collapses(self, blocked, most=None) -> list[Move]:
        """The lowest-scored complete groups of siblings, free of blocked, recent and unfinished blocks."""
        sizes = [(lod, self.K**lod, lod + 1) for lod in range(int(self.lod.max()) + 1)]
        return self._moves(-1, sizes, self.old_blocks, blocked, most)

    def _moves(self, cost, sizes, end, blocked, most):
        """For each (lod, size, new_lod) the aligned runs of `size` blocks before `end` that are all of that LOD."""
        gains, edits = [], []
        for lod, size, new_lod in sizes:
            runs = end // size
            lods, values, stuck = (x[: runs * size].view(runs, size) for x in (self.lod, self.value, blocked))
            here = ((lods == lod).all(1) & ~stuck.any(1)).nonzero()[:, 0]
            gains.append(cost * values[here].mean(1))
            first = here * size
            edits.append(torch.stack((first, *(torch.full_like(first, x) for x in (size, new_lod))), dim=1))
        if not gains:
            return []
        gains, edits = torch.cat(gains), torch.cat(edits)
        gains, order = gains.topk(len(gains) if most is None else min(most, len(gains)))
        return [
            Move(gain, cost, Edit(0, *edit)) for gain, edit in zip(gains.tolist(), edits[order].tolist(), strict=True)
        ]

    def fit(self, excess: int):
        """Collapse, lowest score first and resting blocks last, until `excess` entries are saved."""
        if excess <= 0:
            return
        rests = self.resting.clone()
        heap = [self._forced(move.edit, rests) for move in self.collapses(torch.zeros_like(rests))]
        heapq.heapify(heap)
        while excess > 0:
            _, score, (_, first, size, lod) = item = heapq.heappop(heap)
            self.edit(item[-1])
            self.value[first : first + size] = score
            excess -= self.K - 1
            parent = Edit(0, first - first % (size * self.K), size * self.K, lod + 1)
            end = parent.first_block + parent.num_blocks
            if end <= self.old_blocks and (self.lod[parent.first_block : end] == lod).all():
                heapq.heappush(heap, self._forced(parent, rests))

    def _forced(self, edit, rests):
        blocks = slice(edit.first_block, edit.first_block + edit.num_blocks)
        return bool(rests[blocks].any()), float(self.value[blocks].mean()), edit

    def grant_wishes(self, room: int, settings, generator):
        """Make the edits worth making; `room`: how many expansions fit as things are."""
        expand, collapse = settings.allocator_expand_threshold, settings.allocator_collapse_threshold
        left = max(0, settings.allocator_max_replacements - len(self.edits))
        top_k = 1 if settings.allocator == "greedy" else settings.allocator_sample_top_k
        wanted = (self.lod > 0) & (self.value >= expand)
        expansions = self.expansions(self.resting | ~wanted, left + top_k)
        collapses = self.collapses(self.resting | wanted, left + top_k)
        wishes = expansions + [move for move in collapses if move.gain >= collapse]
        done = set()
        for move in _in_turn(wishes, top_k, settings.allocator_sample_temperature, generator):
            if left == 0:
                break
            if move in done:
                continue
            moves = [move]
            if move.cost > room:
                payment = next((other for other in collapses if other not in done), None)
                if payment is None or payment.gain + move.gain < expand + collapse:
                    continue
                moves = [payment, move]
            if len(moves) > left:
                continue
            for each in moves:
                self.edit(each.edit)
                done.add(each)
                room -= each.cost
                left -= 1


def _in_turn(moves, top_k, temperature, generator) -> Iterator[Move]:
    """All moves, each drawn by softmax(gain / temperature) from the top_k highest that are left."""
    moves = sorted(moves, key=lambda move: -move.gain)
    while moves:
        draw = 0
        if top_k > 1:
            gains = torch.tensor([move.gain for move in moves[:top_k]])
            draw = int(torch.multinomial((gains / temperature).softmax(0), 1, generator=generator))
        yield moves.pop(draw)
