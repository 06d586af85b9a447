"""Tiny models of transformers, made from their configurations."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

V, D = 300, 64
SHAPE = {
    **{"vocab_size": V, "hidden_size": D, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None},
    "pad_token_id": None,
}
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama 3": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **SCALED}),
    "mistral": MistralConfig(**SHAPE, head_dim=24, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "all heads alike": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
}


def of_transformers(config, seed=0):
    """A model in which every parameter matters: nn.init leaves norms at 1 and biases at 0."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.3 * torch.randn_like(p))
            elif "embed" in name:  # short ones, as in real models; a tied head then wants a large last norm
                p.normal_(std=0.05)
            else:
                p.normal_(std=0.3 if name.endswith("bias") else 1.5 * p.size(-1) ** -0.5)
        if config.tie_word_embeddings:
            model.model.norm.weight.mul_(5)
    return model
