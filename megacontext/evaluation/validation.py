"""What validation during training says of MegaContext: the loss of the newest tokens, read as a session reads them."""

import math

import torch
import torch.distributed as dist

from megacontext.reader import newest
from megacontext.working_context import WorkingContext
from nanochat.common import sum_dtype, sum_over_ranks

MIN_GAIN = 0.01  # bits per byte; of less, no share can be told


@torch.no_grad()
def validate(reader, batches, steps, token_bytes) -> dict:
    """
    Bits per byte of the newest tokens (allocator_recent_tokens of them) of T in three contexts: all T tokens; a working
    context of at most mc_eval_soft_max_length entries, in focus as at inference; the last so many tokens. And the
    share of what the first gains over the last that the second keeps, None where that is less than MIN_GAIN. Over all
    ranks.

    batches: iterator of (x, y) [B, T], of which `steps` are read. token_bytes [V]: bytes of each token.
    """
    model, c = reader.model, reader.config
    if dist.is_initialized() and c.gistnet_type != "mean":  # levels that any rank has trained
        dist.all_reduce(reader.networks.gistnet.trained_levels, op=dist.ReduceOp.MAX)
    tail, exact = max(1, c.allocator_recent_tokens), sum_dtype(token_bytes.device)
    nats = {name: 0.0 for name in ("full", "mc", "truncated")}
    total_bytes = 0
    training = reader.networks.training
    reader.networks.eval()
    for _ in range(steps):
        x, y = next(batches)
        B, T = x.shape
        budget = min(T, c.mc_eval_soft_max_length)
        scored = token_bytes[y[:, -tail:].clamp(min=0)] * (y[:, -tail:] >= 0)
        embeds = reader.embed(x)
        table = reader.tree(embeds)
        context = WorkingContext.initial(T, c.block_size, budget, c.allocator_recent_tokens, B)
        context = reader.focus(table, context, budget)
        losses = {
            "full": model(inputs_embeds=embeds, targets=y, loss_reduction="none").view(B, T)[:, -tail:],
            "mc": newest(reader.read(table.materialize(context), context, y).nll, context, tail),
            "truncated": model(x[:, -budget:], y[:, -budget:], loss_reduction="none").view(B, budget)[:, -tail:],
        }
        for name, loss in losses.items():
            nats[name] += (loss * (scored > 0)).sum(dtype=exact)
        total_bytes += scored.sum()
    reader.networks.train(training)
    sums = sum_over_ranks(torch.stack([*nats.values(), total_bytes.to(exact)]))
    full, mc, truncated = (sums[:3] / sums[3] / math.log(2)).tolist()
    gain = truncated - full
    return {
        "val/mc_bpb": mc,
        "val/mc_full_bpb": full,
        "val/mc_truncated_bpb": truncated,
        "val/mc_context_gain": (truncated - mc) / gain if gain > MIN_GAIN else None,
    }
