"""
Where the dense model looks: what LensNet learns from.

Shapes: B sequences of T tokens, K = block_size, D = n_embd, H heads of d channels, n old blocks.
"""

import torch

from nanochat.gpt import apply_rotary, norm

ASKING = 4  # newest tokens whose attention says what detail is for


@torch.no_grad()
def attention_to_blocks(model, embeds, block_size, num_blocks):
    """
    The most [B, num_blocks] that one of the last ASKING tokens, in one head of one layer, attends to each of the first
    num_blocks blocks of embeds [B, T, D], as a share of all its attention.

    The most, and of few tokens: sums over heads and tokens drown the one head that looks up what is asked for now (see
    dev/LOG.md). It repeats the model's forward pass but for the last MLP and the head, and of each layer's attention
    the last part.
    """
    T, asking = embeds.size(1), min(ASKING, embeds.size(1))
    cos, sin = (t[:, :T].to(embeds.dtype) for t in (model.cos, model.sin))
    future = torch.ones(asking, T, dtype=torch.bool, device=embeds.device).triu(T - asking + 1)
    x, most = embeds, embeds.new_zeros(embeds.size(0), num_blocks, dtype=torch.float32)
    for layer, block in enumerate(model.transformer.h):
        attn, h = block.attn, norm(x)
        q = attn.c_q(h[:, -asking:]).unflatten(-1, (attn.n_head, attn.head_dim))
        k = attn.c_k(h).unflatten(-1, (attn.n_kv_head, attn.head_dim))
        q = norm(apply_rotary(q, cos[:, -asking:], sin[:, -asking:])).transpose(1, 2)  # [B, H, asking, d]
        k = norm(apply_rotary(k, cos, sin)).transpose(1, 2)  # [B, H_kv, T, d]
        k = k.repeat_interleave(attn.n_head // attn.n_kv_head, dim=1)
        weights = (q @ k.transpose(2, 3)).float() / attn.head_dim**0.5
        weights = weights.masked_fill(future, -torch.inf).softmax(-1)[..., : num_blocks * block_size]
        most = torch.maximum(most, weights.unflatten(-1, (num_blocks, block_size)).sum(-1).amax((1, 2)))
        if layer + 1 < len(model.transformer.h):
            x = block(x, cos, sin, None)
    return most
