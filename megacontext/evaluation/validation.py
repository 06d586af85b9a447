"""Validation with MegaContext during training: the loss of the newest tokens in contexts like those of sessions."""

import math

import torch

from megacontext.reader import newest
from megacontext.working_context import WorkingContext
from nanochat.common import sum_dtype, sum_over_ranks

MIN_GAIN = 0.01  # bits per byte; a smaller gain is too uncertain to compute a share of it


@torch.no_grad()
def validate(reader, batches, steps, token_bytes) -> dict:
    """
    Bits per byte of all tokens in the plain context; of the newest allocator_recent_tokens of the T tokens in three
    contexts: all T tokens; a working context of at most mc_eval_soft_max_length entries, after refocuses as at
    inference; that many last tokens. And the share of the first context's gain over the third that the second keeps,
    None if that gain is at most MIN_GAIN. Over all ranks.

    batches: iterator of (x, y) [B, T], of which `steps` are read. token_bytes [V]: bytes of each token.
    """
    c = reader.config
    tail, K, exact = max(1, c.allocator_recent_tokens), c.block_size, sum_dtype(token_bytes.device)
    nats, num_bytes = torch.zeros(4, dtype=exact, device=token_bytes.device), 0
    training = reader.networks.training
    reader.networks.eval()
    for _ in range(steps):
        x, y = next(batches)
        B, T = x.shape
        budget = min(T, c.mc_eval_soft_max_length)
        embeds = reader.embed(x)
        table = reader.tree(embeds)
        context = WorkingContext.initial(T, K, budget, c.allocator_recent_tokens, B)
        context = reader.focus(table, context, budget)
        full = reader.read(embeds, WorkingContext.finest(B, T, K), y).nll  # by the same path: one graph if compiled
        mc = newest(reader.read(table.materialize(context), context, y).nll, context, tail)
        last = reader.read(reader.embed(x[:, -budget:]), WorkingContext.finest(B, budget, K), y[:, -budget:]).nll
        scored = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)
        losses = (full, scored), *((nll[:, -tail:], scored[:, -tail:]) for nll in (full, mc, last))
        nats += torch.stack([(nll * (scored > 0)).sum(dtype=exact) for nll, scored in losses])
        num_bytes += torch.stack([scored.sum() for _, scored in losses])
    reader.networks.train(training)
    nats, num_bytes = sum_over_ranks(torch.stack((nats, num_bytes.to(exact))))
    bpb, full, mc, truncated = (nats / num_bytes / math.log(2)).tolist()
    gain = truncated - full
    return {
        "val/bpb": bpb,
        "val/mc_bpb": mc,
        "val/mc_full_bpb": full,
        "val/mc_truncated_bpb": truncated,
        "val/mc_context_gain": (truncated - mc) / gain if gain > MIN_GAIN else None,
    }
