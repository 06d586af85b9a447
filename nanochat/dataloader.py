"""
Batches of tokens for pretraining, from the parquet shards of nanochat.dataset.

The row groups of a split are numbered over all of its files, and rank r takes r, r + world_size, … of them.
It reads them as one endless stream of tokens, with BOS before each document, from the start again after the
last; on request, the text of a row group is cut into pieces that are shuffled. The stream is cut into batches of
B·T + 1 tokens, the last of one being the first of the next: so every token is predicted once an epoch, nothing is
padded and nothing left out.
"""

import itertools
import os
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nanochat.common import UserError, get_dist_info
from nanochat.dataset import list_row_groups, read_row_group


class TokenLoader:
    """
    Endless iterator of (x, y), each int64 [B, T] on `device`, where y is x one token later.

    A thread reads, tokenizes and assembles up to `prefetch` batches ahead per stream; `next` raises its exceptions.
    Usable as a context manager; `close()` ends the thread.

    tokenizer: has get_bos_token_id() and encode_to_numpy(texts, num_threads) -> list of uint32 arrays.
    split: "train" or "val". ranks: the streams that take turns to give a batch, of world_size in all; by default one,
    that of this process. piece: if it is above 0, the text of a row group is cut into pieces of that many tokens,
    which come in random order, so that what is read does not stay with one document. state: a `state_dict()` of the
    same ranks, to go on from there.

    fresh [B], bool: whether a document or piece begins in each row of the last batch, so that the text before it is
    unrelated.
    Raises UserError for missing or broken shards, fewer row groups than ranks, a state that does not fit.
    """

    def __init__(
        self,
        tokenizer,
        B: int,
        T: int,
        split: str,
        device="cpu",
        state: list[dict] | None = None,
        data_dir=None,
        tokenizer_threads: int = 4,
        ranks=None,
        world_size: int | None = None,
        prefetch: int = 4,
        piece: int = 0,
    ):
        _, env_rank, _, env_world_size = get_dist_info()
        self.ranks = [env_rank] if ranks is None else list(ranks)
        self.world_size = env_world_size if world_size is None else world_size
        self.device = torch.device(device)
        row_groups = list_row_groups(split, data_dir, self.world_size)
        threads = min(tokenizer_threads, os.cpu_count() or 1)  # more only wait for each other
        self._positions = [(0, rank, 0) for rank in self.ranks]
        if state:
            self._positions = [self._checked(*pair, len(row_groups)) for pair in zip(state, self.ranks, strict=True)]
        pin_memory, self._next = self.device.type == "cuda", 0
        streams = [
            _batches(_token_stream(tokenizer, threads, row_groups, self.world_size, at, piece), B, T, pin_memory)
            for at in self._positions
        ]
        self._error = self.fresh = None
        # The thread must not hold the loader, so that an abandoned loader is collected and the thread ends.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"TokenLoader-{split}")
        self._batches = map(next, itertools.cycle(streams))
        self._ahead = deque(self._thread.submit(next, self._batches) for _ in range(prefetch * len(streams)))
        self._finalizer = weakref.finalize(self, self._thread.shutdown, wait=False, cancel_futures=True)

    def _checked(self, state, rank, num_row_groups):
        took, takes = (state["rank"], state["world_size"]), (rank, self.world_size)
        if took != takes:
            raise UserError(
                f"the loader state is of rank {took[0]} of {took[1]}, this is rank {takes[0]} of {takes[1]}: "
                "resume with as many processes as before"
            )
        if state["row_group"] >= num_row_groups:
            raise UserError(
                f"the loader state points at row group {state['row_group']} of {num_row_groups}: "
                "restore the shards the run was started with"
            )
        return state["epoch"], state["row_group"], state["token"]

    def state_dict(self) -> list[dict]:
        """
        The position in each stream after the last batch that was returned: small, JSON-able. Call it when all streams
        have given equally many batches, since a loader resumed from it begins with the first stream.
        """
        return [
            {"epoch": epoch, "row_group": row_group, "token": token, "rank": rank, "world_size": self.world_size}
            for rank, (epoch, row_group, token) in zip(self.ranks, self._positions, strict=True)
        ]

    def __iter__(self):
        return self

    def __next__(self):
        if self._error is not None:
            raise self._error
        if not self._finalizer.alive:
            raise ValueError("the loader is closed")
        self._ahead.append(self._thread.submit(next, self._batches))
        try:
            batch, position, self.fresh = self._ahead.popleft().result()
        except Exception as error:
            self._error = error
            self.close()
            raise
        self._positions[self._next] = position
        self._next = (self._next + 1) % len(self.ranks)
        x, y = batch.to(self.device, non_blocking=True)
        return x, y

    def close(self):
        """End the thread and wait for it; happens by itself when the loader is dropped and at exit."""
        self._finalizer()
        self._thread.shutdown()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _token_stream(tokenizer, threads, row_groups, world_size, position, piece):
    """
    Yield (epoch, row group, tokens uint32 [N], index of the first to use, indices of first tokens of documents and
    pieces) from `position` on, for ever.
    """
    bos = np.array([tokenizer.get_bos_token_id()], dtype=np.uint32)
    epoch, first, token = position
    rank = first % world_size
    while True:
        found = 0
        for number in range(first, len(row_groups), world_size):
            documents = tokenizer.encode_to_numpy(read_row_group(*row_groups[number]), threads)
            if not documents:
                continue
            tokens = np.concatenate([part for document in documents for part in (bos, document)])
            pieces = [tokens]
            if piece > 0:
                order = np.random.default_rng((epoch, number)).permutation(range(0, len(tokens), piece))
                pieces = [tokens[start : start + piece] for start in order]
                tokens = np.concatenate(pieces)
            begins = np.union1d(np.cumsum([0, *map(len, pieces)])[:-1], np.flatnonzero(tokens == bos))
            if token >= len(tokens):
                raise UserError(
                    f"the loader state points at token {token} of a row group that has {len(tokens)}: "
                    "restore the shards and the tokenizer that the run was started with"
                )
            yield epoch, number, tokens, token, begins
            found, token = found + len(tokens), 0
        if not found and first == rank:
            raise UserError(f"no text in row groups {rank}, {rank + world_size}, …: make the shards again")
        epoch, first = epoch + 1, rank


def _batches(stream, B, T, pin_memory):
    """Yield (int64 [2, B, T] holding x and y, position of its last token, where the next begins, fresh rows [B])."""
    size, rows, cuts = B * T, T * np.arange(B)[:, None], np.empty(0, dtype=np.int64)  # where texts begin in the window
    window, filled = torch.empty(size + 1, dtype=torch.int64), 0
    view = window.numpy()
    for epoch, number, tokens, start, begins in stream:
        while start < len(tokens):
            count = min(size + 1 - filled, len(tokens) - start)
            here = begins[(begins >= start) & (begins < start + count)]
            cuts = np.concatenate((cuts, here - start + filled))
            view[filled : filled + count] = tokens[start : start + count]
            filled, start = filled + count, start + count
            if filled == size + 1:
                batch = torch.empty(2, B, T, dtype=torch.int64, pin_memory=pin_memory)
                batch[0] = window[:-1].view(B, T)
                batch[1] = window[1:].view(B, T)
                yield batch, (epoch, number, start - 1), ((cuts >= rows) & (cuts < rows + T)).any(1)
                view[0], filled, cuts = view[size], 1, cuts[cuts == size] - size
