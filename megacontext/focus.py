"""
Focus at inference: LensNet's scores become edits, some rest, and what was done is kept to be looked at.

Shapes: B rows, W entries, n_blocks = ceil(N / K) blocks.
"""

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from megacontext.config import MCConfig
from megacontext.focus_allocator import plan


class Change(NamedTuple):
    """An edit that was made, and the level that its first block had before."""

    first_block: int
    num_blocks: int
    old_lod: int
    new_lod: int

    def as_list(self):
        return [self.first_block, self.num_blocks, self.new_lod]


@dataclass(frozen=True)
class Record:
    """What is known of the focus of one row: the last refocus, and sums over all of them. A value."""

    changes: tuple[Change, ...] = ()  # of the last refocus, which the next one does not undo
    scores: torch.Tensor | None = None  # [n_blocks], of the last round of scoring
    refocuses: int = 0
    edits: int = 0
    entries: int = 0  # at each refocus, summed up
    exposed: int = 0  # blocks that could be edited at each refocus, summed up
    edited: int = 0  # blocks that were

    @property
    def swap_rate(self) -> float:
        """Edits per refocus, as a share of the entries there are."""
        return self.edits / self.entries if self.entries else 0.0

    @property
    def residency(self) -> float | None:
        """Refocuses that a block keeps its level for, on average: chances to be edited by edits. None before any."""
        return self.exposed / self.edited if self.edited else None

    def summary(self) -> dict[str, float]:
        """The last refocus in numbers."""
        expansions = sum(change.new_lod < change.old_lod for change in self.changes)
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
            numbers |= {"score_min": low, "score_mean": float(self.scores.mean()), "score_max": high}
        return numbers


class Focus:
    """The focus of a number of rows. config: resolved. seed: of the draws of stochastic_greedy."""

    def __init__(self, config: MCConfig, rows: int, seed=0):
        self.settings = replace(config, allocator_max_replacements=config.mc_infer_allocator_max_replacements)
        self.generator = torch.Generator().manual_seed(seed)
        self.records = [Record()] * rows

    def refocus(self, context, lens, budget):
        """
        The context after `mc_infer_allocator_iterations` rounds of scoring and editing, no row above the budget.

        lens(context) -> scores [B, W] of a context's entries, on the CPU. What was expanded or collapsed in the refocus
        before, or in an earlier round of this one, may be expanded or collapsed further, but not undone. Gives back the
        very same object if there was nothing to edit.
        """
        before = [record.changes for record in self.records]
        changes = [()] * context.num_rows
        exposed = context.old_blocks(self.settings.allocator_recent_tokens)
        for _ in range(self.settings.mc_infer_allocator_iterations):
            scores = lens(context)
            per_block = context.per_block(scores)
            edits = []
            for row, length in enumerate(context.lengths().tolist()):
                one = context.select([row])
                recent = _directions(before[row] + changes[row], context.num_blocks)
                planned = plan(scores[row, :length], one, budget, self.settings, recent, self.generator)
                changes[row] += _changes(context.lod_map[row], planned)
                edits += [edit._replace(row=row) for edit in planned]
            if not edits:
                break
            context = context.apply(edits)
        lengths = context.lengths().tolist()
        for row, record in enumerate(self.records):
            self.records[row] = Record(
                changes[row],
                per_block[row],
                record.refocuses + 1,
                record.edits + len(changes[row]),
                record.entries + lengths[row],
                record.exposed + exposed,
                record.edited + sum(change.num_blocks for change in changes[row]),
            )
        return context

    def repeat(self, rows):
        self.records = self.records[:1] * rows

    def snapshot(self):
        return tuple(self.records), self.generator.get_state()

    def restore(self, snapshot):
        records, state = snapshot
        self.records = list(records)
        self.generator.set_state(state)

    def state(self, context) -> dict:
        """Of one row, ready for JSON: its context, and what the next refocus depends on."""
        record = replace(self.records[0], scores=None)
        return {
            "num_tokens": context.num_tokens,
            "lod": _runs(context, 0),
            "record": asdict(record) | {"changes": [list(change) for change in record.changes]},
            "draws": self.generator.get_state().tolist() if self.settings.allocator == "stochastic_greedy" else None,
        }

    def resume(self, state, context):
        """Be as in this state. Returns its context, made as long as the given one. Raises ValueError if it is none."""
        try:
            lods, runs = torch.tensor(state["lod"]).T
            N, K = state["num_tokens"], context.block_size
            found = type(context)(lods.to(torch.int8).repeat_interleave(runs)[None], N, K)
            found.check()
            changes = tuple(Change(*change) for change in state["record"]["changes"])
            self.records = [Record(**state["record"] | {"changes": changes})]
            if state["draws"]:
                self.generator.set_state(torch.tensor(state["draws"], dtype=torch.uint8))
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"expected the state of a focus, got {str(state)[:80]!r} ({error!r})") from error
        n = context.num_tokens
        return found.truncate(n) if n < N else found.append(n - N) if n > N else found


def _directions(changes, n_blocks):
    """int8 [n_blocks]: 1 where the last of the changes expanded a block, −1 where it collapsed it, 0 elsewhere."""
    directions = torch.zeros(n_blocks, dtype=torch.int8)
    for change in changes:
        blocks = slice(change.first_block, change.first_block + change.num_blocks)
        directions[blocks] = 1 if change.new_lod < change.old_lod else -1
    return directions


def _changes(lod_map, edits):
    """Edits of a row with this LOD map [n_blocks], made one after the other, as changes."""
    lod_map, changes = lod_map.clone(), []
    for edit in edits:
        changes.append(Change(edit.first_block, edit.num_blocks, int(lod_map[edit.first_block]), edit.new_lod))
        lod_map[edit.first_block : edit.first_block + edit.num_blocks] = edit.new_lod
    return tuple(changes)


def lod_counts(context, row=0) -> dict[int, int]:
    """Entries of a row at each level of detail that occurs."""
    lods, counts = context.select([row]).entries.lod.unique(return_counts=True)
    return dict(zip(lods.tolist(), counts.tolist(), strict=True))


def _runs(context, row):
    """The blocks' levels in runs [level, number of blocks]."""
    lods, runs = context.lod_map[row].unique_consecutive(return_counts=True)
    return [list(run) for run in zip(lods.tolist(), runs.tolist(), strict=True)]


def focus_state(context, record: Record, budget, row=0) -> dict:
    """
    What a view of the focus shows of a row, small and ready for JSON, however long the stream.

    lod: the blocks' levels in runs [level, number of blocks]. scores: [block, score] wherever the score of the last
    refocus becomes another one than in the block before. expanded, collapsed: [first block, number of blocks, new
    level] of the last refocus. swap_rate, residency (None before any edit): see Record.
    """
    scores = []
    if record.scores is not None:
        rounded, lengths = (100 * record.scores).round().int().unique_consecutive(return_counts=True)
        first = lengths.cumsum(0) - lengths
        scores = [[block, score / 100] for block, score in zip(first.tolist(), rounded.tolist(), strict=True)]
    return {
        "num_tokens": context.num_tokens,
        "block_size": context.block_size,
        "budget": budget,
        "entries": int(context.lengths()[row]),
        "lod": _runs(context, row),
        "lod_counts": lod_counts(context, row),
        "scores": scores,
        "expanded": [change.as_list() for change in record.changes if change.new_lod < change.old_lod],
        "collapsed": [change.as_list() for change in record.changes if change.new_lod > change.old_lod],
        "refocuses": record.refocuses,
        "edits": record.edits,
        "swap_rate": record.swap_rate,
        "residency": record.residency,
    }
