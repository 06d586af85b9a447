"""
Llama-like decoders of transformers in a GPT's place: Llama and SmolLM, Mistral, Qwen2 and Qwen3.

The weights and the small modules are those of transformers; attention, positions and losses are the GPT's,
which take positions and embeddings from outside. What differs: norms have weights, matrices may have biases, queries
and keys are normalized before the rotation (Qwen3) or not at all, rotation goes the other way round, the MLP is a gated
one, the head may be the embedding, and logits have no softcap.

Token embeddings of these models have a length of their own, an RMS of 0.02 say, where the GPT's and what GistNet makes
have 1. So the weights are rescaled such that nothing changes but the length of the residual stream.
"""

import copy
import math

import torch
import torch.nn as nn

from nanochat.common import UserError
from nanochat.decode import network_of
from nanochat.gpt import GPT, GPTConfig, apply_rotary, attend, deepened, split_deep

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # model_type of transformers' configurations
ROTARY = ("default", "linear", "llama3")  # kinds of positions whose frequencies do not depend on the length


class Layer(nn.Module):
    """One of transformers' decoder layers, called as the GPT's blocks are."""

    def __init__(self, layer, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm_1, self.norm_2 = layer.input_layernorm, layer.post_attention_layernorm
        self.attn, self.mlp = layer.self_attn, layer.mlp

    def heads(self, x, cos, sin, fade=None):
        """Queries, keys and values [B, H or H_kv, T, d] of x [B, T, D], at their positions."""
        x, attn = self.norm_1(x), self.attn
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if fade is not None:
            q, k = q * fade, k * fade
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def after(self, x, y):
        """The next x, with what attention found, y [B, T, H·d]."""
        x = x + self.attn.o_proj(y)
        return x + self.mlp(self.norm_2(x))

    def forward(self, x, cos_sin, asking=None, mask=None):
        y, look = attend(*self.heads(x, *cos_sin), asking, mask)
        x = self.after(x, y)
        return x if asking is None else (x, look)


class Llama(GPT):
    """
    model: a …ForCausalLM of transformers on its device, in the precision to compute in (not fp16, whose range is small
    for rescaled weights). It becomes a part of this one, and is no longer usable alone.

    Raises UserError for a model of another architecture, or with positions that this one has not.
    """

    softcap, sink = None, True

    def __init__(self, model):
        nn.Module.__init__(self)
        c, body = model.config, model.model
        if c.model_type not in FAMILIES:
            raise UserError(f"expected a model of the type {', '.join(FAMILIES)}, got one of type {c.model_type!r}")
        rotary = body.rotary_emb
        if rotary.rope_type not in ROTARY or rotary.attention_scaling != 1 or 2 * len(rotary.inv_freq) != self._d(body):
            raise UserError(f"expected rotary positions of the kind {', '.join(ROTARY)}, got {c.rope_parameters}")
        heads, window = (c.num_attention_heads, c.num_key_value_heads), getattr(c, "sliding_window", None)
        length = min(c.max_position_embeddings, window or c.max_position_embeddings)  # up to which it sees all tokens
        self.config = GPTConfig(length, c.vocab_size, c.num_hidden_layers, *heads, c.hidden_size)
        layers = (Layer(layer, self._d(body)) for layer in body.layers)
        self.transformer = nn.ModuleDict({"wte": body.embed_tokens, "h": nn.ModuleList(layers)})
        self.norm, self.lm_head = body.norm, model.lm_head
        device = self.get_device()
        self._frequencies = -rotary.inv_freq.double().to("cpu" if device.type == "mps" else device)
        self._rotary_cache(length, self._frequencies)
        self._rescale()

    @staticmethod
    def _d(body):
        return body.layers[0].self_attn.head_dim

    @torch.no_grad()
    def _rescale(self):
        """
        Divide the residual stream by the length of embeddings, to the nearest power of two, so that nothing is rounded:
        what is put into it is divided, and what is read from it is normalized, for which ε is to be divided, too.
        """
        wte, head = self.transformer.wte.weight, self.lm_head.weight
        length = 2.0 ** round(math.log2(wte.float().square().mean().sqrt().item()))
        wte.div_(length)
        if head.data_ptr() == wte.data_ptr():  # tied: the logits stay what they are
            self.norm.weight.mul_(length)
        for layer in self.transformer.h:
            for matrix in (layer.attn.o_proj, layer.mlp.down_proj):
                for parameter in matrix.parameters():
                    parameter.div_(length)
        for norm in (self.norm, *(norm for layer in self.transformer.h for norm in (layer.norm_1, layer.norm_2))):
            norm.variance_epsilon /= length**2

    @property
    def frequencies(self):
        return self._frequencies

    def embed(self, idx):
        return self.transformer.wte(idx)

    def final_norm(self, x):
        return self.norm(x)


class LlamaNetwork:
    """What a Decoder calls, see decode.Network: the model's own modules, in another precision if need be."""

    def __init__(self, model: Llama, dtype):
        parts = model.transformer, model.norm, model.lm_head
        if model.lm_head.weight.dtype != dtype:
            parts = (part.to(dtype) for part in copy.deepcopy(parts))
        (self.transformer, self.norm, self.head), self.config = parts, model.config

    def __call__(self, inputs, cos_sin, attend, last=(slice(None), -1)):
        x = inputs if inputs.is_floating_point() else self.transformer.wte(inputs)
        x, deep = split_deep(x.to(self.head.weight.dtype), self.config.n_embd, self.config.n_layer)
        for number, layer in enumerate(self.transformer.h):
            x = deepened(x, deep, number)
            states = x.flatten(0, 1)
            x = layer.after(x, attend(number, *layer.heads(x, *cos_sin)).view(*x.shape[:2], -1))
        return self.head(self.norm(x[last])).float(), states


network_of.register(Llama, LlamaNetwork)
