"""
LensNet: which parts of the working context deserve more detail, judged in the light of all the others.

Shapes: B rows, W entries (padded at the end), D = n_embd, C = min(D, MAX_WIDTH) channels, H heads.

To the transformer the entries are a set: their places are known only through their distance d to the newest
token, in two ways that hold however long the stream.

- As a feature, d / (d + s) for a few scales s: sigmoids of log d, which settle once d >> s. Very old spans are
  judged by their content alone.
- In attention, head h of H weighs an entry by (1 + d)^(−STEEPEST·h / (H − 1)): the first sees the whole context
  alike, the last little but the newest tokens, where what is asked for stands.

Queries and keys start with the same projection: attention is at first a search for what is similar. Measured on
finding, among 64, the gist that holds the newest word: with unrelated projections or rotary positions it learns
slower, with flat heads not at all.

Parameters, P: about 12·layers·C² + D·C, and 4·C² for the mlp head. Forward FLOPs per row: 2·P·W + 4·layers·C·W².
With 2 layers, D = 768 and W = 2,048 that is 2.0M and 17 GFLOP.
"""

import torch
import torch.nn as nn

from megacontext.layers import Encoder, Head, check_choice, init_linear
from nanochat.gpt import norm

TYPES = ("transformer",)
MAX_WIDTH = 256
HEAD_DIM = 32  # many narrow heads, for a choice of slopes
STEEPEST = 2.0
SCALES = tuple(4.0**i for i in range(6))  # 1 to 1,024 tokens


class LensNet(nn.Module):
    """A bidirectional transformer; `head` is "linear" or "mlp", zero at first: an untrained lens has no wishes."""

    def __init__(self, n_embd: int, max_levels: int, layers=2, head="mlp", type="transformer"):
        super().__init__()
        check_choice("lensnet type", type, TYPES)
        width = min(n_embd, MAX_WIDTH)
        self.max_levels = max_levels
        self.embed = nn.Linear(n_embd, width, bias=False)
        self.embed_place = nn.Linear(1 + len(SCALES), width, bias=False)
        self.register_buffer("scales", torch.empty(len(SCALES)), persistent=False)  # on the device: no copy per call
        self.lod_embed = nn.Embedding(max_levels + 1, width)
        self.encoder = Encoder(layers, width, HEAD_DIM)
        self.head = Head(head, width, 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Fill the parameters in place (the network may have been made on the meta device)."""
        init_linear(self)
        self.scales.copy_(torch.tensor(SCALES))
        nn.init.zeros_(self.lod_embed.weight)
        for attn in self.encoder.attn:
            attn.c_k.weight.copy_(attn.c_q.weight)

    def forward(self, x, lod, start, span, valid, num_tokens):
        """
        Scores [B, W], float32 in (−1, 1): positive = expand, negative = collapse, 0 where not valid.

        x [B, W, D] embeddings; lod, start and span (in tokens) [B, W] int64 and valid [B, W] bool, as
        WorkingContext.entries gives them; num_tokens: length of the stream, an int or [B].
        Levels above max_levels share its embedding.
        """
        length = num_tokens.view(-1, 1) if isinstance(num_tokens, torch.Tensor) else num_tokens
        distance = (length - start - span).clamp(min=0).float()  # [B, W]; 0 for the newest entry
        d, scales = distance[..., None], self.scales
        place = torch.cat((span.float().log2()[..., None] / 10, d / (d + scales)), dim=-1)
        h = self.embed(x) + self.embed_place(place.to(x.dtype))
        h = h + self.lod_embed(lod.clamp(max=self.max_levels)).to(h.dtype)

        slopes = torch.linspace(0, STEEPEST, self.encoder.n_head, device=x.device)
        bias = -slopes[:, None, None] * distance.log1p()[:, None, None]  # [B, H, 1, W]
        h = self.encoder(norm(h), bias=bias.masked_fill(~valid[:, None, None], -torch.inf))
        score = self.head(h).squeeze(-1).float() / h.size(-1) ** 0.5  # no single step may saturate the tanh
        return score.tanh().masked_fill(~valid, 0.0)
