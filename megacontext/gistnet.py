"""
GistNet: compresses K neighbouring nodes of one level of detail into one gist of the next.

Shapes: M blocks of K = block_size children, D = n_embd.

Gists, like token embeddings, are vectors with a root mean square of 1, so one network serves every level and the GPT
reads both alike:

    gist = norm(mean of the children, or the last of them + correction)

A transformer computes the correction. Its last matrix starts at zero, so training starts from plain pooling, bit for
bit. A model that is trained with GistNet starts from means; a frozen model can read a token's embedding but not a mean.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.common import autocast_dtype
from nanochat.gpt import MLP, Attention, GPTConfig, apply_rotary, cos_sin_at, norm, rotary_cos_sin

HEAD_DIM = 64


class GistNet(nn.Module):
    """
    type "mean" has no parameters and ignores the other options. "transformer": `layers` of bidirectional attention
    inside the block, then `pooling` of the K outputs, then a `head` ("linear" or "mlp").

    pooling: "mean"; "query": each attention head weights the outputs by a learned query, initially zero, so equally;
    "cls": the output at an additional, learned input.
    """

    def __init__(
        self,
        n_embd: int,
        block_size: int,
        max_levels: int,
        type="transformer",
        layers=2,
        pooling="mean",
        head="mlp",
        start="mean",
    ):
        super().__init__()
        self.start = start
        self.type, self.pooling, self.block_size, self.max_levels = type, pooling, block_size, max_levels
        self.copied = nn.ModuleList()  # layers of a trained model, see CopiedGistNet
        self.deep = None  # or DeepGists
        if type == "mean":
            return
        self.level_embed = nn.Parameter(torch.empty(max_levels, n_embd))
        self.encoder = Encoder(layers, n_embd, HEAD_DIM)
        if pooling == "query":
            self.query = nn.Parameter(torch.empty(self.encoder.n_head, self.encoder.head_dim))
        if pooling == "cls":
            self.cls = nn.Parameter(torch.empty(n_embd))
        self.head = Head(head, n_embd, n_embd)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Fill the parameters in place (the network may have been made on the meta device)."""
        init_linear(self)
        for name, p in self.named_parameters(recurse=False):
            nn.init.normal_(p, std=1.0 if name == "cls" else 0.0)  # a cls of zeros would get no gradient

    def forward(self, children, level: int):
        """
        Gists [M, D] of `level` (1 or more) from children [M, K, D] of level − 1; with `deep`, [M, (1 + n)·D]: after
        each gist its n vectors for later layers.

        Levels above max_levels use the embedding of max_levels. Raises ValueError unless blocks have K children.
        """
        if children.size(1) != self.block_size or level < 1:
            raise ValueError(
                f"expected blocks of {self.block_size} children and a level of 1 or more, "
                f"got {children.size(1)} and {level}"
            )
        if self.type == "mean":
            return norm(children.mean(dim=1))
        start = children.mean(dim=1) if self.start == "mean" else children[:, -1]
        pooled = self._pooled(children, level)
        gists = self._scaled(norm(start + self.head(pooled)), level)
        return gists if self.deep is None else torch.cat((gists, self.deep(pooled).to(gists.dtype)), dim=-1)

    def _scaled(self, gists, level):
        return gists

    def _pooled(self, children, level):
        x = children + self.level_embed[min(level, self.max_levels) - 1].to(children.dtype)  # bf16 on GPUs
        if self.pooling == "cls":
            x = torch.cat((x, self.cls.expand(len(x), 1, -1).to(x.dtype)), dim=1)
        places = torch.arange(x.size(1), device=x.device)
        cos, sin = rotary_cos_sin(places, self.encoder.head_dim)
        return norm(self._pool(self.encoder(x, (cos[:, None], sin[:, None]))))

    def _pool(self, x):
        if self.pooling == "cls":
            return x[:, -1]
        if self.pooling == "mean":
            return x.mean(dim=1)
        x = x.unflatten(-1, self.query.shape)  # [M, K, H, d]
        weights = (x * self.query).sum(-1, keepdim=True).softmax(dim=1)
        return (weights * x).sum(dim=1).flatten(1)


