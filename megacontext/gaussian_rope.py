"""
Rotary positions of the entries of a working context.

"rank": one after another, a position each; no distance exceeds the working context. "gaussian" and "simple": where
their spans are in the stream.

Gaussian RoPE: an entry over n tokens from s on stands at the position μ = s + (n − 1)/2, with the variance
σ² = (n² − 1)/12 of a uniform choice from its span. The expected rotation by a normally distributed position is the
rotation by μ times a fade that depends on the frequency ω:

    E[cos ωp] = cos(ωμ)·exp(−ω²σ²/2)        E[sin ωp] = sin(ωμ)·exp(−ω²σ²/2)        p ~ N(μ, σ²)

(real and imaginary part of the normal distribution's characteristic function). Low frequencies survive and high ones
fade, so a gist is vague about where it is. A single token has σ = 0: it is rotated as in the plain model and not faded.

The model normalizes queries and keys after the rotation, which would undo the fade. So the fade is a factor of its own,
applied last: rotation keeps norms and commutes with the fade, so that rotate, normalize, fade gives the expectation.
"""

import torch

from nanochat.gpt import cos_sin_at

MODES = ("rank", "gaussian", "simple")


def as_positions(entries, mode):
    """The entries with the first position of each for `start`, and for `span` how many positions it takes."""
    if mode != "rank":
        return entries
    ranks = torch.arange(entries.start.size(1)).expand_as(entries.start)
    return entries._replace(start=ranks, span=torch.ones_like(entries.span))


def entry_positions(start, span, frequencies, mode="gaussian"):
    """
    (cos, sin, fade) of entries that take `span` positions from `start` on, both [B, W]; all are float32.

    frequencies: the model's. cos and sin [B, W, 1, d/2] are bit for bit those of the plain model where span is 1; fade
    [B, W, 1, d] is 1 there. Other modes give (cos, sin): the centre of the span, without a fade. Both are what
    `GPT.forward(cos_sin=…)` takes.

    A span is taken to be no vaguer than the slowest frequency can tell, σ ≤ 1/ω, so that of every key something is
    left. Exact up to positions of 2^52. Raises ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    device = start.device
    if device.type == "mps":  # which has no float64
        start, span = start.cpu(), span.cpu()
    mean = start.double() + (span.double() - 1) / 2
    cos, sin = (t.view(*start.shape, 1, -1).to(device) for t in cos_sin_at(mean.flatten(), frequencies))
    if mode != "gaussian":
        return cos, sin
    variance = torch.minimum((span.double() ** 2 - 1) / 12, frequencies.abs().min() ** -2)
    fade = torch.exp(-(frequencies**2) * variance[..., None, None] / 2).float().to(device)
    return cos, sin, torch.cat((fade, fade), dim=-1)
