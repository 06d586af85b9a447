"""
Where the dense model looks: what LensNet learns from.

Shapes: B sequences of T tokens, K = block_size, D = n_embd, H heads of d channels, n old blocks.
"""

import torch

from nanochat.gpt import apply_rotary, norm


@torch.no_grad()
def attention_to_blocks(model, embeds, block_size, recent, num_blocks):
    """
    Shares [B, num_blocks] of the attention that the last `recent` tokens pay to each of the first num_blocks blocks of
    embeds [B, T, D], summed over layers, heads and tokens; a row adds up to 1.

    It repeats the model's forward pass but for the last MLP and the head, and of each layer's attention the last part.
    """
    T = embeds.size(1)
    cos, sin = (t[:, :T].to(embeds.dtype) for t in (model.cos, model.sin))
    future = torch.ones(recent, T, dtype=torch.bool, device=embeds.device).triu(T - recent + 1)
    x, total = embeds, 0.0
    for layer, block in enumerate(model.transformer.h):
        attn, h = block.attn, norm(x)
        q = attn.c_q(h[:, -recent:]).unflatten(-1, (attn.n_head, attn.head_dim))
        k = attn.c_k(h).unflatten(-1, (attn.n_kv_head, attn.head_dim))
        q = norm(apply_rotary(q, cos[:, -recent:], sin[:, -recent:])).transpose(1, 2)  # [B, H, recent, d]
        k = norm(apply_rotary(k, cos, sin)).transpose(1, 2)  # [B, H_kv, T, d]
        k = k.repeat_interleave(attn.n_head // attn.n_kv_head, dim=1)
        weights = (q @ k.transpose(2, 3)).float() / attn.head_dim**0.5
        weights = weights.masked_fill(future, -torch.inf).softmax(-1)[..., : num_blocks * block_size]
        total = total + weights.unflatten(-1, (num_blocks, block_size)).sum((1, 2, 4))
        if layer + 1 < len(model.transformer.h):
            x = block(x, cos, sin, None)
    return total / total.sum(1, keepdim=True)
