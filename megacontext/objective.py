"""
What training minimizes, as functions of tensors.

Shapes: B sequences, V variants of each (rows b·V … b·V + V − 1 of R = B·V), W entries, n_blocks blocks.
"""

import torch
import torch.nn.functional as F


def mean_nll(nll, targets):
    """Mean over the targets that count (not −1) of losses nll, both [..., W]; 0 where there are none. → [...]"""
    count = (targets >= 0).sum(-1)
    return nll.sum(-1) / count.clamp(min=1)


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


def lens_preference(scores, lods, nll, pairs, temperature=1.0):
    """
    How well LensNet foretells which of two working contexts reads the newest tokens better.

    scores [R, n_blocks]: of each block in the light of its own context. lods [R, n_blocks]. nll [R]: of the newest
    tokens, the same in all contexts. pairs: (a, b), each [B, P]. With D = NLL_b − NLL_a > 0, a is the better. Its
    predicted advantage is the sum, over the blocks in which the two differ, of a's score times how much more detail
    a has; b's likewise. The loss is Bradley and Terry's (1952), −log σ(sign D · advantage / temperature), of both,
    weighted by |D| over its mean.

    Returns (loss, D [B, P], agreement: the share of pairs, weighted likewise, that are foretold rightly).
    """
    a, b = pairs
    difference = (nll[b] - nll[a]).detach()
    more_detail = (lods[b] - lods[a]).to(scores.dtype)  # of a over b
    advantage = ((scores[a] + scores[b]) * more_detail).sum(-1)
    weight = difference.abs() / difference.abs().mean().clamp(min=1e-9)
    loss = (weight * F.softplus(-difference.sign() * advantage / temperature)).mean()
    agreement = (weight * (difference.sign() == advantage.detach().sign())).mean()
    return loss, difference, agreement
