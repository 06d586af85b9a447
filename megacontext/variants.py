"""
How compressed sequences are read in training: as random working contexts, behind gists of the preceding text.

*Variants*: random aligned spans are collapsed; the newest tokens stay tokens.

*Pasts*. At inference a stream is longer than any training sequence, and most of it is far away, at high levels. So a
compressed sequence is read behind a past of up to many times its T tokens. The cost does not grow with its length: each
gist is computed once, in the step that reads its tokens, and stored without a gradient; a variant reads a few of them.
Gists are older than the weights by at most as many steps as a past has sequences.

A stream's past is discarded where another document or shuffled piece begins: behind gists of other documents a model
learns to ignore all gists, and then also ignores open blocks among them. It is also discarded at random, once in
most + T tokens on average, so that all lengths occur at any time, and before a sequence if it has more than `most`
tokens. Until then it keeps its beginning, so that its nodes are aligned as in a session. Memory per stream: at most
most + T token ids, and a vector of D per K − 1 of them, K = block_size.

Shapes: R rows of variants, of B sequences of N or T tokens (the context length), a multiple of K = block_size; W
entries, P of a past; D = n_embd.
"""

from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from megacontext.config import MCConfig
from megacontext.lensnet import WIDTH
from megacontext.tree import MegaContextTree, RamStore
from megacontext.working_context import Entries, WorkingContext, old_blocks, smallest_length

START_SHARE = 0.8  # entries of the first variants, as a fraction of the tokens
STAGES = 8
DENSE_SHARE = 0.5  # fraction of a batch's sequences that are read in full; the others are read as variants
COARSE_SHARE = 0.25  # largest fraction of the savings that nodes above LOD 1 make


