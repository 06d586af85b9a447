"""
Random working contexts to train on: aligned spans collapsed at random, the newest tokens left as they are.

Shapes: R rows, N tokens, K = block_size.
"""

import torch

from megacontext.working_context import WorkingContext

START_SHARE = 0.8  # of the tokens, the entries of the first variants
STAGES = 8
COARSE_SHARE = 0.25  # of what has to be saved is saved by nodes above LOD 1, at most


def target_length(progress, num_tokens, block_size, final_length, start_share=START_SHARE) -> int:
    """
    Entries that variants shrink to: from start_share of the tokens down to final_length, or just below it.

    Always num_tokens less a multiple of K − 1, which is what every collapse saves, so that all variants have exactly
    this length. The way down has STAGES steps, so that few shapes occur.
    """
    saved = block_size - 1
    last = -(-(num_tokens - final_length) // saved)
    first = min(last, -(-round((1 - start_share) * num_tokens) // saved))
    stage = min(STAGES - 1, int(progress * STAGES))
    return num_tokens - saved * round(first + (last - first) * stage / (STAGES - 1))


def random_variants(rows, num_tokens, block_size, length, recent_tokens, generator=None, device=None):
    """
    A WorkingContext of `rows` rows, each of `length` entries (see target_length), or of the fewest that collapsing
    blocks can reach; the last recent_tokens tokens stay LOD 0.

    First nodes of the coarse levels collapse, highest level first, in a random order and as long as they save at
    most COARSE_SHARE of what has to be saved, or one, by that chance, where one saves more; then blocks.
    """
    K = block_size
    context = WorkingContext.finest(rows, num_tokens, K, device)
    blocks = context.old_blocks(recent_tokens)
    lod_map = context.lod_map
    excess = torch.full((rows,), max(0, num_tokens - length), device=device)
    top = 1
    while blocks >= K**top:  # a node of LOD top + 1 would fit
        top += 1
    for lod in range(top, 0, -1):
        size = K ** (lod - 1)  # blocks a node
        nodes = blocks // size
        free = lod_map[:, : nodes * size].unflatten(1, (nodes, size)).amax(2) == 0
        order = torch.rand(rows, nodes, generator=generator, device=device).masked_fill(~free, 2.0).argsort(1)
        saved = K**lod - 1  # by a node
        if lod == 1:
            wanted = -(-excess // saved)
        else:
            one = torch.rand(rows, generator=generator, device=device) < COARSE_SHARE
            wanted = torch.maximum((COARSE_SHARE * excess).long() // saved, (one & (excess >= saved)).long())
        count = torch.minimum(wanted, free.sum(1))
        rank = order.argsort(1)  # of each node in the random order; the taken ones come last
        chosen = rank < count[:, None]
        lod_map[:, : nodes * size] += lod * chosen.repeat_interleave(size, 1).to(torch.int8)
        excess = excess - count * saved
    return WorkingContext(lod_map, num_tokens, K)
