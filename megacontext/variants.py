"""
Random working contexts to train on: aligned spans collapsed at random, the newest tokens left as they are.

Shapes: R rows, N tokens, K = block_size.
"""

import torch

from megacontext.working_context import WorkingContext

COARSE_SHARE = 0.25  # of what has to be saved, at most, is saved by nodes above LOD 1


def target_length(progress, num_tokens, final_length, start_share=0.8) -> int:
    """Entries that variants shrink to: from start_share of the tokens in a straight line to final_length."""
    start = max(start_share * num_tokens, final_length)
    return round(start + (final_length - start) * min(1.0, max(0.0, progress)))


def random_variants(rows, num_tokens, block_size, length, recent_tokens, generator=None, device=None):
    """
    A WorkingContext of `rows` rows, each of about `length` entries; the last recent_tokens tokens stay LOD 0.

    First nodes of the coarse levels collapse, highest level first, in a random order and as long as they save at
    most COARSE_SHARE of what has to be saved; then blocks, until a row has no more than `length` entries or nothing
    is left to collapse.
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
        wanted = -(-excess // saved) if lod == 1 else (COARSE_SHARE * excess).long() // saved
        count = torch.minimum(wanted, free.sum(1))
        rank = order.argsort(1)  # of each node in the random order; the taken ones come last
        chosen = rank < count[:, None]
        lod_map[:, : nodes * size] += lod * chosen.repeat_interleave(size, 1).to(torch.int8)
        excess = excess - count * saved
    return WorkingContext(lod_map, num_tokens, K)
