"""
The focus allocator: turns scores of blocks and a budget into edits of a working context.

`plan` chooses the edits and is pure; a Focus applies them at each refocus and records them.

Shapes: B rows, n blocks of the stream, P tiles of a working context, K = block_size.

A wanted block is *opened* at once, however high the node that hides it: the node *expands* into its K children, the
child with the block into its own, down to the block's tokens; each expansion costs K − 1 entries. To make room, K
siblings *collapse* into their parent, which saves as many. Opening gains the block's score; a collapse gains minus the
worth of its group, the best score in it. Among equal gains finer levels come first, then older blocks. A plan opens
only the best block of a node (the oldest of equals); later rounds open others.
"""

import heapq
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from itertools import islice, takewhile
from typing import NamedTuple

import numpy as np
import torch

from megacontext.config import MCConfig
from megacontext.working_context import Edit, WorkingContext, smallest_length
from nanochat.common import UserError


class Change(NamedTuple):
    """An edit that was made, with the level that its first block had before."""

    first_block: int
    num_blocks: int
    old_lod: int
    new_lod: int

    @property
    def expands(self) -> bool:
        return self.new_lod < self.old_lod


class Move(NamedTuple):
    """Possible edits, in order, with their total gain, and their cost in units of K − 1 entries."""

    gain: float
    cost: int
    edits: tuple[Edit, ...]


def plan(
    scores, context: WorkingContext, budget: int, settings: MCConfig, recent=(), generator=None, first=0, eager=False
) -> list[Edit]:
    """
    Edits of a one-row context, to be applied in order. scores [n] in (−1, 1): of the blocks from number `first` on;
    earlier blocks count as −1 and are not opened.

    The result has at most `budget` entries. If the context has more, the siblings of lowest worth collapse, whatever
    their scores, even if they were just expanded, and in more than mc_infer_allocator_max_replacements moves if
    necessary. The rest of that number of moves opens hidden blocks with a score of at least allocator_expand_threshold:
    the highest first ("greedy"), or each drawn from the allocator_sample_top_k highest by softmax(score /
    allocator_sample_temperature) ("stochastic_greedy"). Without room for a block, the collapses of highest gain make
    it, if the block's gain plus that of each collapse is at least the sum of both thresholds and above 0; with `eager`,
    above 0 suffices. Otherwise nothing collapses.

    The last allocator_recent_tokens tokens and the incomplete last block never collapse. Blocks that the Changes
    `recent` expanded or collapsed are not edited in the opposite direction (the last change of a block counts). Each
    tile is edited once. `settings` must be resolved.
    Raises UserError if no context is as small as the budget.
    """
    length = int(context.lengths()[0])
    known = scores.dim() == 1 and 0 <= first <= first + len(scores) <= context.num_blocks
    if context.num_rows != 1 or not known or not scores.isfinite().all():
        raise ValueError(
            f"expected one row and finite scores of blocks among its {context.num_blocks}, "
            f"got {context.num_rows} rows and scores {list(scores.shape)}: {scores}"
        )
    newest = settings.allocator_recent_tokens
    smallest = smallest_length(context.num_tokens, context.block_size, newest)
    if budget < smallest:
        raise UserError(
            f"expected a budget of at least {smallest} entries for {context.num_tokens} tokens with the last {newest} "
            f"at full detail, got {budget}: raise the budget or keep fewer recent tokens"
        )
    row = _Row(scores, first, context, newest, recent)
    row.fit(length - budget)
    room = (budget - length) // (row.K - 1) + len(row.edits)
    row.grant_wishes(room, settings, generator, eager)
    return row.edits


def worth(scores, context, first=0):
    """The best score in each tile of a one-row context, [P]; −1 without any. scores [n]: of the blocks from `first`."""
    return torch.segment_reduce(scores, "max", lengths=context.blocks_of(first, first + len(scores))[0], initial=-1.0)


