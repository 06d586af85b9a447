"""What training minimizes and measures, each against a loop; and that LensNet learns from it."""

import numpy as np
import pytest
import torch

from megacontext.attention import ASKING, attention_to_blocks
from megacontext.layers import split_parameters
from megacontext.lensnet import LensNet
from megacontext.objective import (
    beyond_place,
    lens_loss,
    lens_targets,
    pairs_of_variants,
    preference_agreement,
    tail_nll,
)
from megacontext.working_context import WorkingContext
from nanochat.gpt import GPT, GPTConfig, apply_rotary, norm
from nanochat.muon import Muon
from tests.helpers import RECENT, K, T, tokens


def test_tail():
    rows = torch.arange(10.0).view(2, 5)
    assert tail_nll(rows, torch.tensor([5, 3]), 2).tolist() == [3.5, 6.5]


def test_pairs_are_different_and_of_one_sequence():
    a, b = pairs_of_variants(3, 4, 5, torch.Generator().manual_seed(0))
    assert a.shape == b.shape == (3, 5)
    for row in range(3):
        pairs = set(zip(a[row].tolist(), b[row].tolist(), strict=True))
        assert len(pairs) == 5
        assert all(row * 4 <= x < y < row * 4 + 4 for x, y in pairs)
    assert pairs_of_variants(2, 3, 100)[0].shape == (2, 3)
    assert pairs_of_variants(2, 1, 4)[0].shape == (2, 0)


def test_preference_agreement_against_a_loop():
    generator = torch.Generator().manual_seed(3)
    R, n = 6, 5
    scores = torch.rand(R, n, generator=generator) * 2 - 1
    lods = torch.randint(0, 3, (R, n), generator=generator).to(torch.int8)
    nll = torch.rand(R, generator=generator)
    pairs = pairs_of_variants(2, 3, 2, generator)
    difference, agreement = preference_agreement(scores, lods, nll, pairs)
    differences, right = [], []
    for a, b in zip(pairs[0].flatten().tolist(), pairs[1].flatten().tolist(), strict=True):
        d = nll[b].item() - nll[a].item()
        advantage = sum(
            (scores[a, i].item() + scores[b, i].item()) * (lods[b, i].item() - lods[a, i].item()) for i in range(n)
        )
        differences.append(d)
        right.append(d * advantage > 0)
    assert difference.flatten().tolist() == pytest.approx(differences, rel=1e-5)
    weights = [abs(d) / sum(map(abs, differences)) for d in differences]
    assert agreement.item() == pytest.approx(sum(w * r for w, r in zip(weights, right, strict=True)), rel=1e-5)


@pytest.mark.parametrize("n_kv_head", [1, 2])
@pytest.mark.parametrize(("length", "old"), [(T, (T - RECENT) // K), (2 * K, 2), (K, 1)])  # then it looks at itself
def test_attention_to_blocks_against_one_query_at_a_time(n_kv_head, length, old):
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, 70, 3, 2, n_kv_head, 32))
    model.init_rotary()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = tokens(B=2)[0][:, :length]
    got = attention_to_blocks(model, model.embed(x), K, old)

    seen = []  # inputs of each attention
    hooks = [block.attn.register_forward_pre_hook(lambda m, args: seen.append(args)) for block in model.transformer.h]
    model(x)
    for hook in hooks:
        hook.remove()
    expected = torch.zeros(2, old)
    for block, (h, cos, sin, _) in zip(model.transformer.h, seen, strict=True):
        q, k = (f(h).view(2, length, -1, 16) for f in (block.attn.c_q, block.attn.c_k))
        q, k = norm(apply_rotary(q, cos, sin)), norm(apply_rotary(k, cos, sin))
        for b in range(2):
            for head in range(2):
                for t in range(max(0, length - ASKING), length):
                    logits = k[b, : t + 1, head * n_kv_head // 2] @ q[b, t, head] / 4
                    weights = logits.softmax(0)
                    for i in range(old):
                        expected[b, i] = max(expected[b, i], weights[i * K : i * K + K].sum())
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("B", "n"), [(1, 12), (6, 12), (6, 3), (4, 1)])
def test_beyond_place_against_least_squares(B, n):
    shares = torch.rand(B, n, generator=torch.Generator().manual_seed(0)).softmax(1)
    distance = np.arange(n, 0, -1)
    columns = [np.ones(n), np.log(distance), np.log(distance) ** 2, distance == 1, distance == n]
    place = np.tile(np.stack([c.astype(float) for c in columns], 1), (B, 1))
    log = shares.log().double().numpy().reshape(-1)
    solution = np.linalg.lstsq(place, log, rcond=None)[0]
    expected = torch.from_numpy((log - place @ solution).reshape(B, n))
    assert torch.allclose(beyond_place(shares).double(), expected, atol=2e-3)


def test_beyond_place_leaves_the_content():
    """Attention that falls with the distance, with sinks at both ends, and one block a row that says something."""
    B, n = 8, 15
    generator = torch.Generator().manual_seed(0)
    asked = torch.randint(n, (B,), generator=generator)
    log = -1.3 * torch.arange(n, 0, -1).float().log() + 0.1 * torch.randn(B, n, generator=generator)
    log[:, -1] += 2
    log[:, 0] += 3
    log = log.scatter_add(1, asked[:, None], torch.full((B, 1), 1.5))
    assert (log.argmax(1) == asked).float().mean() < 0.6
    beyond = beyond_place(log.softmax(1))
    assert (beyond.argmax(1) == asked).all()
    assert beyond.mean().abs() < 1e-3


def test_lens_targets():
    """Of blocks of K = 2; a node of two or four blocks is worth its best."""
    beyond = torch.tensor([[1.5, -2.0, -1.0, -0.5, 0.7, -0.1, 0.1, 0.0]])
    values = beyond.tanh()[0].tolist()
    lod_map = torch.tensor([[0, 1, 2, 2, 3, 3, 3, 3, 0, 0]], dtype=torch.int8)
    context = WorkingContext(lod_map, 20, 2)
    got = lens_targets(beyond, context)[0].tolist()
    assert got == pytest.approx([values[0], values[1], values[3], values[3], *[values[4]] * 4], abs=1e-6)
    assert lens_loss(torch.zeros(1, 10), beyond, context).item() == pytest.approx(sum(v * v for v in got) / 8, rel=1e-5)


def test_lens_learns_where_the_model_looks():
    """The model is made to look at one block, which one depends on the newest tokens; a lens finds it in new texts."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    lens = LensNet(32, 8)
    matrices, others = split_parameters(lens)
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.003)]
    words = norm(torch.randn(16, 32, generator=generator))

    def batch(B, n=8):
        order = torch.rand(B, 16, generator=generator).argsort(1)[:, :n]
        asked = torch.randint(n, (B,), generator=generator)
        x = torch.cat((words[order], words[order.gather(1, asked[:, None])].expand(B, K, 32)), 1)
        lod_map = torch.tensor([[1] * n + [0]], dtype=torch.int8).expand(B, -1)
        context = WorkingContext(lod_map, n * K + K, K)
        return context, context.per_block(lens(x, *context.entries(), context.num_tokens)), asked

    for _ in range(150):
        context, scores, asked = batch(32)
        shares = torch.full((32, 8), 0.05).scatter(1, asked[:, None], 0.65)
        lens_loss(scores, beyond_place(shares), context).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        context, scores, asked = batch(256)
    assert (scores[:, :8].argmax(1) == asked).float().mean() > 0.9
    assert scores.gather(1, asked[:, None]).mean() > 0.3
    assert scores[:, :8].mean() < 0
