"""
LensNet: which parts of the working context deserve more detail, judged in the light of all the others.

Shapes: B rows, W entries (padded at the end), D = n_embd.

It sees an entry's embedding, level and span, and its place as two things that stay bounded however long the
stream: the rank among the entries (rotary, so only differences count) and the distance d to the newest token
as d / (d + s) for a few scales s, which is a sigmoid of log d and settles once d >> s. Hence scores are the
same when a stream's positions are all shifted, and very old spans are judged by what they say alone.

Cost a call: 2·P·W + 4·layers·C·W² multiply-adds' worth of FLOPs, with C = min(D, MAX_WIDTH) channels and P
about 12·layers·C² + D·C parameters: 1.7M and 16 GFLOP for 2 layers, D = 768 and W = 2,048.
"""

import torch
import torch.nn as nn

from megacontext.layers import Encoder, Head, init_linear
from nanochat.gpt import norm

MAX_WIDTH = 256
SCALES = tuple(4.0**i for i in range(6))  # 1 to 1,024 tokens


class LensNet(nn.Module):
    """A bidirectional transformer; `head` is "linear" or "mlp", zero at first: an untrained lens has no wishes."""

    def __init__(self, n_embd: int, max_levels: int, layers=2, head="mlp"):
        super().__init__()
        width = min(n_embd, MAX_WIDTH)
        self.max_levels = max_levels
        self.embed = nn.Linear(n_embd, width, bias=False)
        self.embed_place = nn.Linear(1 + len(SCALES), width, bias=False)
        self.lod_embed = nn.Embedding(max_levels + 1, width)
        self.encoder = Encoder(layers, width)
        self.head = Head(head, width, 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Fill the parameters in place (the network may have been made on the meta device)."""
        init_linear(self)
        nn.init.zeros_(self.lod_embed.weight)

    def forward(self, x, lod, start, span, valid, num_tokens):
        """
        Scores [B, W], float32 in [−1, 1]: positive = expand, negative = collapse, 0 where not valid.

        x [B, W, D] embeddings (no gradient goes back into them); lod, start and span (in tokens) [B, W]
        integers; valid [B, W] bool; num_tokens: length of the stream, an int or [B].
        """
        length = torch.as_tensor(num_tokens, device=x.device).view(-1, 1)
        distance = (length - start - span).clamp(min=0).float()[..., None]  # 0 for the newest entry
        scales = torch.tensor(SCALES, device=x.device)
        place = torch.cat((span.clamp(min=1).float().log2()[..., None] / 10, distance / (distance + scales)), dim=-1)
        h = self.embed(x.detach()) + self.embed_place(place) + self.lod_embed(lod.long().clamp(max=self.max_levels))
        h = self.encoder(norm(h), valid[:, None, None, :])
        score = self.head(h).squeeze(-1).float() / h.size(-1) ** 0.5  # no single step may saturate the tanh
        return score.tanh().masked_fill(~valid, 0.0)
