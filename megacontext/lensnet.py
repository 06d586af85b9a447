"""
LensNet: which blocks of the stream, however long it is, deserve detail now. The trunk asks, each block answers.

Shapes: R rows, P tokens that ask, n blocks of K tokens, D = n_embd, H = HEADS, C = KEY.

    query    of a token, from the trunk's state of it before its last layer: H vectors q_h [C] and H weights w_h
    key      of a block, from the embeddings of its tokens: `layers` of attention within it, mean, head → [C]
    z      = bias + Σ_h w_h · leaky_relu(q_h · key)

z is the logarithm of the odds that the token looks into that block for what it says, and not into none; the score is
tanh(z / 2) = 2·sigmoid(z) − 1. A key knows neither its place nor the length of the stream, so what is far is found as
what is near is. The form of z is that of DeepSeek-V3.2's lightning indexer; what it is trained for, see losses.

Parameters: about 12·layers·WIDTH² + WIDTH·D and, for the mlp head, 4·WIDTH·(WIDTH + C), for keys; (C + 1)·H·D for
queries.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from megacontext.layers import Encoder, Head, check_choice, init_linear
from nanochat.decode import Matrix
from nanochat.gpt import norm, rotary_cos_sin

TYPES = ("transformer",)
WIDTH = 128  # of the encoder
KEY = 64
HEADS = 8
HEAD_DIM = 32
SHARP = 8.0  # z is large where it is sure: without the factor, steps of bounded size take long to get there
LEAK = 0.1  # of ReLU: without it, all heads of all tokens may die, and then nothing is ever learned again
FADE = 0.5  # of what a token wants, per token after it


class LensNet(nn.Module):
    """A query and a key network; `head` is "linear" or "mlp". An untrained lens has no wishes: all scores are 0."""

    def __init__(self, n_embd: int, layers=2, head="mlp", type="transformer"):
        super().__init__()
        check_choice("lensnet type", type, TYPES)
        self.query = nn.Linear(n_embd, HEADS * KEY, bias=False)
        self.weigh = nn.Parameter(
            torch.empty(HEADS, n_embd)
        )  # Muon's steps, of one length, would make it large at once
        self.bias = nn.Parameter(torch.empty(1))
        self.embed = nn.Linear(n_embd, WIDTH, bias=False)
        self.encoder = Encoder(layers, WIDTH, HEAD_DIM)
        self.head = Head(head, WIDTH, KEY)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Fill the parameters in place (the network may have been made on the meta device)."""
        init_linear(self)
        nn.init.normal_(self.head.c_proj.weight, std=self.head.c_proj.weight.size(1) ** -0.5)
        nn.init.zeros_(self.weigh)
        nn.init.zeros_(self.bias)

    def keys(self, children):
        """Keys [M, C] of blocks, from the embeddings [M, K, D] of their tokens."""
        cos, sin = rotary_cos_sin(torch.arange(children.size(1), device=children.device), self.encoder.head_dim)
        h = self.encoder(self.embed(children), (cos[:, None], sin[:, None]))
        return norm(self.head(h.mean(1)))

    def forward(self, states, keys):
        """z [R, P, n], float32, of states [R, P, D] of tokens and keys [R, n, C] of blocks."""
        h = norm(states)
        q = self.query(h).unflatten(-1, (HEADS, KEY))
        found = F.leaky_relu(torch.einsum("rphc,rnc->rphn", q, keys.to(q.dtype)), LEAK).float() / KEY**0.5
        return SHARP * ((F.linear(h, self.weigh.to(h.dtype)).float()[..., None] * found).sum(2) + self.bias.float())

    def listener(self):
        """What tells what tokens want, with the weights as they are now."""
        return Listener(self)


class Listener:
    """
    What tokens in a row want together of each block: the highest z of any of them, less FADE per token after it. One
    row in a handful of operations, with weights laid out once; float32.
    """

    @torch.no_grad()
    def __init__(self, lensnet):
        weight = torch.cat((lensnet.query.weight * (SHARP / KEY**0.5), lensnet.weigh))
        self.matrix, self.bias = Matrix(weight, torch.float32), SHARP * lensnet.bias.float()

    def __call__(self, states, keys):
        """What tokens with these states [P, D], the newest last, want together of blocks with keys [n, C]: [n]."""
        with torch.autocast(states.device.type, enabled=False):
            return self._wanted(states, keys)

    def _wanted(self, states, keys):
        asked = self.matrix(norm(states.float()))
        q, w = asked[:, :-HEADS].reshape(-1, KEY), asked[:, -HEADS:]
        found = F.leaky_relu_(torch.mm(q, keys.T), LEAK)  # [P·H, n]; the other way round costs a CPU twice the time
        if len(w) == 1:
            return torch.mv(found.T, w[0]).add_(self.bias)
        age = torch.arange(len(w) - 1, -1, -1, device=w.device)
        z = torch.bmm(w[:, None], found.view(*w.shape, -1))[:, 0]
        return (z - FADE * age[:, None]).amax(0) + self.bias
