"""
The working context: the tokens so far, tiled in order by nodes of the tree at mixed levels of detail (LOD).

Shapes: B rows, N tokens so far, K = block_size, n_blocks = ceil(N / K), W entries (of the longest row).

Node i of LOD l covers the tokens [i·K^l, (i+1)·K^l); LOD 0 is the tokens themselves. A row is held as one small
integer per block of K tokens, its *LOD map*: a block mapped to l >= 1 lies inside a node of LOD l, so K^(l−1)
aligned blocks carry the same l. Gaps, overlaps and disorder cannot be written down. What is derived costs
O(N / K + W): nothing here has one element per token.

The map stays on the CPU, where edits are planned, so that no plan waits for a GPU. Methods that take a tensor work on
its device.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanochat.common import UserError


class Entries(NamedTuple):
    """What the model attends to, in order: each [B, W], int64 except `valid`. Padding is (0, 0, 1, False)."""

    lod: torch.Tensor
    start: torch.Tensor  # first token
    span: torch.Tensor  # tokens covered: K^lod
    valid: torch.Tensor  # bool; False for the padding at the end of shorter rows

    def to(self, device) -> "Entries":
        return Entries(*(t.to(device, non_blocking=True) for t in self))


class Edit(NamedTuple):
    """Give num_blocks blocks of a row, from first_block on, the level new_lod: finer expands, coarser collapses."""

    row: int
    first_block: int
    num_blocks: int
    new_lod: int


@dataclass(frozen=True, eq=False)
class WorkingContext:
    """
    An immutable value: changes give a new one, and lod_map [B, n_blocks] int8, on the CPU, must not be written to.

    Raises ValueError for a map of the wrong shape or type; `check` looks at what is in it too.
    """

    lod_map: torch.Tensor
    num_tokens: int
    block_size: int

    def __post_init__(self):
        if self.num_tokens < 1 or self.block_size < 2:
            raise ValueError(
                f"expected at least 1 token and a block_size of at least 2, got {self.num_tokens} and {self.block_size}"
            )
        n_blocks = -(-self.num_tokens // self.block_size)
        if self.lod_map.dtype != torch.int8 or self.lod_map.dim() != 2 or self.lod_map.size(1) != n_blocks:
            raise ValueError(
                f"lod_map: expected int8 [B, {n_blocks}] for {self.num_tokens} tokens in blocks of {self.block_size}, "
                f"got {self.lod_map.dtype} {list(self.lod_map.shape)}"
            )

    # -----------------------------------------------------------------------------------------------------
    # Making one

    @classmethod
    def finest(cls, rows, num_tokens, block_size):
        """Every token at LOD 0."""
        n_blocks = -(-num_tokens // block_size)
        return cls(torch.zeros(rows, n_blocks, dtype=torch.int8), num_tokens, block_size)

    @classmethod
    def initial(cls, num_tokens, block_size, budget, recent_tokens, rows=1):
        """
        The start of a session, at most `budget` entries per row: as fine as that allows, oldest tokens coarsest.

        The oldest blocks become LOD 1, as few as will do; if all of them are not enough, the oldest of those become
        LOD 2, and so on. The last recent_tokens tokens stay LOD 0. Raises UserError if no such context fits.
        """
        context = cls.finest(rows, num_tokens, block_size)
        smallest = context.smallest_length(recent_tokens)
        if budget < smallest:
            raise UserError(
                f"expected a budget of at least {smallest} entries for {num_tokens} tokens, of which the last "
                f"{recent_tokens} stay at full detail, got {budget}: raise the budget or keep fewer recent tokens"
            )
        return context.collapse_oldest(budget, recent_tokens)

    # -----------------------------------------------------------------------------------------------------
    # Reading it

    @property
    def num_rows(self) -> int:
        return self.lod_map.size(0)

    @property
    def num_blocks(self) -> int:
        return self.lod_map.size(1)

    def old_blocks(self, recent_tokens) -> int:
        """How many of the first blocks lie wholly before the last recent_tokens tokens, so that they may collapse."""
        return max(0, self.num_tokens - recent_tokens) // self.block_size

    def smallest_length(self, recent_tokens) -> int:
        """Entries of the coarsest possible row that keeps the last recent_tokens tokens at LOD 0."""
        blocks = self.old_blocks(recent_tokens)
        length = self.num_tokens - blocks * self.block_size
        while blocks:  # the largest nodes first: as many of each level as the digits of `blocks` in base K say
            blocks, digit = divmod(blocks, self.block_size)
            length += digit
        return length

    @cached_property
    def _counts(self):
        """Entries that begin in each block, [B, n_blocks]: K at LOD 0; 1 in the first block of a node, else 0."""
        counts = (self.lod_map == 0) * self.block_size
        if self.num_tokens % self.block_size:
            counts[:, -1] = self.num_tokens % self.block_size
        lod, size = 1, 1  # a node of LOD l begins at every size-th block, size = K^(l−1)
        while size * self.block_size <= self.num_tokens:
            counts[:, ::size] += self.lod_map[:, ::size] == lod
            lod, size = lod + 1, size * self.block_size
        return counts

    @cached_property
    def _before(self):
        """Entries before each block, and at last all of them: [B, n_blocks + 1]."""
        return F.pad(self._counts.cumsum(1), (1, 0))

    def lengths(self):
        """Entries of each row, [B]."""
        return self._before[:, -1]

    @cached_property
    def coarsest(self) -> int:
        """The highest level of any block."""
        return int(self.lod_map.max())

    @cached_property
    def entries(self) -> Entries:
        """The entries of all rows, padded at the end to the longest. Found once, then kept."""
        lengths = self.lengths()
        rank = torch.arange(int(lengths.max()), device=lengths.device).repeat(self.num_rows, 1)
        valid = rank < lengths[:, None]
        # Blocks that begin no entry share their count with the next one that does; right=True finds the latter.
        block = (torch.searchsorted(self._before, rank, right=True) - 1).where(valid, 0)
        lod = self.lod_map.gather(1, block).long().where(valid, 0)
        start = (block * self.block_size + rank - self._before.gather(1, block)).where(valid, 0)
        return Entries(lod, start, self.block_size**lod, valid)

    def block_of_entry(self):
        """The (first) block of each entry, [B, W]; 0 for padding."""
        return self.entries.start // self.block_size

    def table_index(self, offsets):
        """Where each entry stands in the tree's table, [B, W]; offsets: the first place of each level there."""
        lod, start, span, _ = self.entries
        return torch.tensor(offsets)[lod] + start // span

    def targets(self, y):
        """
        What each entry is to predict, [B, W], from y [B, N], the token that follows each position (−1: none).

        An entry over [s, e) predicts token e if that token is an entry itself, or is not here yet (e = N). If a
        gist comes next there is no target, −1, as for padding.
        """
        if y.shape != (self.num_rows, self.num_tokens):
            raise ValueError(f"y: expected shape {[self.num_rows, self.num_tokens]}, got {list(y.shape)}")
        lod, start, span, valid = self.entries
        token_next = F.pad(lod[:, 1:] == 0, (0, 1), value=True)  # also after the last entry: padding has LOD 0
        last, predicts = (t.to(y.device, non_blocking=True) for t in (start + span - 1, valid & token_next))
        return y.gather(1, last).where(predicts, -1)

    def per_block(self, values):
        """
        Values [B, W] of entries, on any device, as values [B, n_blocks] of blocks; differentiable.

        A block at LOD 0 gets the mean of its tokens' values, a block inside a node the value of the node.
        """
        first = torch.arange(self.num_blocks).where(self._counts > 0, 0).cummax(1).values  # where the node begins
        needed = self.entries.valid, self.block_of_entry(), self._counts.clamp(min=1), first
        valid, block, counts, first = (t.to(values.device, non_blocking=True) for t in needed)
        sums = values.new_zeros(self.lod_map.shape).scatter_add(1, block, values.where(valid, 0))
        return (sums / counts).gather(1, first)

    def check(self):
        """Raise ValueError unless each block of a LOD l >= 1 lies in an aligned, complete node that is all LOD l."""
        least, most = (int(level) for level in self.lod_map.aminmax())
        if least < 0:
            raise ValueError(f"expected levels of 0 or more, got {least}")
        for lod in range(1, most + 1):
            size = self._blocks_per_node(lod)
            complete = self.num_tokens // (size * self.block_size) * size  # blocks in complete nodes
            here = self.lod_map == lod
            nodes = here[:, :complete].unflatten(1, (complete // size, size))
            for row, node in (nodes.any(2) & ~nodes.all(2)).nonzero()[:1].tolist():
                raise ValueError(
                    f"row {row}: expected LOD {lod} in all of the blocks {node * size} to {node * size + size - 1} "
                    f"or in none, got it in {int(nodes[row, node].sum())} of {size}"
                )
            for row, block in here[:, complete:].nonzero()[:1].tolist():
                raise ValueError(
                    f"row {row}: expected only complete nodes, got LOD {lod} in block {complete + block}, whose node "
                    f"would end after the last of {self.num_tokens} tokens"
                )

    def _blocks_per_node(self, lod) -> int:
        return self.block_size ** max(lod - 1, 0)

    # -----------------------------------------------------------------------------------------------------
    # Changing it

    def apply(self, edits) -> "WorkingContext":
        """The context after the edits, in their order. Raises ValueError for one that would break a node."""
        lod_map = self.lod_map.clone()
        for edit in edits:
            self._check_edit(lod_map, edit)
            lod_map[edit.row, edit.first_block : edit.first_block + edit.num_blocks] = edit.new_lod
        return WorkingContext(lod_map, self.num_tokens, self.block_size)

    def _check_edit(self, lod_map, edit):
        row, first, count, lod = edit
        end, size = first + count, self._blocks_per_node(lod)
        if not (0 <= row < self.num_rows and 0 <= first < end <= self.num_blocks):
            raise ValueError(f"{edit}: expected a row below {self.num_rows} and blocks within {self.num_blocks}")
        if lod < 0 or first % size or count % size or (lod > 0 and end * self.block_size > self.num_tokens):
            raise ValueError(f"{edit}: expected whole, complete nodes of LOD {lod}, {size} aligned blocks each")
        for edge in {first, end} - {self.num_blocks}:
            old = int(lod_map[row, edge])
            if edge % self._blocks_per_node(old):
                raise ValueError(
                    f"{edit}: expected to begin and end between entries, got block {edge} inside LOD {old}"
                )

    def collapse_oldest(self, budget, recent_tokens, first_block=0) -> "WorkingContext":
        """
        The context with its oldest nodes collapsed, finest level first and no more than it takes for `budget` entries
        a row: from first_block on, but not the last recent_tokens tokens. Larger than the budget if that is too little.
        """
        lod_map, saved = self.lod_map.clone(), self.block_size - 1  # entries saved by making any one node of K children
        excess = (self.lengths() - budget).clamp(min=0)[:, None]  # [B, 1]
        lod, size = 1, 1
        while nodes := self.old_blocks(recent_tokens) // size:
            runs = lod_map[:, : nodes * size].unflatten(1, (nodes, size))  # a view
            ready = (runs == lod - 1).all(2)
            ready[:, : -(-first_block // size)] = False
            taken = ready & (ready.cumsum(1) <= -(-excess // saved))
            runs.masked_fill_(taken[..., None], lod)
            excess = (excess - saved * taken.sum(1, keepdim=True)).clamp(min=0)
            lod, size = lod + 1, size * self.block_size
        return WorkingContext(lod_map, self.num_tokens, self.block_size)

    def truncate(self, num_tokens) -> "WorkingContext":
        """The context of the first num_tokens tokens: nodes that reach beyond become the coarsest that do not."""
        lod_map = self.lod_map[:, : -(-num_tokens // self.block_size)].clone()
        for lod in range(self.coarsest, 0, -1):
            cut = lod_map[:, num_tokens // self.block_size**lod * self._blocks_per_node(lod) :]
            cut.masked_fill_(cut == lod, lod - 1)
        return WorkingContext(lod_map, num_tokens, self.block_size)

    def append(self, n) -> "WorkingContext":
        """The context after n more tokens, at LOD 0."""
        num_tokens = self.num_tokens + n
        new_blocks = -(-num_tokens // self.block_size) - self.num_blocks
        return WorkingContext(F.pad(self.lod_map, (0, new_blocks)), num_tokens, self.block_size)

    def select(self, rows) -> "WorkingContext":
        """The context of some of the rows: a slice, a list or an index tensor."""
        return WorkingContext(self.lod_map[rows], self.num_tokens, self.block_size)

    def first_difference(self, other):
        """
        Where two contexts of one stream part ways: (entries, tokens), each [B].

        The first `entries` entries of both are the same and cover the first `tokens` tokens, so keys and values
        computed for them under one context hold under the other. The number of tokens may differ.
        """
        if (self.num_rows, self.block_size) != (other.num_rows, other.block_size):
            raise ValueError(
                f"expected contexts of equal rows and block_size, got {self.num_rows} rows of blocks of "
                f"{self.block_size} and {other.num_rows} of {other.block_size}"
            )
        shorter = min(self, other, key=lambda context: context.num_tokens)
        n = shorter.num_blocks
        differs = F.pad(self.lod_map[:, :n] != other.lod_map[:, :n], (0, 1), value=True)
        block = differs.byte().argmax(1)  # the first one; rows part only between nodes, since nodes are aligned
        entries = shorter._before.gather(1, block[:, None])[:, 0]
        return entries, (block * self.block_size).clamp(max=shorter.num_tokens)
