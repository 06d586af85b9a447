"""
What training minimizes, as functions of tensors.

Shapes: B sequences, V variants of each (rows b·V … b·V + V − 1 of R = B·V), W entries, n_blocks blocks.
"""

import torch
import torch.nn.functional as F

from nanochat.common import autocast


def tail_nll(nll, lengths, tail):
    """Mean losses [R] of the last `tail` entries of each row, nll [R, W] with lengths [R]."""
    index = lengths[:, None] - tail + torch.arange(tail, device=nll.device)
    return nll.gather(1, index).mean(1)


def pairs_of_variants(B, V, limit, generator=None, device=None):
    """Up to `limit` different pairs a < b of the V variants of each sequence: rows (a, b), each [B, P]."""
    a, b = torch.triu_indices(V, V, 1, device=device)
    P = min(limit, a.numel())
    pick = torch.rand(B, a.numel(), generator=generator, device=device).argsort(1)[:, :P]
    first = torch.arange(B, device=device)[:, None] * V
    return first + a[pick], first + b[pick]


def beyond_place(shares):
    """
    What of the logarithm of attention shares [B, n] is not explained by the place of a block alone; [B, n].

    Near blocks, and the oldest, are looked at whatever they say. So a quadratic in the logarithm of the distance, with
    a step for the newest and the oldest block, is fitted to all rows (least squares) and taken away. With few rows it
    takes some of the content along: more rows tell better what is content.
    """
    log = shares.float().clamp(min=1e-6).log()
    n = log.size(1)
    distance = torch.arange(n, 0, -1, device=log.device).float()  # in blocks
    place = (torch.ones_like(distance), distance.log(), distance.log() ** 2, distance == 1, distance == n)
    place = torch.stack([feature.float() for feature in place], dim=1)  # [n, 5]
    with autocast(log.device, torch.float32):
        normal = place.T @ place + 1e-4 * torch.eye(5, device=log.device)  # a ridge, for when there are few blocks
        return log - place @ torch.linalg.solve(normal, place.T @ log.mean(0))


def lens_targets(beyond, context):
    """
    What LensNet is to say of each old block, [R, n] in (−1, 1), from `beyond_place` of its attention, [R, n].

    tanh of it: positive where the model looks more than the place explains, so that detail moves there, negative where
    it looks less. A node of several blocks is worth as much as the best of them.
    """
    n = beyond.size(1)
    targets = beyond.tanh()
    lod_map = context.lod_map[:, :n]
    level, size = 2, context.block_size
    while size <= n:
        whole = n // size * size
        best = targets[:, :whole].unflatten(1, (-1, size)).amax(2).repeat_interleave(size, 1)
        targets[:, :whole] = best.where(lod_map[:, :whole] == level, targets[:, :whole])
        level, size = level + 1, size * context.block_size
    return targets


def lens_loss(scores, beyond, context):
    """
    Mean squared difference of LensNet's scores [R, n_blocks] of each block, in the light of its row's own context, and
    the targets above. Measured against a preference between pairs of contexts, and against the divergence of the two
    distributions: it finds what is asked for in a fraction of the steps (see dev/LOG.md).
    """
    targets = lens_targets(beyond, context)
    return F.mse_loss(scores[:, : targets.size(1)], targets)


@torch.no_grad()
def preference_agreement(scores, lods, nll, pairs):
    """
    How well LensNet foretells which of two working contexts reads the newest tokens better: a measure, not a loss.

    scores [R, n_blocks]: of each block in the light of its own context. lods [R, n_blocks]. nll [R]: of the newest
    tokens, the same in all contexts. pairs: (a, b), each [B, P]. With D = NLL_b − NLL_a > 0, a is the better. Its
    foretold advantage is the sum, over the blocks in which the two differ, of the scores times how much more detail a
    has. Returns (D [B, P], agreement: the share of pairs, weighted by |D|, that are foretold rightly).
    """
    a, b = pairs
    difference = nll[b] - nll[a]
    more_detail = (lods[b] - lods[a]).to(scores.dtype)  # of a over b
    advantage = ((scores[a] + scores[b]) * more_detail).sum(-1)
    right = difference.sign() == advantage.sign()
    return difference, (difference.abs() * right).sum() / difference.abs().sum().clamp(min=1e-9)