def target_length(progress, num_tokens, block_size, final_length) -> int:
    """
    Entries per variant at this progress: from START_SHARE of the tokens down to final_length, or just below it.

    Always num_tokens minus a multiple of K − 1, the saving of one collapse, so that all variants have exactly this
    length. It falls in STAGES steps, so that few shapes occur.
    """
    saved = block_size - 1
    last = -(-(num_tokens - final_length) // saved)
    first = min(last, -(-round((1 - START_SHARE) * num_tokens) // saved))
    stage = min(STAGES - 1, int(progress * STAGES))
    return num_tokens - saved * round(first + (last - first) * stage / (STAGES - 1))


def variant_length(config: MCConfig, progress, T) -> int:
    """
    Entries per variant at this progress; T as long as there are no variants. Constant for a frozen model.
    """
    progress = 1.0 if config.mc_freeze_base else config.begun(progress)
    return T if progress < 0 else target_length(progress, T, config.block_size, config.mc_train_wc_length)


def random_variants(rows, num_tokens, block_size, length, recent_tokens, generator=None):
    """
    A WorkingContext of `rows` rows, each of `length` entries (see target_length), or of the fewest that collapsing
    blocks can reach; the last recent_tokens tokens stay LOD 0. generator: a CPU generator.

    Coarse nodes collapse first, highest level first, in random order, until they make COARSE_SHARE of the savings; if
    a single node saves more than that, one collapses with probability COARSE_SHARE. Blocks of tokens save the rest.
    """
    K = block_size
    blocks = old_blocks(num_tokens, K, recent_tokens)
    lod_map = torch.zeros(rows, -(-num_tokens // K), dtype=torch.int8)
    excess = torch.full((rows,), max(0, num_tokens - length))
    top = 1
    while blocks >= K**top:  # a node of LOD top + 1 would fit
        top += 1
    for lod in range(top, 0, -1):
        size = K ** (lod - 1)  # blocks per node
        nodes = blocks // size
        free = lod_map[:, : nodes * size].unflatten(1, (nodes, size)).amax(2) == 0
        order = torch.rand(rows, nodes, generator=generator).masked_fill(~free, 2.0).argsort(1)
        saved = K**lod - 1  # by a node
        if lod == 1:
            wanted = -(-excess // saved)
        else:
            one = torch.rand(rows, generator=generator) < COARSE_SHARE
            wanted = torch.maximum((COARSE_SHARE * excess).long() // saved, (one & (excess >= saved)).long())
        count = torch.minimum(wanted, free.sum(1))
        rank = order.argsort(1)  # of each node in the random order; those inside coarser nodes come last
        chosen = rank < count[:, None]
        lod_map[:, : nodes * size] += lod * chosen.repeat_interleave(size, 1).to(torch.int8)
        excess = excess - count * saved
    return WorkingContext.from_map(lod_map, num_tokens, K)


# ---------------------------------------------------------------------------------------------------------
# Pasts


def random_past(num_tokens, block_size, most, generator=None) -> WorkingContext:
    """
    A row of num_tokens tokens, whole blocks: the coarsest context, in which random nodes are then expanded one after
    another as long as there are at most `most` entries. generator: a CPU generator.
    """
    K, smallest = block_size, smallest_length(num_tokens, block_size, 0)
    tiles = WorkingContext.initial(num_tokens, K, smallest, 0).tiles[0].tolist()
    for _ in range((most - smallest) // (K - 1)):
        closed = [i for i, lod in enumerate(tiles) if lod]
        if closed:
            i = closed[int(torch.randint(len(closed), (), generator=generator))]
            tiles[i : i + 1] = [tiles[i] - 1] * (K if tiles[i] > 1 else 1)
    return WorkingContext(torch.tensor([tiles], dtype=torch.int8), num_tokens, K)


class Before(NamedTuple):
    """The past of a sequence: the first num_tokens tokens of its stream's tree."""

    tree: MegaContextTree
    num_tokens: int


class Pasts:
    """
    The streams' trees by stream number. reader: makes gists; most: see the head of this file.

    A keeper for MicroBatches: with `save` and `load` a resumed training continues with the same gists, bit for bit.
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
        Add sequences to their streams; returns the past of each.

        origins [B, 2]: see MicroBatches; sequences of one stream in order. ids [B, T]: the tokens. gists [B, T / K, D]:
        of level 1. generator: of random numbers, on the CPU.
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
        """The levels of a stream's tree, a list of tensors; empty for a stream without one."""
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
    Put a random past (see random_past) of at most `most` entries before each variant of B sequences.

    inputs [R, W, D], entries and targets [R, W]: of R / B variants per sequence, of equal length. Returns the three
    with the pasts, whose tokens have negative numbers and no targets; shorter rows are padded at their end.
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


# ---------------------------------------------------------------------------------------------------------
# What a batch of variants costs


def past_entries(config: MCConfig, T) -> int:
    """Maximum number of entries for the past in a variant: see Pasts."""
    return max(2 * config.block_size, T // 8) if config.mc_past > 0 else 0


def dense_share(config: MCConfig, progress) -> float:
    """The fraction of sequences that are read in full; all or none if only one of the networks learns."""
    if config.begun(progress) < 0:
        return 1.0  # only the model learns
    if config.mc_freeze_base and config.gistnet_type == "mean":
        return 1.0  # only LensNet learns
    if config.mc_freeze_base and config.mc_lens_loss_weight == 0:
        return 0.0  # only GistNet learns
    return DENSE_SHARE


def inputs_per_sequence(config: MCConfig, progress, T) -> tuple[float, float, float]:
    """Inputs that the model, GistNet and LensNet are trained on, per sequence of T tokens."""
    c, dense = config, dense_share(config, progress)
    if c.begun(progress) < 0:
        return T, 0, 0
    length = variant_length(c, progress, T)
    children = T * c.block_size / (c.block_size - 1)  # of all nodes of a tree
    length += past_entries(c, T)
    trunk = (1 - dense) * c.mc_num_random_variants * length + (0 if c.mc_freeze_base else dense * T)
    judged = dense if c.mc_lens_loss_weight > 0 else 0
    old = old_blocks(T, c.block_size, c.allocator_recent_tokens) * c.block_size
    looked_at = dense if c.mc_past > 0 else judged  # gists without a gradient
    kept = (children - T) / 3 if c.mc_past > 0 else 0  # higher gists of pasts
    return trunk, (1 - dense + looked_at / 3) * children + kept, judged * old


def step_work(model, networks, config: MCConfig, progress, T) -> float:
    """
    FLOPs of a step as a multiple of what the model alone needs for the same tokens. GistNet and LensNet are counted
    with 6 FLOPs per parameter and input, a forward pass of the model without gradients as a third of a training pass.
    """
    trunk, gists, tokens = inputs_per_sequence(config, progress, T)
    small = {networks.gistnet: gists, networks.lensnet: tokens}
    flops = sum(6 * inputs * sum(p.numel() for p in net.parameters()) for net, inputs in small.items())
    length = variant_length(config, progress, T)
    looks = config.mc_freeze_base + config.mc_max_counterfactuals * length / T  # forward passes for LensNet's targets
    dense = dense_share(config, progress)
    looks *= dense / 3 if tokens else 0
    looks += config.mc_freeze_base * (1 - dense) / 3  # the teacher's forward pass
    return trunk / T + looks + flops / (T * model.flops_per_token())


def auto_batch_size(device_batch_size: int, config: MCConfig, model_config) -> int:
    """
    The most sequences per forward pass that need no more memory than device_batch_size of them without MegaContext: a
    divisor of device_batch_size, even if that is even, so that half of them can be dense. At least 1 or 2, whatever
    they need; with mc_auto_batch off: device_batch_size.

    The memory of activations is estimated as inputs × layers × width of each network (see tests/test_mc_variants.py).
    """
    if not config.mc_auto_batch:
        return device_batch_size
    T, D = model_config.sequence_len, model_config.n_embd
    gist_layers = 0 if config.gistnet_type == "mean" else config.gistnet_layers
    sizes = (model_config.n_layer * D, gist_layers * D, config.lensnet_layers * WIDTH)
    inputs = inputs_per_sequence(config, config.mc_start, T)  # variants are longest at the start
    need = sum(n * size for n, size in zip(inputs, sizes, strict=True)) / (T * sizes[0])
    least = 1 + (device_batch_size + 1) % 2
    sizes = (n for n in range(least, device_batch_size + 1, least) if device_batch_size % n == 0)
    return max((n for n in sizes if n * need <= device_batch_size), default=least)
