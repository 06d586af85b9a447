"""
LensNet's training targets, derived from the dense model's attention, and its loss.

Shapes: B streams of T tokens, P sampled tokens in each, K = block_size, n old blocks, H heads of d channels.
"""

import torch
import torch.nn.functional as F

ASKED = 128  # maximum number of tokens per sequence whose attention is a target
LITTLE = 0.1  # a block with this much of a head's attention for its content has the target z = 0
LEAST = 0.02  # weight of a token that looks nothing up


def asked_tokens(context, recent_tokens, count, generator=None):
    """
    `count` random tokens of each row that have an old block before them, preferably those that are entries of
    `context`, of B rows.

    Returns (tokens [B, P]; asked [B, P] bool: False for surplus ones if there are fewer; entry [B, P]: index of the
    token's entry in the context; there [B, P] bool: whether it has one).
    """
    lod, start, _, valid = context.entries
    row, index = (valid & (lod == 0)).nonzero(as_tuple=True)
    entry = torch.full((context.num_rows, context.num_tokens), -1)
    entry[row, start[row, index]] = index
    chance = torch.rand(entry.shape, generator=generator) + (entry >= 0)
    chance[:, : recent_tokens + context.block_size - 1] = -1.0
    chance, tokens = chance.topk(min(count, context.num_tokens), dim=1)
    entry = entry.gather(1, tokens)
    return tokens, chance >= 0, entry.clamp(min=0), (chance >= 0) & (entry >= 0)


def old_blocks_of(tokens, num_blocks, block_size, recent_tokens):
    """Bool [B, P, n]: whether each block would be old, that is, collapsible, if each of tokens [B, P] were the last."""
    end = torch.arange(1, num_blocks + 1, device=tokens.device) * block_size
    return tokens[..., None] + 1 - recent_tokens >= end


@torch.no_grad()
def looks_for_content(looks, tokens, sinks, block_size, old):
    """
    [B, P, n]: attention to each old block because of its content: the maximum over all heads and layers of a head's
    attention to the block, minus the head's mean attention at that distance, and at least 0.

    looks: from GPT.trunk, for tokens [B, P]. sinks [B, T], bool: attention sinks such as BOS; attention to them is not
    counted. old [B, P, n]: blocks that count. The mean is over all rows and tokens at the same distance in blocks:
    near blocks get attention whatever they contain. A sum over heads would drown the one head that looks up what is
    asked for now (see dev/LOG.md).
    """
    n, T = old.size(2), sinks.size(1)
    later = torch.arange(T, device=sinks.device) > tokens[..., None]  # [B, P, T]
    age = (tokens[..., None] // block_size - torch.arange(n, device=tokens.device)).clamp(min=0).flatten()  # [B·P·n]
    count = torch.zeros(T // block_size + 1, device=old.device).index_add(0, age, old.flatten().float()).clamp(min=1)
    later, sinks, young = later[:, None], sinks[:, None, None], ~old
    most = torch.zeros(old.shape, device=old.device)
    for q, k in zip(looks.queries, looks.keys, strict=True):
        B, H, P, d = q.shape
        logits = (q.reshape(B, k.size(1), -1, d) @ k.mT).view(B, H, P, T).float() / d**0.5
        weights = logits.masked_fill_(later, -torch.inf).softmax(-1).masked_fill_(sinks, 0)
        shares = weights[..., : n * block_size].unflatten(-1, (n, block_size)).sum(-1) * old[:, None]  # [B, H, P, n]
        shares = shares.transpose(0, 1).flatten(1)  # [H, B·P·n]
        mean = torch.zeros(H, len(count), device=q.device).index_add(1, age, shares) / count
        beyond = (shares - mean[:, age]).view(H, *old.shape).amax(0)
        most = torch.maximum(most, beyond.masked_fill(young, 0))
    return most


def lens_loss(z, content, old, valid):
    """
    LensNet's loss in nats, from its z [B, P, n] and the targets content [B, P, n] of `looks_for_content`.

    The Kullback-Leibler divergence between two distributions over the old blocks and a class "none": the content,
    normalized, with LITTLE for "none"; and the softmax of z, with 0 for "none". The mean over tokens is weighted by
    the largest content plus LEAST, so that tokens that look something up count. valid [B, P], bool: tokens to use.
    """
    p = F.pad(content, (0, 1), value=LITTLE)
    p = p / p.sum(-1, keepdim=True)
    log_q = F.pad(z.masked_fill(~old, -torch.inf), (0, 1)).log_softmax(-1)
    log_q = log_q.masked_fill(~F.pad(old, (0, 1), value=True), 0)
    divergence = (torch.xlogy(p, p) - p * log_q).sum(-1)
    weight = (content.amax(-1) + LEAST) * valid
    return (weight * divergence).sum() / weight.sum().clamp(min=LEAST)
