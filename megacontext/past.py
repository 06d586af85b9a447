"""
Training behind a past: a sequence is read after gists of the text that its stream had before it.

A stream is longer at inference than any sequence of a training: most of it stands far away, at high levels. So a
compressed sequence is read behind a past of up to many times its T tokens. It costs no more for being long: each gist
is made once, in the step that reads its tokens, and kept as it then was, without a gradient; a variant reads a few of
them. They are older than the weights by at most as many steps as a past has sequences.

A stream's past begins anew where another document begins, or the loader says that other text does: behind gists of
other documents a model learns to look at none, and then does not read what is open beside them either. It does so by
chance once in most + T tokens, too, so that all lengths occur at any time, and at the latest when it would have more
than `most` tokens. Until then it keeps its beginning, so that its nodes stand where a session's would. Memory per
stream: most + T token ids, and a vector of D for each K − 1 of them, K = block_size.

Shapes: B sequences of T tokens, a multiple of K; R rows of variants; W entries, P of a past; D = n_embd.
"""

from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from megacontext.tree import MegaContextTree, RamStore
from megacontext.variants import random_past
from megacontext.working_context import Entries


class Before(NamedTuple):
    """The first num_tokens tokens of a stream's tree: what came before a sequence."""

    tree: MegaContextTree
    num_tokens: int


class Pasts:
    """
    The trees of the streams, by their numbers. reader: makes gists; most: tokens of a past, at most.

    A keeper for MicroBatches: `save` and `load` let a resumed training go on with the same gists, bit for bit.
    """

    def __init__(self, reader, most: int):
        self.reader, self.most, self.trees = reader, most, {}

    def _new(self, stream):
        reader = self.reader
        kinds = reader.gist, reader.config.block_size, RamStore(), reader.embed, reader.model.sink, reader.deep
        tree = MegaContextTree(*kinds)
        self.trees[stream] = tree
        return tree

    @torch.no_grad()
    def extend(self, origins, ids, gists, generator=None) -> list[Before]:
        """
        Add sequences to their streams; returns what came before each.

        origins [B, 2]: see MicroBatches; those of a stream in their order. ids [B, T]: the tokens. gists [B, T / K, D]
        of level 1. generator: of chance, on the CPU.
        """
        T = ids.size(1)
        anew = torch.rand(len(ids), generator=generator) < T / (self.most + T)
        before = []
        for (stream, fresh), chance, row, of_row in zip(origins.tolist(), anew.tolist(), ids.int(), gists, strict=True):
            tree = self.trees.get(stream)
            if tree is None or fresh or chance or tree.num_tokens > self.most:
                tree = self._new(stream)
            before.append(Before(tree, tree.num_tokens))
            tree.store.append(0, row[None])
            tree.store.append(1, of_row[None])
        self._complete([*{id(tree): tree for tree, _ in before}.values()])
        return before

    def _complete(self, trees):
        """Make the gists of level 2 and above whose children are there: those of a level in one call."""
        K, level, missing = self.reader.config.block_size, 2, True
        while missing:
            stores = [tree.store for tree in trees]
            spans = [range(store.count(level), store.count(level - 1) // K) for store in stores]
            missing = [(store, span) for store, span in zip(stores, spans, strict=True) if span]
            if missing:
                children = [store.all(level - 1)[0, K * span.start : K * span.stop] for store, span in missing]
                children = torch.cat(children).unflatten(0, (-1, K))
                gists = self.reader.gist(children, level).to(children.dtype).split([len(span) for _, span in missing])
                for (store, _), values in zip(missing, gists, strict=True):
                    store.append(level, values[None])
            level += 1

    def save(self, stream):
        """The levels of a stream's tree, tensors; none if there is none."""
        tree, levels = self.trees.get(stream), []
        while tree and tree.store.count(len(levels)):
            levels.append(tree.store.all(len(levels)).clone())
        return levels

    def load(self, stream, levels):
        store = self._new(stream).store
        for level, values in enumerate(levels):
            store.append(level, values.to(self.reader.device))


def put_before(before: list[Before], block_size, most, inputs, entries, targets, generator=None):
    """
    Entries of random pasts (see random_past), `most` each, and behind them those of the variants of B sequences.

    inputs [R, W, D], entries and targets [R, W]: of R / B variants per sequence, of equal length. Returns the same of
    both: the past starts at negative tokens and has no targets; shorter rows are padded at their end.
    """
    variants, rows = len(inputs) // len(before), []
    for row in range(len(inputs)):
        tree, num_tokens = before[row // variants]
        own = (inputs[row], *(t[row] for t in entries), targets[row])
        if num_tokens:
            context = random_past(num_tokens, block_size, most, generator)
            past = context.entries._replace(start=context.entries.start - num_tokens)
            past = (tree.materialize(context), *past, torch.full_like(past.lod, -1))
            own = [torch.cat((p[0, -most:].to(o), o)) for p, o in zip(past, own, strict=True)]
        rows.append(own)
    padding = 0, 0, 0, 1, False, -1  # of inputs, lod, start, span, valid and targets
    parts = [pad_sequence(list(part), True, pad) for part, pad in zip(zip(*rows, strict=True), padding, strict=True)]
    return parts[0], Entries(*parts[1:5]), parts[5]
