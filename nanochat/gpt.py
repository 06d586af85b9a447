"""
The GPT: a decoder-only Transformer with rotary positions, QK norm, ReLU² MLPs, grouped-query attention,
parameter-free RMSNorm, an untied head and softcapped logits. No biases anywhere.

Shapes: B batch, T time, D = n_embd, H = n_head, H_kv = n_kv_head, d = D / H, V = vocab_size.

The model does not deal with devices, precision, compilation or processes; callers apply them from outside.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.adamw import DistAdamW
from nanochat.common import autocast_dtype, get_dist_info
from nanochat.cross_entropy import loss_of_rows, softcap, softcap_cross_entropy
from nanochat.muon import DistMuon, Muon

LOGIT_SOFTCAP = 15.0
VOCAB_MULTIPLE = 64  # the rows of embedding and head are padded to a multiple of this, for fast matrix products


@dataclass
class GPTConfig:
    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768

    def __post_init__(self):
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd must be an even multiple of n_head, got {self.n_embd} and {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head must divide n_head, got {self.n_kv_head} and {self.n_head}")

    @classmethod
    def from_depth(cls, depth: int, sequence_len: int, vocab_size: int) -> "GPTConfig":
        """The configuration of a depth: width 64 per layer, heads of 128 channels, their number rounded up."""
        n_embd = depth * 64
        n_head = max(1, (n_embd + 127) // 128)
        while n_embd % n_head or (n_embd // n_head) % 2:
            n_head += 1  # odd depths: the next larger number of heads that divides the width
        return cls(sequence_len, vocab_size, depth, n_head, n_head, n_embd)

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def norm(x):
    """x [..., D] divided by its root mean square, in the precision it came in."""
    with torch.autocast(x.device.type, enabled=False):  # which on CUDA would make the whole residual stream float32
        return F.rms_norm(x, (x.size(-1),))


def apply_rotary(x, cos, sin):
    """Rotate the two halves of x [B, T, H, d] by −θ: y1 = x1·cos + x2·sin, y2 = −x1·sin + x2·cos."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def rotary_frequencies(head_dim, base=10000.0, device="cpu"):
    """Radians per position of each pair of channels, float64 [d/2]; on the CPU for MPS, which has no float64."""
    device = "cpu" if torch.device(device).type == "mps" else device
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)


def cos_sin_at(positions, frequencies):
    """
    cos and sin [T, d/2] in float32 of positions [T] at frequencies [d/2], see rotary_frequencies. Phases are taken in
    float64: exact for long streams.
    """
    phase = positions.to(frequencies.device).double()[:, None] * frequencies
    return phase.cos().float().to(positions.device), phase.sin().float().to(positions.device)


def rotary_cos_sin(positions, head_dim, base=10000.0):
    """The same at the frequencies of heads of d channels."""
    return cos_sin_at(positions, rotary_frequencies(head_dim, base, positions.device))


def positioned(x, cos, sin, fade=None):
    """Queries or keys x [B, T, H, d], rotated, normalized and, if there is a fade [B or 1, T, 1, d], faded."""
    x = norm(apply_rotary(x, cos, sin))
    return x if fade is None else x * fade


def split_deep(x, n_embd, n_layer):
    """
    (embeddings [..., D], {layer: vectors that `deepened` adds before it}) of inputs [..., (1 + n)·D]: the n vectors
    after an embedding are added at n evenly spaced layers (DeepStack, arXiv 2406.04334).
    """
    if x.size(-1) == n_embd:  # a view of x, the same but for its strides, would be compiled again
        return x, {}
    x, *deep = x.split(n_embd, dim=-1)
    return x.contiguous(), {(i + 1) * n_layer // (len(deep) + 1): vectors for i, vectors in enumerate(deep)}


def deepened(x, deep, layer):
    """
    The residual stream x [..., D] before a layer, plus the vectors that split_deep has for it, scaled by the root mean
    square of x. That is 1 for embeddings, but many times as large in later layers.
    """
    if layer not in deep:
        return x
    scale = x.detach().square().mean(-1, keepdim=True).sqrt()
    return x + scale.to(x.dtype) * deep[layer]  # on CUDA, autocast squares in float32


class Looks(NamedTuple):
    """
    Data on the attention of P tokens per row, without gradients: per layer their queries [B, H, P, d] and the keys of
    all tokens [B, H_kv, T, d]; states [B, P, D] of the P tokens before the last layer.
    """

    queries: tuple
    keys: tuple
    states: torch.Tensor


def attend(q, k, v, asking, mask=None):
    """
    Causal attention: (outputs [B, T, H·d] for q [B, H, T, d] and k, v [B, H_kv, T, d]; this layer's part of Looks, or
    None). asking: see GPT.trunk. mask: see causal_mask.
    """
    B, H, T, d = q.shape
    y = attention(q, k, v, mask, causal=mask is None).transpose(1, 2).reshape(B, T, H * d)
    if asking is None:
        return y, None
    return y, (q.detach().gather(2, asking[:, None, :, None].expand(-1, H, -1, d)), k.detach())


def attention(q, k, v, mask=None, causal=False):
    """Values [B, H, T, d] for queries q [B, H, T, d], of k, v [B, H_kv, n, d], in memory that is linear in T."""
    H = q.size(1)
    if mask is not None and k.size(1) != H:  # with a mask no fused kernel of CUDA takes fewer heads of keys
        k, v = (t.repeat_interleave(H // t.size(1), dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=k.size(1) != H)


def causal_mask(key_bias, T, dtype):
    """
    The additive mask [B, 1, T, n] for T queries at the last positions, with a bias [B, n] per key: −inf for later keys.
    """
    n = key_bias.size(1)
    later = torch.full((T, n), -torch.inf, device=key_bias.device).triu(n - T + 1)
    return (key_bias[:, None, None] + later).to(dtype)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.c_q = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=False)
        self.c_k = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos_sin, asking=None, mask=None):
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        q = positioned(q, *cos_sin).transpose(1, 2)  # [B, H, T, d]
        k = positioned(k, *cos_sin).transpose(1, 2)  # [B, H_kv, T, d]
        y, look = attend(q, k, v, asking, mask)
        return self.c_proj(y), look


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos_sin, asking=None, mask=None):
        y, look = self.attn(norm(x), cos_sin, asking, mask)
        x = x + y
        x = x + self.mlp(norm(x))
        return x if asking is None else (x, look)


