"""
What LensNet learns from: where the dense model looks.

Shapes: B streams of T tokens, P of each that are asked, K = block_size, n old blocks, H heads of d channels.
"""

import torch
import torch.nn.functional as F

ASKED = 128  # tokens per sequence that are asked where they look, at most
LITTLE = 0.1  # of a head's attention: z is 0 for a block that draws so much of it for what it says
LEAST = 0.02  # weight of a token that looks nothing up


def asked_tokens(context, recent_tokens, count, generator=None):
    """
    `count` tokens of each row, at random among those with an old block behind them; first those that stand in a context
    of B rows.

    Returns (tokens [B, P], asked [B, P] bool: False where there were fewer, entry [B, P]: the index of its entry in
    the context, there [B, P] bool: whether it has one).
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
    """Bool [B, P, n]: whether a block ends before the newest recent_tokens tokens, when tokens [B, P] are the last."""
    end = torch.arange(1, num_blocks + 1, device=tokens.device) * block_size
    return tokens[..., None] + 1 - recent_tokens >= end


@torch.no_grad()
def looks_for_content(looks, tokens, sinks, block_size, old):
    """
    [B, P, n]: the most that one head looks into each old block beyond what heads look at that distance on average.

    looks: what GPT.trunk says of tokens [B, P]. sinks [B, T], bool: tokens that draw attention whatever they say, as a
    BOS does; it is not counted. old [B, P, n]: blocks that count. Near blocks are looked at whatever they say, too, so
    each head's mean over all rows and tokens at that distance, in blocks, is taken away. The maximum, for sums over
    heads drown the one that looks up what is asked for now (see dev/LOG.md).
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
    How far LensNet's z [B, P, n] is from where the model looks, `looks_for_content` [B, P, n]; in nats.

    A distribution over the old blocks and "none", whose logarithm of odds is 0, is compared with what content says, of
    which LITTLE is as good as none: the Kullback-Leibler divergence, weighted by the most that a token looks into any
    block. So those count that look something up. valid [B, P], bool: tokens that count.
    """
    p = F.pad(content, (0, 1), value=LITTLE)
    p = p / p.sum(-1, keepdim=True)
    log_q = F.pad(z.masked_fill(~old, -torch.inf), (0, 1)).log_softmax(-1)
    log_q = log_q.masked_fill(~F.pad(old, (0, 1), value=True), 0)
    divergence = (torch.xlogy(p, p) - p * log_q).sum(-1)
    weight = (content.amax(-1) + LEAST) * valid
    return (weight * divergence).sum() / weight.sum().clamp(min=LEAST)
