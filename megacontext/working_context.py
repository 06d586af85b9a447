"""
The working context: the tokens so far, tiled in order by nodes of the tree at mixed levels of detail (LOD).

Shapes: B rows, N tokens so far, K = block_size, n_blocks = ceil(N / K), W entries and P tiles (of the longest row).

Node i of LOD l covers the tokens [i·K^l, (i+1)·K^l); LOD 0 is the tokens themselves. A row is held as the levels of its
*tiles*, from the oldest to the newest: a tile of LOD l >= 1 is one node, a tile of LOD 0 is a block of K tokens; the
last block may be incomplete. The start of a tile follows from the tiles before it, so gaps and overlaps cannot be
represented. P <= W, and everything costs O(W) for any length of stream, except `lod_map`.

Its tensors stay on the CPU, where edits are planned, so that planning never waits for a GPU. Methods that take a tensor
return one on its device.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from nanochat.common import UserError

LEVELS = 64  # exceeds any level of detail


class Entries(NamedTuple):
    """What the model attends to, in order: each [B, W], int64 except `valid`. Padding is (0, 0, 1, False)."""

    lod: torch.Tensor
    start: torch.Tensor  # first token
    span: torch.Tensor  # tokens covered: K^lod
    valid: torch.Tensor  # bool; False for the padding at the end of shorter rows

    def to(self, device) -> "Entries":
        return Entries(*(t.to(device, non_blocking=True) for t in self))

    def at(self, places) -> "Entries":
        """Those at places [B, n]; all of them for None."""
        return self if places is None else Entries(*(t.gather(1, places) for t in self))


def damping(gists, limit):
    """
    The bias on the attention scores of each gist, given the number of gists, a tensor: 0 up to `limit` gists, above it
    −2·ln(gists / limit), so that n times as many gists together get 1/n of the attention: in so long a context the
    wanted blocks are open, and the gists distract. limit: 0 for no bias.
    """
    return -2 * (gists / limit).clamp(min=1).log() if limit else torch.zeros(gists.shape)


class Edit(NamedTuple):
    """Give num_blocks blocks of a row, from first_block on, the level new_lod: finer expands, coarser collapses."""

    row: int
    first_block: int
    num_blocks: int
    new_lod: int


@dataclass(frozen=True, eq=False)
class WorkingContext:
    """
    An immutable value: changes return a new one.

    tiles [B, P] int8, on the CPU, not to be written to: the level of each tile, −1 for the padding at the end of
    shorter rows. Raises ValueError for tiles of the wrong shape or type; `check` also validates their values.
    """

    tiles: torch.Tensor
    num_tokens: int
    block_size: int

    def __post_init__(self):
        if self.num_tokens < 1 or self.block_size < 2:
            raise ValueError(
                f"expected at least 1 token and a block_size of at least 2, got {self.num_tokens} and {self.block_size}"
            )
        if self.tiles.dtype != torch.int8 or self.tiles.dim() != 2:
            raise ValueError(f"tiles: expected int8 [B, P], got {self.tiles.dtype} {list(self.tiles.shape)}")

    # -----------------------------------------------------------------------------------------------------
    # Making one

    @classmethod
    def finest(cls, rows, num_tokens, block_size):
        """Every token at LOD 0."""
        return cls(torch.zeros(rows, -(-num_tokens // block_size), dtype=torch.int8), num_tokens, block_size)

    @classmethod
    def initial(cls, num_tokens, block_size, budget, recent_tokens, rows=1):
        """
        The first context of a session: at most `budget` entries per row, as fine as possible, oldest tokens coarsest.

        The oldest blocks become LOD 1, as few as necessary; if all are not enough, the oldest of those become LOD 2,
        and so on. The last recent_tokens tokens stay LOD 0. Raises UserError if no such context fits.
        """
        K, old = block_size, old_blocks(num_tokens, block_size, recent_tokens)
        smallest = smallest_length(num_tokens, block_size, recent_tokens)
        if budget < smallest:
            raise UserError(
                f"expected a budget of at least {smallest} entries for {num_tokens} tokens with the last "
                f"{recent_tokens} at full detail, got {budget}: raise the budget or keep fewer recent tokens"
            )
        counts, excess = [-(-num_tokens // K)], num_tokens - budget  # tiles of each level
        while excess > 0:
            level = len(counts)
            nodes = min(old // K ** (level - 1), -(-excess // (K - 1)))
            counts[-1] -= nodes * (K if level > 1 else 1)
            counts.append(nodes)
            excess -= nodes * (K - 1)
        levels = torch.arange(len(counts), dtype=torch.int8).repeat_interleave(torch.tensor(counts)).flip(0)
        return cls(levels.repeat(rows, 1), num_tokens, K)

    @classmethod
    def from_map(cls, lod_map, num_tokens, block_size):
        """
        The context that has this `lod_map`: the level of the tile that each block lies in, [B, n_blocks] int8.
        """
        n_blocks = -(-num_tokens // block_size)
        if lod_map.dtype != torch.int8 or lod_map.dim() != 2 or lod_map.size(1) != n_blocks:
            raise ValueError(
                f"lod_map: expected int8 [B, {n_blocks}] for {num_tokens} tokens in blocks of {block_size}, "
                f"got {lod_map.dtype} {list(lod_map.shape)}"
            )
        begins = torch.arange(n_blocks) % block_size ** (lod_map.long() - 1).clamp(min=0) == 0
        return cls(_compact(lod_map, begins), num_tokens, block_size)

    # -----------------------------------------------------------------------------------------------------
    # Reading it

    @property
    def num_rows(self) -> int:
        return self.tiles.size(0)

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_size)

    def old_blocks(self, recent_tokens) -> int:
        """See the function of this name."""
        return old_blocks(self.num_tokens, self.block_size, recent_tokens)

    @cached_property
    def tile_blocks(self):
        """Blocks that each tile covers, [B, P]: K^(l−1), 1 at LOD 0; 0 for padding."""
        return (self.block_size ** (self.tiles.long() - 1).clamp(min=0)).where(self.tiles >= 0, 0)

    def blocks_of(self, first, end):
        """How many of the blocks `first` … `end` − 1 each tile covers, [B, P]."""
        return (self.first_blocks + self.tile_blocks).clamp(first, end) - self.first_blocks.clamp(first, end)

    @cached_property
    def first_blocks(self):
        """The first block of each tile, [B, P]; n_blocks for padding."""
        return self.tile_blocks.cumsum(1) - self.tile_blocks

    @cached_property
    def _counts(self):
        """Entries of each tile, [B, P]: as many as it has tokens at LOD 0, else 1; 0 for padding."""
        tokens = (self.num_tokens - self.first_blocks * self.block_size).clamp(max=self.block_size)
        return tokens.where(self.tiles == 0, self.tiles > 0)

    @cached_property
    def _before(self):
        """Number of entries before each tile, and the total: [B, P + 1]."""
        return F.pad(self._counts.cumsum(1), (1, 0))

    def lengths(self):
        """Entries of each row, [B]."""
        return self._before[:, -1]

    @cached_property
    def coarsest(self) -> int:
        """The highest level of any tile."""
        return int(self.tiles.max())

    @cached_property
    def _tile_of_entry(self):
        """The tile that each entry lies in, [B, W]; the first for padding."""
        lengths = self.lengths()
        rank = torch.arange(int(lengths.max())).repeat(self.num_rows, 1)
        return (torch.searchsorted(self._before, rank, right=True) - 1).where(rank < lengths[:, None], 0)

    @cached_property
    def entries(self) -> Entries:
        """The entries of all rows, padded at the end to the longest row. Computed once."""
        tile = self._tile_of_entry
        rank = torch.arange(tile.size(1))
        valid = rank < self.lengths()[:, None]
        lod = self.tiles.gather(1, tile).long().where(valid, 0)
        first = self.first_blocks.gather(1, tile) * self.block_size
        start = (first + rank - self._before.gather(1, tile)).where(valid, 0)
        return Entries(lod, start, self.block_size**lod, valid)

    @cached_property
    def codes(self):
        """A unique number per entry of a one-row context, ascending, [W]: LEVELS · (first token) + level."""
        lod, start, _, _ = self.entries
        return (LEVELS * start + lod)[0]

    @property
    def lod_map(self):
        """The level of the tile that each block lies in, [B, n_blocks] int8. O(N / K), so for short streams."""
        blocks = torch.arange(self.num_blocks).repeat(self.num_rows, 1)
        return self.tiles.gather(1, self.tile_of(blocks))

    def tile_of(self, blocks):
        """The tile that each of the blocks [B, n] lies in, [B, n]."""
        return torch.searchsorted(self.first_blocks, blocks, right=True) - 1

    def table_index(self, offsets):
        """Index of each entry in the tree's table, [B, W]; offsets: the first index of each level."""
        lod, start, span, _ = self.entries
        return torch.tensor(offsets)[lod] + start // span

    def targets(self, y):
        """
        The target of each entry, [B, W], from y [B, N], the token that follows each position (−1: none).

        An entry over [s, e) predicts token e if that token is an entry itself or the next to come (e = N). Before a
        gist, and for padding, there is no target: −1.
        """
        if y.shape != (self.num_rows, self.num_tokens):
            raise ValueError(f"y: expected shape {[self.num_rows, self.num_tokens]}, got {list(y.shape)}")
        lod, start, span, valid = self.entries
        token_next = F.pad(lod[:, 1:] == 0, (0, 1), value=True)  # also after the last entry: padding has LOD 0
        last, predicts = (t.to(y.device, non_blocking=True) for t in (start + span - 1, valid & token_next))
        return y.gather(1, last).where(predicts, -1)

    def check(self):
        """Raise ValueError unless the tiles of each row are complete, aligned nodes and blocks of all N tokens."""
        first, blocks, end = self.first_blocks, self.tile_blocks, self.num_blocks
        complete = (self.tiles <= 0) | ((first + blocks) * self.block_size <= self.num_tokens)
        fine = complete & (first % blocks.clamp(min=1) == 0) & ((self.tiles >= 0) == (first < end)) & (self.tiles >= -1)
        for row, good in enumerate((fine.all(1) & (blocks.sum(1) == end)).tolist()):
            if not good:
                got = f"got levels {str(self.tiles[row].tolist())[:200]} for {self.num_tokens} tokens"
                raise ValueError(f"row {row}: expected aligned, complete nodes that cover all tokens, {got}")

    def siblings(self, lod, recent_tokens=0):
        """
        Bool [B, P]: True at the first tile of each group that may collapse into one node: K nodes of level lod with one
        parent, or for lod 0 a block of tokens. The last recent_tokens tokens may not.
        """
        K, n, first = self.block_size, self.group(lod), self.first_blocks
        here = F.pad(self.tiles == lod, (0, n - 1)).unfold(1, n, 1).all(2)
        return here & (first % K**lod == 0) & (first + K**lod <= self.old_blocks(recent_tokens))

    def group(self, lod) -> int:
        """Tiles of level lod that collapse into one."""
        return self.block_size if lod else 1

    # -----------------------------------------------------------------------------------------------------
    # Changing it

    def apply(self, edits) -> "WorkingContext":
        """The context after these edits, in order. Raises ValueError for an edit that would split a node."""
        K, rows = self.block_size, {}
        for edit in edits:
            row, first, count, lod = edit
            end, size = first + count, K ** max(lod - 1, 0)
            if not (0 <= row < self.num_rows and 0 <= first < end <= self.num_blocks):
                raise ValueError(f"{edit}: expected a row below {self.num_rows} and blocks within {self.num_blocks}")
            if lod < 0 or first % size or count % size or (lod > 0 and end * K > self.num_tokens):
                raise ValueError(f"{edit}: expected whole, complete nodes of LOD {lod}, {size} aligned blocks each")
            if row not in rows:
                rows[row] = self.tiles[row].tolist(), self.first_blocks[row].tolist()
            lods, firsts = rows[row]
            i, j = bisect_left(firsts, first), bisect_left(firsts, end)
            for edge, tile in ((first, i), (end, j)):
                if edge < self.num_blocks and firsts[tile : tile + 1] != [edge]:
                    inside = f"block {edge} inside LOD {lods[tile - 1]}"
                    raise ValueError(f"{edit}: expected to begin and end between entries, got {inside}")
            lods[i:j], firsts[i:j] = [lod] * (count // size), range(first, end, size)
        tiles = [torch.tensor(rows[i][0], dtype=torch.int8) if i in rows else row for i, row in enumerate(self.tiles)]
        return self._with(tiles)

    def collapse_oldest(self, budget, recent_tokens, first_block=0) -> "WorkingContext":
        """
        The context with its oldest groups collapsed, finest level first, until each row has at most `budget` entries.
        Only groups from first_block on and before the last recent_tokens tokens collapse; if they do not suffice, the
        result exceeds the budget.
        """
        context, lod = self, 0
        while self.block_size**lod <= self.old_blocks(recent_tokens):  # blocks of a parent
            ready = context.siblings(lod, recent_tokens) & (context.first_blocks >= first_block)
            excess = (context.lengths() - budget).clamp(min=0)[:, None]
            taken = ready & (ready.cumsum(1) <= -(-excess // (self.block_size - 1)))
            in_one = F.pad(taken, (self.group(lod) - 1, 0)).unfold(1, self.group(lod), 1).any(2)
            lod += 1
            context = self._with(_compact(context.tiles.masked_fill(taken, lod), taken | ~in_one))
        return context

    def truncate(self, num_tokens) -> "WorkingContext":
        """The context of the first num_tokens tokens: a node that reaches beyond is expanded as far as necessary."""
        context, K = self, self.block_size
        for lod in range(self.coarsest, 0, -1):
            first, blocks = context.first_blocks, context.tile_blocks
            cut = (context.tiles == lod) & (first * K < num_tokens) & ((first + blocks) * K > num_tokens)
            context = context.apply(Edit(at[0], int(first[at]), int(blocks[at]), lod - 1) for at in _places(cut))
        return self._with(_compact(context.tiles, context.first_blocks * K < num_tokens), num_tokens)

    def append(self, n) -> "WorkingContext":
        """The context after n more tokens, at LOD 0."""
        new = -(-(self.num_tokens + n) // self.block_size) - self.num_blocks
        tiles, used = F.pad(self.tiles, (0, new), value=-1), (self.tiles >= 0).sum(1, keepdim=True)
        place = torch.arange(tiles.size(1))
        return self._with(tiles.masked_fill((used <= place) & (place < used + new), 0), self.num_tokens + n)

    def select(self, rows) -> "WorkingContext":
        """The context of some of the rows: a slice, a list or an index tensor."""
        return self._with(self.tiles[rows])

    def _with(self, tiles, num_tokens=None) -> "WorkingContext":
        """This context with other tiles [B, P], or a row [P] each."""
        tiles = _padded(list(tiles))
        longest = int((tiles >= 0).sum(1).max())
        return WorkingContext(tiles[:, :longest], num_tokens or self.num_tokens, self.block_size)


def old_blocks(num_tokens, block_size, recent_tokens) -> int:
    """Number of blocks that lie entirely before the last recent_tokens tokens and so may collapse."""
    return max(0, num_tokens - recent_tokens) // block_size


def smallest_length(num_tokens, block_size, recent_tokens) -> int:
    """Entries of the coarsest possible row that keeps the last recent_tokens tokens at LOD 0."""
    blocks = old_blocks(num_tokens, block_size, recent_tokens)
    length = num_tokens - blocks * block_size
    while blocks:  # the largest nodes first: as many of each level as the digits of `blocks` in base K say
        blocks, digit = divmod(blocks, block_size)
        length += digit
    return length


def _places(mask):
    """(row, column) of each True."""
    return map(tuple, mask.nonzero().tolist())


def _padded(rows):
    """Rows of tiles [P], of different P, as one tensor."""
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def _compact(values, keep):
    """The values [B, n] where `keep` is True, in order, each row padded at its end with −1."""
    order = keep.byte().argsort(dim=1, descending=True, stable=True)[:, : int(keep.sum(1).max())]
    return values.masked_fill(~keep, -1).gather(1, order)
