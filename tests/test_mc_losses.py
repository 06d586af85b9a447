"""What training minimizes and measures, each against a loop; and that LensNet learns from it."""

import numpy as np
import pytest
import torch

from megacontext.layers import split_parameters
from megacontext.lensnet import LensNet
from megacontext.losses import ASKING, attention_to_blocks, beyond_place, lens_loss, lens_targets
from megacontext.working_context import WorkingContext
from nanochat.gpt import GPT, GPTConfig, apply_rotary, norm
from nanochat.muon import Muon
from tests.helpers import BOS, RECENT, K, T, make_model, tokens


@pytest.mark.parametrize("n_kv_head", [1, 2])
@pytest.mark.parametrize(("length", "old"), [(T, (T - RECENT) // K), (2 * K, 2), (K, 1)])  # then it looks at itself
def test_attention_to_blocks_against_one_query_at_a_time(n_kv_head, length, old):
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, 70, 3, 2, n_kv_head, 32))
    model.init_rotary()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = tokens(B=2)[0][:, :length]
    sinks = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.2
    got = attention_to_blocks(model.trunk(model.embed(x), asking=ASKING)[1], sinks, K, old)

    seen = []  # inputs of each attention
    hooks = [block.attn.register_forward_pre_hook(lambda m, args: seen.append(args)) for block in model.transformer.h]
    model(x)
    for hook in hooks:
        hook.remove()
    expected = torch.zeros(2, old)
    for block, (h, (cos, sin), *_) in zip(model.transformer.h, seen, strict=True):
        q, k = (f(h).view(2, length, -1, 16) for f in (block.attn.c_q, block.attn.c_k))
        q, k = norm(apply_rotary(q, cos, sin)), norm(apply_rotary(k, cos, sin))
        for b in range(2):
            for head in range(2):
                for t in range(max(0, length - ASKING), length):
                    logits = k[b, : t + 1, head * n_kv_head // 2] @ q[b, t, head] / 4
                    weights = logits.softmax(0) * ~sinks[b, : t + 1]
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


def test_a_bos_draws_no_detail():
    """All tokens look at BOS, whatever else is there: without sinks, its block is wanted no more than others."""
    model = make_model()
    slow = 7  # of the 8 frequencies of a head the one that rotates least
    with torch.no_grad():
        model.transformer.wte.weight[:, 0], model.transformer.wte.weight[:, 1] = 1, 0
        model.transformer.wte.weight[BOS, 1] = 20
        for block in model.transformer.h:
            block.attn.c_q.weight.zero_()
            block.attn.c_q.weight[[slow, 16 + slow], 0] = 1  # queries: the channel that all tokens have
            block.attn.c_k.weight[[slow, 16 + slow], 1] = 20  # keys: the one that only BOS has
    x = tokens(B=2)[0]
    x = x.where(x != BOS, 1)
    x[:, 5 * K] = BOS
    old = (T - RECENT) // K
    counted = attention_to_blocks(
        model.trunk(model.embed(x), asking=ASKING)[1], torch.zeros_like(x, dtype=torch.bool), K, old
    )
    left_out = attention_to_blocks(model.trunk(model.embed(x), asking=ASKING)[1], x == BOS, K, old)
    assert (counted.argmax(1) == 5).all()
    assert (counted[:, 5] > 2 * left_out.amax(1)).all()
    others = torch.arange(old) != 5
    assert (left_out[:, 5] < left_out[:, others].amax(1)).all()
    assert torch.equal(counted[:, others], left_out[:, others])


def test_lens_targets():
    """Of blocks of K = 2; a node of two or four blocks is worth its best."""
    beyond = torch.tensor([[1.5, -2.0, -1.0, -0.5, 0.7, -0.1, 0.1, 0.0]])
    values = beyond.tanh()[0].tolist()
    lod_map = torch.tensor([[0, 1, 2, 2, 3, 3, 3, 3, 0, 0]], dtype=torch.int8)
    context = WorkingContext.from_map(lod_map, 20, 2)
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
        context = WorkingContext.from_map(lod_map, n * K + K, K)
        return context, context.per_block(lens(x, *context.entries, context.num_tokens)), asked

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