class _Row:
    """
    A row being edited: the edits so far, and for each tile of the original context, [P], its worth (after a collapse
    that of the node) and whether it *rests*, that is, must not be edited in one direction.
    """

    def __init__(self, scores, begin, context, newest, recent):
        self.begin = begin  # number of the block that the first score is of
        self.context, self.K, self.newest, self.edits = context, context.block_size, newest, []
        self.scores, self.lod, self.first = scores, context.tiles[0], context.first_blocks[0].tolist()
        self.worth = worth(scores, context, begin)
        self.resting = {cost: _last_done(recent, context, expands=cost < 0) for cost in (1, -1)}

    def tiles(self, edits):
        """The slice of tiles that edits affect: the first edit covers the others."""
        first, blocks = edits[0].first_block, edits[0].num_blocks
        return slice(*(bisect_left(self.first, edge) for edge in (first, first + blocks)))

    def make(self, move):
        for resting in self.resting.values():  # once per plan
            resting[self.tiles(move.edits)] = True
        self.edits += move.edits

    def rests(self, move):
        return bool(self.resting[1 if move.cost > 0 else -1][self.tiles(move.edits)].any())

    def wishes(self, threshold):
        """(gain, cost, tile) for each node that may open and whose best block has at least this score."""
        tiles = ((self.lod > 0) & (self.worth >= threshold) & ~self.resting[1]).nonzero()[:, 0]
        return list(zip(self.worth[tiles].tolist(), self.lod[tiles].tolist(), tiles.tolist(), strict=True))

    def opening(self, tile) -> Move:
        """To open the best block of a node."""
        start, end = self.first[tile], self.first[tile] + int(self.context.tile_blocks[0, tile])
        start, best = max(start, self.begin), self.worth[tile]
        block = start + int((self.scores[start - self.begin : end - self.begin] == best).nonzero()[0])
        sizes = [(self.K ** (lod - 1), lod - 1) for lod in range(int(self.lod[tile]), 0, -1)]
        return Move(float(best), len(sizes), tuple(Edit(0, block // n * n, n, lod) for n, lod in sizes))

    def collapses(self) -> list[Move]:
        """All complete groups of siblings that are old enough to collapse, by descending gain."""
        gains, edits = [], []
        for lod in range(self.context.coarsest + 1):
            tile = self.context.siblings(lod, self.newest)[0].nonzero()
            gains.append(-self.worth[tile + torch.arange(self.context.group(lod))].amax(1))
            edits += [Edit(0, self.first[i], self.K**lod, lod + 1) for i in tile[:, 0].tolist()]
        if not edits:
            return []
        gains, order = torch.cat(gains).sort(descending=True, stable=True)
        return [Move(gain, -1, (edits[i],)) for gain, i in zip(gains.tolist(), order.tolist(), strict=True)]

    def fit(self, excess):
        """Collapse until `excess` entries are saved, resting groups last; nodes made here may collapse again."""
        if excess <= 0:
            return
        lod, resting = self.lod.clone(), self.resting[-1].clone()

        def urgency(edit, score):
            return bool(resting[self.tiles([edit])].any()), score, edit.new_lod, edit.first_block, edit

        heap = [urgency(move.edits[0], -move.gain) for move in self.collapses()]
        heapq.heapify(heap)
        while excess > 0:
            _, score, *_, edit = heapq.heappop(heap)
            self.make(Move(-score, -1, (edit,)))
            lod[self.tiles([edit])], self.worth[self.tiles([edit])] = edit.new_lod, score
            excess -= self.K - 1
            size = edit.num_blocks * self.K
            parent = Edit(0, edit.first_block // size * size, size, edit.new_lod + 1)
            siblings, old = self.tiles([parent]), self.context.old_blocks(self.newest)
            if parent.first_block + size <= old and (lod[siblings] == edit.new_lod).all():
                heapq.heappush(heap, urgency(parent, float(self.worth[siblings].max())))

    def grant_wishes(self, room, settings, generator, eager):
        """Open blocks with sufficient scores; room: number of expansions that fit without a further collapse."""
        expand = settings.allocator_expand_threshold
        margin = 0 if eager else expand + settings.allocator_collapse_threshold
        top_k = 1 if settings.allocator == "greedy" else settings.allocator_sample_top_k
        left = settings.mc_infer_allocator_max_replacements - len(self.edits)
        if left <= 0:
            return
        wishes = self.wishes(expand)
        payments = [move for move in self.collapses() if not self.rests(move)] if wishes else []
        refused = []  # (gain, cost): a wish with no higher gain and no lower cost is refused, too
        for gain, cost, tile in _in_turn(wishes, top_k, settings.allocator_sample_temperature, generator):
            if self.resting[1][tile] or any(gain <= g and cost >= c for g, c in refused):
                continue
            need, least = max(0, cost - room), max(margin, 1e-9) - gain
            paid = takewhile(lambda payment, least=least: payment.gain >= least, payments)
            paid = list(islice((payment for payment in paid if not self.rests(payment)), need))
            if len(paid) < need:
                refused.append((gain, cost))
                continue
            for move in (*paid, self.opening(tile)):
                self.make(move)
            room += need - cost
            left -= 1
            if not left:
                return


def _last_done(changes, context, expands):
    """Bool [P]: tiles with a block whose last change was an expansion (expands=True), or a collapse (False)."""
    edges = np.unique([edge for c in changes for edge in (c.first_block, c.first_block + c.num_blocks)])
    done = np.zeros(max(0, len(edges) - 1), dtype=int)  # between an edge and the next
    for c in changes:
        first, end = np.searchsorted(edges, (c.first_block, c.first_block + c.num_blocks))
        done[first:end] = c.expands == expands
    before, first = np.append(0, done.cumsum()), context.first_blocks[0].numpy()
    start = np.searchsorted(edges[1:], first, side="right")
    end = np.searchsorted(edges[:-1], first + context.tile_blocks[0].numpy())
    return torch.from_numpy(before[end] > before[start])


def _in_turn(wishes, top_k, temperature, generator):
    """Yield all wishes, each drawn by softmax(gain / temperature) from the top_k of highest gain that are left."""
    wishes = sorted(wishes, key=lambda wish: (-wish[0], wish[1]))
    while wishes:
        draw = 0
        if top_k > 1:
            gains = torch.tensor([gain for gain, *_ in wishes[:top_k]])
            draw = int(torch.multinomial((gains / temperature).softmax(0), 1, generator=generator))
        yield wishes.pop(draw)


# -----------------------------------------------------------------------------------------------------
# Refocuses: what was planned is applied, and recorded


@dataclass(frozen=True)
class Record:
    """The focus history of one row: its last refocus, and totals over all. Immutable."""

    changes: tuple[Change, ...] = ()  # of the last refocus, which the next one does not undo
    scored: WorkingContext | None = None  # this row before its last round
    scores: torch.Tensor | None = None  # [P], the best score in each of its tiles
    refocuses: int = 0
    edits: int = 0
    entries: int = 0  # sum over refocuses of the number of entries
    exposed: int = 0  # sum over refocuses of the number of blocks that could be edited
    edited: int = 0  # sum over edits of the number of blocks

    @property
    def swap_rate(self) -> float:
        """Edits per refocus, divided by the mean number of entries."""
        return self.edits / self.entries if self.entries else 0.0

    @property
    def residency(self) -> float | None:
        """Mean number of refocuses for which a block keeps its level: exposed / edited. None before any edit."""
        return self.exposed / self.edited if self.edited else None

    def summary(self) -> dict[str, float]:
        """The last refocus in numbers."""
        expansions = sum(change.expands for change in self.changes)
        numbers = {
            "expansions": expansions,
            "collapses": len(self.changes) - expansions,
            "refocuses": self.refocuses,
            "swap_rate": self.swap_rate,
        }
        if self.residency is not None:
            numbers["residency"] = self.residency
        if self.scores is not None:
            low, high = (float(score) for score in self.scores.aminmax())
            mean = float((self.scores * self.scored.tile_blocks[0]).sum()) / self.scored.num_blocks
            numbers |= {"score_min": low, "score_mean": mean, "score_max": high}
        return numbers


class Focus:
    """The focus of a number of rows. config: resolved. seed: of the draws of stochastic_greedy."""

    def __init__(self, config: MCConfig, rows: int, seed=0):
        self.settings = config
        self.generator = torch.Generator().manual_seed(seed)
        self.records = [Record()] * rows
        self._before = []  # the changes of the refocus before this one

    def refocus(self, context, scores, budget, again=False, first=0, eager=False):
        """
        The context after a round of editing, no row above the budget; the same object if nothing was edited.

        scores [B, n] in (−1, 1), on the CPU: of each row's blocks from number `first` on. A round does not undo edits
        of the previous refocus or of earlier rounds of this one; it may go further in their direction. again: this is
        another round of the last refocus. eager: for the end of a prompt: only earlier rounds of this refocus are
        protected, and smaller gains suffice (see plan).
        """
        if not again:
            self._before = [() if eager else record.changes for record in self.records]
        exposed, edits = context.old_blocks(self.settings.allocator_recent_tokens), []
        for row, (record, length) in enumerate(zip(self.records, context.lengths().tolist(), strict=True)):
            one = context.select([row])
            recent = self._before[row] + record.changes * again
            planned = plan(scores[row], one, budget, self.settings, recent, self.generator, first, eager)
            changes = tuple(_change(edit, context.block_size) for edit in planned)
            edits += [edit._replace(row=row) for edit in planned]
            self.records[row] = Record(
                record.changes * again + changes,
                one,
                worth(scores[row], one, first),
                record.refocuses + (not again),
                record.edits + len(changes),
                record.entries + length * (not again),
                record.exposed + exposed * (not again),
                record.edited + sum(change.num_blocks for change in changes),
            )
        return context.apply(edits) if edits else context

    def snapshot(self):
        return tuple(self.records), self.generator.get_state()

    def restore(self, snapshot):
        records, state = snapshot
        self.records = list(records)
        self.generator.set_state(state)

    def state(self, context) -> dict:
        """The first row as JSON values: its context, and all that the next refocus depends on."""
        record = replace(self.records[0], scored=None, scores=None)
        return {
            "num_tokens": context.num_tokens,
            "block_size": context.block_size,
            "lod": _runs(context),
            "record": asdict(record) | {"changes": [list(change) for change in record.changes]},
            "draws": self.generator.get_state().tolist() if self.settings.allocator == "stochastic_greedy" else None,
        }

    def resume(self, state, context):
        """
        Restore a `state`. Returns its context, truncated or extended to the length of the given one; the given one
        itself if the state has another block_size. Raises ValueError for an invalid state.
        """
        K = context.block_size
        if state.get("block_size", K) != K:
            return context
        try:
            lods, blocks = torch.tensor(state["lod"]).T
            N = state["num_tokens"]
            tiles = blocks // K ** (lods - 1).clamp(min=0)
            found = WorkingContext(lods.to(torch.int8).repeat_interleave(tiles)[None], N, K)
            found.check()
            changes = tuple(Change(*change) for change in state["record"]["changes"])
            self.records = [Record(**state["record"] | {"changes": changes})]
            if state["draws"]:
                self.generator.set_state(torch.tensor(state["draws"], dtype=torch.uint8))
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"expected the state of a focus, got {str(state)[:80]!r} ({error!r})") from error
        n = context.num_tokens
        return found.truncate(n) if n < N else found.append(n - N) if n > N else found


def _change(edit, block_size):
    """The Change that an edit makes: an expansion if it covers K^new_lod blocks, else a collapse."""
    expands = edit.num_blocks == block_size**edit.new_lod
    return Change(edit.first_block, edit.num_blocks, edit.new_lod + (1 if expands else -1), edit.new_lod)


def lod_counts(context) -> dict[int, int]:
    """Entries of a context of one row at each level of detail that occurs."""
    lods, counts = context.entries.lod.unique(return_counts=True)
    return dict(zip(lods.tolist(), counts.tolist(), strict=True))


def _runs(context):
    """The levels of the blocks of a context of one row, in runs [level, number of blocks]."""
    lods, tiles = context.tiles[0].unique_consecutive(return_counts=True)
    blocks = tiles * context.block_size ** (lods.long() - 1).clamp(min=0)
    return [list(run) for run in zip(lods.tolist(), blocks.tolist(), strict=True)]


def focus_state(context, record: Record, budget) -> dict:
    """
    What a view of the focus shows of a one-row context, as JSON values, of bounded size for any length of stream.

    lod: the blocks' levels in runs [level, number of blocks]. scores: [block, score] for each block whose score at the
    last refocus differs from that of the block before. expanded, collapsed: [first block, number of blocks, new level]
    of the last refocus. swap_rate, residency (None before any edit): see Record.
    """
    scores = []
    if record.scores is not None:
        rounded, lengths = (100 * record.scores).round().int().unique_consecutive(return_counts=True)
        first = record.scored.first_blocks[0, lengths.cumsum(0) - lengths]
        scores = [[block, score / 100] for block, score in zip(first.tolist(), rounded.tolist(), strict=True)]
    return {
        "num_tokens": context.num_tokens,
        "block_size": context.block_size,
        "budget": budget,
        "entries": int(context.lengths()),
        "lod": _runs(context),
        "lod_counts": lod_counts(context),
        "scores": scores,
        "expanded": [[c.first_block, c.num_blocks, c.new_lod] for c in record.changes if c.expands],
        "collapsed": [[c.first_block, c.num_blocks, c.new_lod] for c in record.changes if not c.expands],
        "refocuses": record.refocuses,
        "edits": record.edits,
        "swap_rate": record.swap_rate,
        "residency": record.residency,
    }
