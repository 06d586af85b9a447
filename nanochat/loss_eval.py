"""Bits per byte: a loss that is comparable between tokenizers, because it does not depend on the vocabulary."""

import math

import torch

from nanochat.common import sum_dtype, sum_over_ranks


@torch.no_grad()
def evaluate_bpb(model, batches, steps, token_bytes) -> float:
    """
    Bits per byte of the next `steps` batches on all ranks: the loss of the targets divided by their length in bytes.

    batches: iterator of (x, y), each [B, T]. token_bytes [V]: bytes of each token. Targets of 0 bytes
    (special tokens) and ignored ones (−1) are not counted. Infinity if no target has bytes.
    """
    exact = sum_dtype(token_bytes.device)
    nats = torch.zeros((), dtype=exact, device=token_bytes.device)
    total_bytes = torch.zeros((), dtype=torch.int64, device=token_bytes.device)
    for _ in range(steps):
        x, y = next(batches)
        losses = model(x, y, loss_reduction="none").view(-1)  # [B·T], 0 where ignored
        y = y.reshape(-1)
        target_bytes = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)
        nats += (losses * (target_bytes > 0)).sum(dtype=exact)
        total_bytes += target_bytes.sum()
    nats, total_bytes = sum_over_ranks(torch.stack((nats, total_bytes.to(exact)))).tolist()
    return nats / (math.log(2) * total_bytes) if total_bytes else math.inf