def _embedding(rows, n_embd):
    """Not filled yet: nn.Embedding's own random start, on the meta device, would load seconds of torch's compiler."""
    return nn.Embedding(rows, n_embd, _weight=torch.empty(rows, n_embd))


def make_optimizers(adam_groups, matrices, matrix_lr, weight_decay=0.0) -> list[torch.optim.Optimizer]:
    """[AdamW for the groups, Muon for the matrices], sharded over ranks under torchrun; groups keep `initial_lr`."""
    adam_args = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": weight_decay}
    if get_dist_info()[0]:
        optimizers = [DistAdamW(adam_groups, **adam_args), DistMuon(matrices, lr=matrix_lr)]
    else:
        optimizers = [torch.optim.AdamW(adam_groups, fused=True, **adam_args), Muon(matrices, lr=matrix_lr)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


class GPT(nn.Module):
    softcap = LOGIT_SOFTCAP  # of the logits; None for none
    sink = False  # whether a token must come first: models that were never taught otherwise break there on a gist

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": _embedding(config.padded_vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        # Not part of the checkpoint. Ten times sequence_len costs little and allows longer generation.
        self._rotary_cache(config.sequence_len * 10, self.frequencies)

    @property
    def frequencies(self):
        """
        Of the rotary positions: radians per token of each pair of channels of a head, float64 [d/2]; negative in models
        that turn them the other way.
        """
        return rotary_frequencies(self.config.n_embd // self.config.n_head, device=self.get_device())

    def _rotary_cache(self, length, frequencies):
        cos, sin = cos_sin_at(torch.arange(length, device=frequencies.device), frequencies)
        self.register_buffer("cos", cos[None, :, None, :], persistent=False)  # [1, length, 1, d/2]
        self.register_buffer("sin", sin[None, :, None, :], persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """Initialize parameters and buffers in place (the model may have been created on the meta device)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                fan_out, fan_in = module.weight.shape
                std = min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=1.0)
        nn.init.zeros_(self.lm_head.weight)
        for block in self.transformer.h:
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
        self.init_rotary()
        if self.get_device().type == "cuda":
            self.transformer.wte.to(dtype=torch.bfloat16)  # halves the memory of the largest lookup table

    def init_rotary(self):
        """Compute the buffers, which are not in checkpoints."""
        self._rotary_cache(self.max_seq_len, self.frequencies)

    @property
    def max_seq_len(self) -> int:
        """The longest input: the number of positions with rotary angles."""
        return self.cos.size(1)

    def get_device(self):
        return self.transformer.wte.weight.device

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 per matrix parameter, 12·H·d·T per layer of attention (PaLM, appendix B)."""
        c, head_dim = self.config, 2 * len(self.frequencies)
        matrix_params = sum(p.numel() for p in self.transformer.h.parameters()) + self.lm_head.weight.numel()
        return 6 * matrix_params + 12 * c.n_layer * c.n_head * head_dim * c.sequence_len

    def setup_optimizers(
        self, unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02, weight_decay=0.0
    ) -> list[torch.optim.Optimizer]:
        """[AdamW for embedding and head, Muon for the block matrices]; every group keeps its `initial_lr`."""
        scale = (self.config.n_embd / 768) ** -0.5  # the rates were tuned for width 768
        adam_groups = [
            {"params": list(self.lm_head.parameters()), "lr": unembedding_lr * scale},
            {"params": list(self.transformer.wte.parameters()), "lr": embedding_lr * scale},
        ]
        return make_optimizers(adam_groups, list(self.transformer.h.parameters()), matrix_lr, weight_decay)

    def embed(self, idx):
        """Normalized token embeddings [B, T, D] of idx [B, T]: the space of `inputs_embeds`."""
        x = norm(self.transformer.wte(idx))
        # The table is bf16 on GPUs. Autocast converts the matrices; without it, activations must have their precision
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.lm_head.weight.dtype)

    def final_norm(self, x):
        """The head's input, from the activations after the last layer."""
        return norm(x)

    loss_of_rows = staticmethod(loss_of_rows)  # in whose place a compiled one may be put

    def trunk(self, x, cos_sin=None, asking=None, key_bias=None):
        """
        (activations [B, T, D] that the head reads, looks) of embeddings x [B, T, D], or what `split_deep` takes; the
        other arguments as of forward.

        asking: indices [B, P] int64 of the tokens for which to return Looks; None for no looks.
        """
        cos_sin, mask = self._placed(x, cos_sin, key_bias)
        pairs, states = [], None
        x, deep = split_deep(x, self.config.n_embd, self.config.n_layer)
        for layer, block in enumerate(self.transformer.h):
            x = deepened(x, deep, layer)
            if asking is not None and block is self.transformer.h[-1]:
                states = x.detach().gather(1, asking[..., None].expand(-1, -1, x.size(-1)))
            x = block(x, cos_sin, asking, mask)
            if asking is not None:
                x, pair = x
                pairs.append(pair)
        return self.final_norm(x), None if asking is None else Looks(*zip(*pairs, strict=True), states)

    @torch.no_grad()
    def states(self, x, cos_sin=None, key_bias=None):
        """The last layer's input [B, T, D], for inputs as of `trunk`; without a gradient."""
        last = self.config.n_layer - 1
        cos_sin, mask = self._placed(x, cos_sin, key_bias)
        x, deep = split_deep(x, self.config.n_embd, self.config.n_layer)
        for layer, block in enumerate(self.transformer.h[:last]):
            x = deepened(x, deep, layer)
            x = block.forward(x, cos_sin, mask=mask)  # never compiled: a graph of its own would cost more than it saves
        return deepened(x, deep, last)

    def _placed(self, x, cos_sin, key_bias):
        """The rotary angles of x, None for those of the first positions, and its mask; in the layers' precision."""
        if cos_sin is None:
            length = x.size(1)
            if length > self.max_seq_len:
                raise ValueError(
                    f"{length} tokens are more than the {self.max_seq_len} positions of this model: shorten the input"
                )
            cos_sin = self.cos[:, :length], self.sin[:, :length]
        dtype = autocast_dtype(x.device.type, x.dtype)  # of what the layers make of x
        mask = None if key_bias is None else causal_mask(key_bias, x.size(1), dtype)
        return tuple(t.to(dtype) for t in cos_sin), mask  # once for all layers

    def forward(
        self,
        idx=None,
        targets=None,
        loss_reduction="mean",
        *,
        inputs_embeds=None,
        cos_sin=None,
        key_bias=None,
        row_weights=None,
        teacher=None,
        asking=None,
    ):
        """
        Logits [B, T, V] in float32, or the cross-entropy (nats) when targets are given.

        idx [B, T] token ids, or inputs_embeds [B, T, D] as `embed` makes them (exactly one of the two); see split_deep.
        targets [B, T] with −1 for positions without a target. loss_reduction "mean" (over the targets; 0 if there
        are none), "sum", or "none" ([B·T], 0 without a target).
        row_weights [B, T]: return (sum of the losses times these, the losses [B·T] without a gradient) instead.
        teacher [B, T, D], with row_weights: activations as of `trunk`, from which the loss is the divergence.
        cos_sin: (cos, sin), each [B or 1, T, 1, d/2], instead of positions 0, 1, …; or (cos, sin, fade), the
        last [B or 1, T, 1, d], a factor of the normalized queries and keys.
        key_bias [B, T]: a bias on the attention scores of each key.
        asking: if given, return (all this, looks): see trunk.
        """
        if (idx is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of idx and inputs_embeds, got both or neither")
        x = self.embed(idx) if inputs_embeds is None else inputs_embeds
        x, looks = self.trunk(x, cos_sin, asking, key_bias)
        if targets is None:
            result = softcap(self.lm_head(x)[..., : self.config.vocab_size], self.softcap)
        else:
            V, weight = self.config.vocab_size, self.lm_head.weight
            result = softcap_cross_entropy(
                x, weight, targets, V, self.softcap, loss_reduction, row_weights, self.loss_of_rows, teacher
            )
        return result if asking is None else (result, looks)
