"""
How the model reads a working context, in training and evaluation alike.

Shapes: R rows, W entries (padded at the end), N tokens, D = n_embd.
"""

from typing import NamedTuple

import torch

from megacontext.gaussian_rope import entry_cos_sin
from megacontext.working_context import Entries


class Reading(NamedTuple):
    """
    What went in, each [R, W, …], and nll [R, W], in nats: the loss of each entry's target, 0 where it has none.

    Only `loss` has a gradient.
    """

    entries: Entries
    inputs: torch.Tensor  # [R, W, D]
    cos_sin: tuple[torch.Tensor, torch.Tensor]
    targets: torch.Tensor  # −1 where nothing is to be predicted
    nll: torch.Tensor
    loss: torch.Tensor  # to be minimized: the mean of nll over the targets of a row, over the rows


def read(model, table, context, y, positional, cos_sin=None) -> Reading:
    """
    Put a working context through the model.

    table: the tree of R / V sequences, of which the context's rows are V variants each; y [R / V, N] the token that
    follows each position. positional: "gaussian" or "simple".
    cos_sin: `positions` of the entries, where they are known.
    """
    y = y.repeat_interleave(context.num_rows // len(y), 0)
    return read_inputs(model, table.materialize(context), context, y, positional, cos_sin)


def read_inputs(model, inputs, context, y, positional, cos_sin=None) -> Reading:
    """The same with embeddings [R, W, D] of the entries that are given, and y [R, N]."""
    entries, targets = context.entries(), context.targets(y)
    cos_sin = positions(model, entries, positional) if cos_sin is None else cos_sin
    counts = (targets >= 0).sum(1, keepdim=True).clamp(min=1)
    weights = (counts.float().mean() / counts).expand_as(targets)  # all 1 if equal: the plain loss, exactly
    loss, nll = model(inputs_embeds=inputs, cos_sin=cos_sin, targets=targets, row_weights=weights)
    return Reading(entries, inputs, cos_sin, targets, nll.view_as(targets), loss / counts.sum())


def positions(model, entries, positional):
    """(cos, sin), each [R, W, 1, d/2], of the entries, for this model's heads."""
    head_dim = model.config.n_embd // model.config.n_head
    return entry_cos_sin(entries.start, entries.span, head_dim, mode=positional)
