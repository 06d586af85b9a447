"""
The tree: a stream of tokens at every level of detail (LOD), each level a summary of the one below.

Shapes: B rows, N tokens, K = block_size, D = n_embd, W entries of a working context.

Level 0 is the tokens. Node i of level l >= 1 is the gist of nodes K·i … K·i + K − 1 of level l − 1 and so covers
the tokens [i·K^l, (i+1)·K^l); it exists once all of them are there. Both forms compute one level at a time with
gist_fn(children [M, K, D], level) -> [M, D]. The result may be wider than D: the further channels are stored and passed
on with the gist; the model reads the first `deep` of them, which are 0 for tokens. A MegaContextTree passes level-0
children together with the tokens before them, see `before`.

sink: for models not trained with a gist in the first position, to which tokens attend whatever it holds (an attention
sink, arXiv 2309.17453). With it the first token is read in place of the first node of any level.

- `build_table`, for training: a whole batch at once, with gradients; a value.
- `MegaContextTree`, for inference: grows by any number of tokens, in a store that may be large.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

GIST_DTYPE = torch.bfloat16  # of sessions' stores, so that gists are equal in memory and on disk
INGEST_TOKENS = 16384  # per row; longer appends are split into pieces of this size, to bound their memory


def _gists(gist_fn, children, block_size, level):
    """The parents [B, m, D] of children [B, m·K, D] of level − 1, in the children's precision."""
    blocks = children.unflatten(1, (-1, block_size)).flatten(0, 1)
    return gist_fn(blocks, level).unflatten(0, (children.size(0), -1)).to(children.dtype)


def before(block_size) -> int:
    """Number of preceding tokens that a MegaContextTree passes to gist_fn with each block."""
    return block_size // 2


def tokens_of_blocks(first, end, block_size):
    """
    Positions [n, before + K] of the tokens of blocks first … end − 1, preceded by the tokens before each. The very
    first block has none: it gets every second of its own tokens instead, which adds no information.
    """
    K = block_size
    positions = torch.arange(first, end)[:, None] * K + torch.arange(-before(K), K)
    return torch.where(positions < 0, 2 * (positions + before(K)) + 1, positions)


class Table(NamedTuple):
    """All levels of a batch side by side: values [B, M, D + deep], where level l begins at offsets[l]."""

    values: torch.Tensor
    offsets: tuple[int, ...]

    def level(self, level):
        """The nodes of a level, [B, n, D]."""
        start, *end = *self.offsets[level : level + 2], self.values.size(1)
        return self.values[:, start : end[0]]

    def materialize(self, context):
        """
        Embeddings [R, W, D] of a working context's entries, in one gather; padding gets the first token's.

        The context may have several variants per row: its row r belongs to row r // (R / B) of this table.
        """
        B, M, _ = self.values.shape
        variants, rest = divmod(context.num_rows, B)
        if rest:
            raise ValueError(f"expected a multiple of {B} rows, got {context.num_rows}")
        row = torch.arange(context.num_rows)[:, None] // variants
        index = row * M + context.table_index(self.offsets)
        return F.embedding(index.to(self.values.device, non_blocking=True), self.values.flatten(0, 1))


def build_table(gist_fn, embeds, block_size, sink=False) -> Table:
    """The tree over embeddings [B, N, D] as a table, with gradients to the embeddings and the gist function."""
    levels, offsets = [embeds], [0]
    while whole := levels[-1].size(1) // block_size * block_size:
        offsets.append(offsets[-1] + levels[-1].size(1))
        levels.append(_gists(gist_fn, levels[-1][:, :whole], block_size, len(levels)))
    levels[0] = F.pad(embeds, (0, levels[-1].size(-1) - embeds.size(-1)))
    if sink:
        levels[1:] = [torch.cat((levels[0][:, :1], level[:, 1:]), dim=1) for level in levels[1:]]
    return Table(torch.cat(levels, dim=1), tuple(offsets))


class Store(Protocol):
    """Storage of a tree's nodes: for each level, values [B, count, …] that grow at the end."""

    device: torch.device

    def append(self, level: int, values: torch.Tensor) -> None: ...

    def get(self, level: int, index: torch.Tensor) -> torch.Tensor:
        """Values [B, n, …] at index [B, n]."""

    def count(self, level: int) -> int:
        """Values per row of this level; 0 for a level that was never appended to."""

    def truncate(self, level: int, count: int) -> None:
        """Forget all values of the level but the first `count`."""

    def settle(self) -> None:
        """Called after an append: the store may now move values to disk."""

    def close(self) -> None:
        """Close files; no call may follow."""


