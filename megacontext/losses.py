"""
What LensNet learns from: where the dense model looks.

Shapes: B streams of T tokens, R rows of working contexts, K = block_size, n old blocks, D = n_embd, H heads of d
channels.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from nanochat.common import autocast

ASKING = 4  # newest tokens whose attention says what detail is for


@torch.no_grad()
def attention_to_blocks(looks, sinks, block_size, num_blocks):
    """
    The most [B, num_blocks] that one of the newest tokens, in one head of one layer, attends to each of the first
    num_blocks blocks, as a share of all its attention. looks: what GPT.trunk says of ASKING tokens.

    Attention to sinks [B, T], bool, is not counted: a BOS draws it whatever its block says. The maximum, and over few
    tokens: sums over heads and tokens drown the one head that looks up what is asked for now (see dev/LOG.md).
    """
    (B, _, asking, d), (_, H_kv, T, _) = (t.shape for t in looks[0])
    logits = [q.reshape(B, H_kv, -1, d) @ k.mT for q, k in looks]  # heads that share keys are queries of one head
    logits = torch.stack(logits, 1).view(B, -1, asking, T).float() / d**0.5
    hidden = torch.ones(asking, T, dtype=torch.bool, device=sinks.device).triu(T - asking + 1)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(sinks[:, None, None], 0)
    shares = weights[..., : num_blocks * block_size].unflatten(-1, (num_blocks, block_size)).sum(-1)
    return shares.amax((1, 2))


@lru_cache(maxsize=8)
def _place_fit(n, device):
    """(features [n, 5] of the places of n blocks, the matrix [5, n] that fits them by least squares)."""
    distance = torch.arange(n, 0, -1, dtype=torch.float64)  # in blocks
    features = (torch.ones_like(distance), distance.log(), distance.log() ** 2, distance == 1, distance == n)
    place = torch.stack([feature.double() for feature in features], dim=1)
    normal = place.T @ place + 1e-4 * torch.eye(5, dtype=torch.float64)  # a ridge, for when there are few blocks
    return place.float().to(device), torch.linalg.solve(normal, place.T).float().to(device)


def beyond_place(shares):
    """
    The logarithm of attention shares [B, n], less what the place of a block alone explains; [B, n].

    Near blocks, and the oldest, are looked at whatever they say. So a quadratic in the logarithm of the distance, with
    a step for the newest and the oldest block, is fitted to all rows (least squares) and taken away. With few rows it
    takes some of the content along: more rows tell better what is content.
    """
    log = shares.float().clamp(min=1e-6).log()
    place, fit = _place_fit(log.size(1), log.device)
    with autocast(log.device, torch.float32):
        return log - place @ (fit @ log.mean(0))


def lens_targets(beyond, context):
    """
    What LensNet is to say of each old block, [R, n] in (−1, 1), from `beyond_place` of its attention, [R, n].

    tanh of it: positive where the model looks more than the place explains, so that detail moves there, negative where
    it looks less. A node of several blocks is worth as much as the best of them.
    """
    n = beyond.size(1)
    targets = beyond.tanh()
    lod_map = context.lod_map[:, :n].to(beyond.device, non_blocking=True)
    level, size = 2, context.block_size
    while size <= n and level <= context.coarsest:
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
