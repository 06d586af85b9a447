"""
Gaussian RoPE: rotary positions for spans of tokens.

An entry over n tokens from s on is somewhere in [s, s + n): on average at μ = s + (n − 1)/2, with the variance
σ² = (n² − 1)/12 of a uniform choice. The expected rotation by a normally distributed position is

    E[cos ωp] = cos(ωμ)·exp(−ω²σ²/2)        E[sin ωp] = sin(ωμ)·exp(−ω²σ²/2)        p ~ N(μ, σ²)

(the real and imaginary part of the normal distribution's characteristic function), so that low frequencies
survive and high ones fade: a gist is vague about where it is. A single token has σ = 0 and is exactly where
the plain model puts it. No span is vaguer than the slowest frequency can tell, σ ≤ 1 / ω: the model normalizes its
keys after the rotation, and one of zeros could not be found by anything that it says.
"""

import torch

from nanochat.gpt import rotary_cos_sin

MODES = ("gaussian", "simple")


def entry_cos_sin(start, span, head_dim, base=10000.0, mode="gaussian"):
    """
    cos and sin, each [B, W, 1, d/2] float32, of entries that cover `span` tokens from `start` on (both [B, W]).

    They are what `GPT.forward(cos_sin=…)` takes, bit for bit the plain model's where span is 1. mode "simple"
    places a span at its centre without fading. Exact up to positions of 2^52.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    device = start.device
    if device.type == "mps":  # which has no float64
        start, span = start.cpu(), span.cpu()
    mean = start.double() + (span.double() - 1) / 2
    cos, sin = (t.view(*start.shape, 1, -1) for t in rotary_cos_sin(mean.flatten(), head_dim, base))
    if mode == "simple":
        return cos.to(device), sin.to(device)
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=span.device) / head_dim)
    variance = ((span.double() ** 2 - 1) / 12).clamp(max=float(frequency[-1]) ** -2)
    fade = torch.exp(-(frequency**2) * variance[..., None, None] / 2).float()
    return (cos * fade).to(device), (sin * fade).to(device)
