"""
What GistNet and LensNet share: an encoder (the GPT's blocks without the causal mask), a head, initialization.

Shapes: B batch, T positions, C channels.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.gpt import MLP, Attention, GPTConfig, apply_rotary, norm


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def num_heads(n_embd: int, head_dim: int) -> int:
    """The most attention heads of equal, even size that have at least head_dim channels each; else one."""
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
    [B, T, C] → [B, T, C], normalized. Without cos_sin, the rotary angles [T, 1, d/2], the order of the T is not seen.
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
        check_choice("head", kind, ("linear", "mlp"))
        self.c_fc = nn.Linear(n_in, 4 * n_in, bias=False) if kind == "mlp" else None
        self.c_proj = nn.Linear(n_in if self.c_fc is None else 4 * n_in, n_out, bias=False)

    def forward(self, x):
        if self.c_fc is not None:
            x = F.relu(self.c_fc(x)).square()
        return self.c_proj(x)


@torch.no_grad()
def init_linear(module):
    """The GPT's initialization of linear layers: every c_proj, which a residual or an output is made of, is zero."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            fan_out, fan_in = layer.weight.shape
            std = 0.0 if name.endswith("c_proj") else min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5
            nn.init.normal_(layer.weight, std=std)


def split_parameters(network) -> tuple[list, list]:
    """
    (matrices, others) of a network: what Muon is for, and for AdamW embeddings, single vectors, and what was copied
    from a finished model, which Muon's steps, of one length, would undo.
    """
    layers = (layer for name, layer in network.named_modules() if not name.startswith("copied."))
    matrices = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in network.parameters() if id(p) not in chosen]
