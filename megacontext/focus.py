"""
Focus at inference: turns LensNet's scores into edits of the working context, and records them for display.

Shapes: B rows, n blocks of the stream, P tiles of a working context.
"""

from dataclasses import asdict, dataclass, replace

import torch

from megacontext.config import MCConfig
from megacontext.focus_allocator import Change, plan, worth
from megacontext.working_context import WorkingContext


@dataclass(frozen=True)
class Record:
    """What is known of the focus of one row: the last refocus, and sums over all of them. A value."""

    changes: tuple[Change, ...] = ()  # of the last refocus, which the next one does not undo
    scored: WorkingContext | None = None  # this row before its last round
    scores: torch.Tensor | None = None  # [P], the best in each of its tiles then
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
        self.settings = replace(config, allocator_max_replacements=config.mc_infer_allocator_max_replacements)
        self.generator = torch.Generator().manual_seed(seed)
        self.records = [Record()] * rows
        self._before = []  # the changes of the refocus before this one

    def refocus(self, context, scores, budget, again=False, first=0, eager=False):
        """
        The context after a round of editing, no row above the budget; the very same object if nothing was edited.

        scores: of the blocks of each row from number `first` on, [B, n] in (−1, 1), on the CPU. What was expanded or
        collapsed in the refocus before, or in an earlier round of this one, may be expanded or collapsed further, but
        not undone. again: this is one more round of the last refocus. eager: a prompt asks. Then only rounds of its own
        are not undone, and see plan.
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
        record = replace(self.records[0], scored=None, scores=None)
        return {
            "num_tokens": context.num_tokens,
            "lod": _runs(context, 0),
            "record": asdict(record) | {"changes": [list(change) for change in record.changes]},
            "draws": self.generator.get_state().tolist() if self.settings.allocator == "stochastic_greedy" else None,
        }

    def resume(self, state, context):
        """Take over a `state`. Returns its context, cut or extended to the given one's length. Raises ValueError."""
        try:
            lods, blocks = torch.tensor(state["lod"]).T
            N, K = state["num_tokens"], context.block_size
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
    """The change that an edit makes: it expands a node, which has K times the blocks of its children, or collapses."""
    expands = edit.num_blocks == block_size**edit.new_lod
    return Change(edit.first_block, edit.num_blocks, edit.new_lod + (1 if expands else -1), edit.new_lod)


def lod_counts(context, row=0) -> dict[int, int]:
    """Entries of a row at each level of detail that occurs."""
    lods, counts = context.select([row]).entries.lod.unique(return_counts=True)
    return dict(zip(lods.tolist(), counts.tolist(), strict=True))


def _runs(context, row):
    """The blocks' levels in runs [level, number of blocks]."""
    lods, tiles = context.select([row]).tiles[0].unique_consecutive(return_counts=True)
    blocks = tiles * context.block_size ** (lods.long() - 1).clamp(min=0)
    return [list(run) for run in zip(lods.tolist(), blocks.tolist(), strict=True)]


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
        first = record.scored.first_blocks[0, lengths.cumsum(0) - lengths]
        scores = [[block, score / 100] for block, score in zip(first.tolist(), rounded.tolist(), strict=True)]
    return {
        "num_tokens": context.num_tokens,
        "block_size": context.block_size,
        "budget": budget,
        "entries": int(context.lengths()[row]),
        "lod": _runs(context, row),
        "lod_counts": lod_counts(context, row),
        "scores": scores,
        "expanded": [[c.first_block, c.num_blocks, c.new_lod] for c in record.changes if c.expands],
        "collapsed": [[c.first_block, c.num_blocks, c.new_lod] for c in record.changes if not c.expands],
        "refocuses": record.refocuses,
        "edits": record.edits,
        "swap_rate": record.swap_rate,
        "residency": record.residency,
    }
