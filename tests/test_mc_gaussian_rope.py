"""Gaussian RoPE against its definition: averages of rotations over positions, and exact phases of far positions."""

import math

import mpmath
import pytest
import torch

from megacontext.reader import entry_positions
from nanochat.gpt import apply_rotary, positioned, rotary_cos_sin, rotary_frequencies

HEAD_DIM = 64
OMEGA = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)


def one(start, span, **kwargs):
    """The expected rotation, cos and sin [d/2], of a single entry."""
    cos, sin, *fade = entry_positions(torch.tensor([[start]]), torch.tensor([[span]]), OMEGA, **kwargs)
    if fade:
        assert torch.equal(*fade[0].chunk(2, dim=-1))  # both halves of a rotated pair fade alike
        cos, sin = (t * fade[0][..., : HEAD_DIM // 2] for t in (cos, sin))
    return cos.flatten().double(), sin.flatten().double()


@pytest.mark.parametrize("mode", ["gaussian", "simple"])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 6, 64, 128])
def test_single_tokens_are_where_the_plain_model_puts_them_bit_for_bit(head_dim, base, mode):
    plain = rotary_cos_sin(torch.arange(3000), head_dim, base)
    for B, W in ((1, 3000), (1, 1), (3, 777), (2, 13)):
        start = torch.randint(0, 3000, (B, W)) if B > 1 else torch.arange(W)[None]
        got = entry_positions(start, torch.ones_like(start), rotary_frequencies(head_dim, base), mode)
        assert all((fade == 1).all() for fade in got[2:])
        for mine, other in zip(got[:2], plain, strict=True):
            assert mine.dtype == torch.float32
            assert mine.shape == (B, W, 1, head_dim // 2)
            assert torch.equal(mine[:, :, 0], other[start])


@pytest.mark.parametrize(("start", "span"), [(0, 2), (96, 32), (2048, 1024)])
def test_fading_is_the_average_over_normally_distributed_positions(start, span):
    positions = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = start + (span - 1) / 2 + positions * math.sqrt((span**2 - 1) / 12)
    phase = positions[:, None] * OMEGA
    for mine, sampled in zip(one(start, span), (phase.cos().mean(0), phase.sin().mean(0)), strict=True):
        assert (mine - sampled).abs().max() < 5 / math.sqrt(len(positions))  # five standard errors at the very most


@pytest.mark.parametrize(("start", "span"), [(0, 2), (7, 8), (96, 32), (2048, 1024), (32768, 8192)])
def test_slow_frequencies_see_the_average_over_the_span(start, span):
    """The characteristic functions of the span and of the normal distribution agree up to the fourth order."""
    phase = torch.arange(start, start + span, dtype=torch.float64)[:, None] * OMEGA
    spread = OMEGA * math.sqrt((span**2 - 1) / 12)
    kurtosis = 6 / 5 * (span**2 + 1) / (span**2 - 1)  # what a uniform choice of n lacks of the normal one's
    slow, bound = spread < 1, kurtosis / math.factorial(4) * spread**4 + 1e-6
    assert slow.any()
    for mine, exact in zip(one(start, span), (phase.cos().mean(0), phase.sin().mean(0)), strict=True):
        assert ((mine - exact).abs() <= bound)[slow].all()


def test_fast_frequencies_fade_and_slow_ones_stay():
    cos, sin = one(1024, 1024)
    radius = (cos**2 + sin**2).sqrt()
    assert radius[0] < 1e-30
    assert radius[-1] > 0.99
    assert (radius.diff() >= 0).all()


def test_simple_positions_are_the_centre_without_fading():
    for start, span in ((0, 32), (1024, 1024), (5, 4)):
        phase = (start + (span - 1) / 2) * OMEGA
        cos, sin = one(start, span, mode="simple")
        torch.testing.assert_close(cos, phase.cos(), atol=1e-7, rtol=0)
        torch.testing.assert_close(sin, phase.sin(), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("start", "span"), [(10_000_000, 1), (33_554_433, 1), (9_999_360, 32), (33_555_456, 1024)])
def test_far_positions_are_exact(start, span):
    with mpmath.workdps(50):
        for i in range(0, HEAD_DIM // 2):
            omega = mpmath.mpf(10000) ** (-mpmath.mpf(2 * i) / HEAD_DIM)
            phase = omega * (start + mpmath.mpf(span - 1) / 2)
            fade = mpmath.exp(-(omega**2) * mpmath.mpf(span**2 - 1) / 24)
            cos, sin = one(start, span)
            assert abs(cos[i].item() - mpmath.cos(phase) * fade) < 1.3e-7  # two roundings to float32
            assert abs(sin[i].item() - mpmath.sin(phase) * fade) < 1.3e-7


@pytest.mark.parametrize("span", [1, 32, 1024, 32768])
def test_the_fade_reaches_the_keys(span):
    """A key is the expectation of its rotation over the span, rotated in the plain model's order: never amplified."""
    x = torch.randn(1, 1, 3, HEAD_DIM, generator=torch.Generator().manual_seed(span))
    start = torch.tensor([[5 * span]])
    key = positioned(x, *entry_positions(start, torch.tensor([[span]]), OMEGA))
    cos, sin = one(5 * span, span)
    unit = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(key.double(), apply_rotary(unit.double(), cos, sin), atol=2e-6, rtol=0)
    assert (key.norm(dim=-1) <= (1 + 1e-6) * unit.norm(dim=-1)).all()