class CopiedGistNet(GistNet):
    """
    A GistNet whose correction is initialized with copies of the lowest layers of a trained GPT:
    gist = scale · norm(last child + correction), with a learned scale per level, initially 1.

    The layers are causal, as in the model. Before the children they read a learned vector, an attention sink,
    initially the embedding of token `bos`. The sum of the mean output and the last one goes through the head.
    """

    def __init__(self, trunk, layers: int, block_size: int, max_levels: int, head="mlp", bos=0):
        super().__init__(trunk.config.n_embd, block_size, max_levels, type="mean", start="last")  # no parameters yet
        self.type, D = "copied", trunk.config.n_embd
        self.copied = nn.ModuleList(copy.deepcopy(layer) for layer in trunk.transformer.h[:layers])
        self.copied.float().requires_grad_(True)
        with torch.no_grad():
            first = trunk.embed(torch.tensor([bos], device=trunk.get_device()))[0]
        self.first = nn.Parameter(first.float())
        self.level_embed = nn.Parameter(torch.zeros(max_levels, D))
        self.scale = nn.Parameter(torch.ones(max_levels))
        self.head = Head(head, D, D)
        init_linear(self.head)
        self.register_buffer("frequencies", trunk.frequencies.clone(), persistent=False)

    def _scaled(self, gists, level):
        return gists * self.scale[min(level, self.max_levels) - 1]

    def _pooled(self, children, level):
        x = children + self.level_embed[min(level, self.max_levels) - 1].to(children.dtype)
        x = torch.cat((self.first.expand(len(x), 1, -1).to(x.dtype), x), dim=1)
        x = x.to(autocast_dtype(x.device.type, x.dtype))
        places = torch.arange(x.size(1), device=x.device)
        cos_sin = tuple(t[None, :, None].to(x.dtype) for t in cos_sin_at(places, self.frequencies))
        for layer in self.copied:
            x = layer(x, cos_sin, None)
        x = norm(x[:, 1:])
        return norm(norm(x.mean(dim=1)) + x[:, -1])


class DeepGists(nn.Module):
    """
    The vectors that gists add to the residual stream before `count` of the layers after the first: one per gist and
    layer, initially 0.

    The first layer of a trained model adds vectors many times as long as embeddings, so little of a gist reaches the
    layers after it. Therefore gists add more there, scaled by the norm of the residual stream (see deepened).
    """

    def __init__(self, n_embd: int, count: int):
        super().__init__()
        self.head = Head("mlp", n_embd, count * n_embd)
        init_linear(self.head)

    @property
    def width(self) -> int:
        """Channels of all vectors of a gist together, count·D."""
        return self.head.c_proj.out_features

    def forward(self, pooled):
        """The vectors [M, count·D] from GistNet's pooled outputs [M, D]; see split_deep."""
        return self.head(pooled)


# -----------------------------------------------------------------------------------------------------
# Layers that LensNet has, too


def num_heads(n_embd: int, head_dim: int) -> int:
    """The largest number of heads of equal, even size with at least head_dim channels each; else 1."""
    return next((n for n in range(n_embd // head_dim, 1, -1) if n_embd % (2 * n) == 0), 1)


class BidirectionalAttention(Attention):
    """The GPT's attention without the causal mask: every position sees every other."""

    def forward(self, x, cos_sin):
        B, T, C = x.shape
        q, k, v = (linear(x).view(B, T, self.n_head, self.head_dim) for linear in (self.c_q, self.c_k, self.c_v))
        if cos_sin is not None:
            cos, sin = (t.to(q.dtype) for t in cos_sin)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        q, k = norm(q).transpose(1, 2), norm(k).transpose(1, 2)  # [B, H, T, d]
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Encoder(nn.Module):
    """
    [B, T, C] → [B, T, C], normalized. cos_sin: rotary angles [T, 1, d/2]; without them the order has no effect.
    """

    def __init__(self, n_layer: int, n_embd: int, head_dim: int):
        super().__init__()
        self.n_head = num_heads(n_embd, head_dim)
        self.head_dim = n_embd // self.n_head
        config = GPTConfig(n_layer=n_layer, n_head=self.n_head, n_kv_head=self.n_head, n_embd=n_embd)
        self.attn = nn.ModuleList(BidirectionalAttention(config) for _ in range(n_layer))
        self.mlp = nn.ModuleList(MLP(config) for _ in range(n_layer))

    def forward(self, x, cos_sin=None):
        for attn, mlp in zip(self.attn, self.mlp, strict=True):
            x = x + attn(norm(x), cos_sin)
            x = x + mlp(norm(x))
        return norm(x)


class Head(nn.Module):
    """[..., n_in] → [..., n_out]: one matrix ("linear"), or a ReLU² layer of 4·n_in before it ("mlp")."""

    def __init__(self, kind: str, n_in: int, n_out: int):
        super().__init__()
        self.c_fc = nn.Linear(n_in, 4 * n_in, bias=False) if kind == "mlp" else None
        self.c_proj = nn.Linear(n_in if self.c_fc is None else 4 * n_in, n_out, bias=False)

    def forward(self, x):
        if self.c_fc is not None:
            x = F.relu(self.c_fc(x)).square()
        return self.c_proj(x)


@torch.no_grad()
def init_linear(module):
    """The GPT's initialization of linear layers: every c_proj, the last layer of a residual branch or head, is zero."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            fan_out, fan_in = layer.weight.shape
            std = 0.0 if name.endswith("c_proj") else min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5
            nn.init.normal_(layer.weight, std=std)


def split_parameters(network, copied=()) -> tuple[list, list]:
    """
    (parameters for Muon, parameters for AdamW) of a network: its matrices; and all others, with the layers `copied`
    from a trained model, which Muon's steps of fixed size would overwrite.
    """
    left = {layer for part in copied for layer in part.modules()}
    layers = (layer for layer in network.modules() if layer not in left)
    matrices = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in network.parameters() if id(p) not in chosen]