class RamStore:
    """A tensor per level, on the device of the appended values; its capacity doubles when it is full."""

    def __init__(self, dtype: torch.dtype | None = None):
        """dtype: precision of stored gists, None for that of the appended values; token ids stay integers."""
        self.dtype = dtype
        self._buffers, self._counts = [], []

    @property
    def device(self):
        return self._buffers[0].device

    def append(self, level, values):
        if level == len(self._buffers):
            self._buffers.append(values[:, :0])
            self._counts.append(0)
        start, end = self._counts[level], self._counts[level] + values.size(1)
        if end > self._buffers[level].size(1):
            self._grow(level, values, max(end, 2 * start))
        self._buffers[level][:, start:end] = values
        self._counts[level] = end

    def _grow(self, level, values, capacity):
        dtype = self.dtype if self.dtype and values.is_floating_point() else values.dtype
        shape = values.size(0), capacity, *values.shape[2:]
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
            bigger = torch.empty(shape, dtype=dtype, device=values.device)
        count = self._counts[level]
        bigger[:, :count] = self._buffers[level][:, :count]
        self._buffers[level] = bigger

    def get(self, level, index):
        buffer = self._buffers[level]
        return buffer[torch.arange(buffer.size(0), device=buffer.device)[:, None], index]

    def count(self, level):
        return self._counts[level] if level < len(self._counts) else 0

    def all(self, level):
        """All values of a level, [B, count, …]: a view."""
        return self._buffers[level][:, : self._counts[level]]

    def truncate(self, level, count):
        if level < len(self._counts):
            self._counts[level] = count

    def settle(self):
        pass

    def close(self):
        pass

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.nbytes for buffer in self._buffers)


class MegaContextTree:
    """
    An append-only tree over B rows of equal length.

    The store holds tokens as they are appended, such as ids [B, N]; embed_fn converts those that are read to embeddings
    [B, n, D]. Nodes never change, so the number of tokens identifies a state, to which `truncate(num_tokens)` returns.
    """

    def __init__(self, gist_fn, block_size: int, store: Store, embed_fn=lambda tokens: tokens, sink=False, deep=0):
        self.gist_fn, self.block_size, self.store, self.embed_fn = gist_fn, block_size, store, embed_fn
        self.sink, self.deep = sink, deep

    @property
    def num_tokens(self) -> int:
        return self.store.count(0)

    @torch.no_grad()
    def append(self, tokens):
        """Add tokens [B, n] to every row, and the nodes that they complete."""
        for piece in tokens.split(INGEST_TOKENS, dim=1):
            self.store.append(0, piece)
            for _ in self.complete(tokens.size(0)):
                pass

    def complete(self, rows=1):
        """Add the missing nodes of all `rows` rows; a generator that yields after each piece of INGEST_TOKENS."""
        more = True
        while more:
            more = self._complete_piece(rows)
            yield

    @torch.no_grad()
    def _complete_piece(self, rows) -> bool:
        """Add one piece of the missing nodes, without gradients; returns whether more are missing."""
        most, K, level, cut = INGEST_TOKENS // self.block_size + 1, self.block_size, 1, False
        while (done := self.store.count(level)) < (ready := self.store.count(level - 1) // K):
            ready, cut = min(ready, done + most), cut or ready > done + most
            index = tokens_of_blocks(done, ready, K) if level == 1 else torch.arange(done * K, ready * K).view(-1, K)
            children = self._get(level - 1, index.flatten().to(self.store.device).expand(rows, -1))
            self.store.append(level, _gists(self.gist_fn, children, index.size(1), level))
            level += 1
        self.store.settle()
        return cut

    def _get(self, level, index):
        values = self.store.get(level, index)
        return self.embed_fn(values) if level == 0 else values

    def newest(self, count):
        """Embeddings [B, n, D] of the newest `count` tokens, or of all if there are fewer."""
        index = torch.arange(max(0, self.num_tokens - count), self.num_tokens, device=self.store.device)
        return self._get(0, index[None])

    @torch.no_grad()
    def materialize(self, context, at=None):
        """Inputs [B, W, D + deep] of a context's entries, or of those at index `at` [B, n]; arbitrary for padding."""
        if context.num_tokens > self.num_tokens:
            raise ValueError(f"expected a context of at most {self.num_tokens} tokens, got {context.num_tokens}")
        lod, start, span, _ = context.entries.at(at).to(self.store.device)
        index = start // span
        if self.sink:
            lod = lod.where(start > 0, 0)
        x = F.pad(self._get(0, index.where(lod == 0, 0)), (0, self.deep))
        level = 1
        while level <= context.coarsest:
            here = lod == level
            values = self._get(level, index.where(here, 0))[..., : x.size(-1)].to(x.dtype)
            x = values.where(here[..., None], x)
            level += 1
        return x

    def truncate(self, num_tokens: int):
        """Forget all tokens but the first num_tokens, and the nodes that need the others."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"num_tokens: expected 0 to {self.num_tokens}, got {num_tokens}")
        level = 0
        while self.store.count(level):
            self.store.truncate(level, num_tokens // self.block_size**level)
            level += 1
