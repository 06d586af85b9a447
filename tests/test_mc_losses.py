"""What LensNet is trained on and by, each against a loop; and that it learns from it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.gistnet import split_parameters
from megacontext.lensnet import LensNet
from megacontext.losses import ASKED, LEAST, LITTLE, asked_tokens, lens_loss, looks_for_content, old_blocks_of
from megacontext.reader import score
from megacontext.variants import random_variants
from megacontext.working_context import WorkingContext, old_blocks
from nanochat.gpt import GPT, GPTConfig, Looks, apply_rotary, norm
from nanochat.muon import Muon
from tests.helpers import BOS, RECENT, K, T, make_model, tokens


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------
# Who is asked


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(0, 40), st.integers(0, 2**32))
def test_tokens_that_are_asked_have_a_past_and_stand_in_the_context_if_they_can(n, recent, seed):
    context = random_variants(3, n, K, max(1, n // 2), recent, seeded(seed))
    count = ASKED // 8
    tokens, asked, places, there = asked_tokens(context, recent, count, seeded(seed))
    lod, start, _, valid = context.entries
    for t in (tokens, asked, places, there):
        assert t.shape == (3, min(count, n))
    for row in range(3):
        fit = [t for t in range(n) if old_blocks(t + 1, K, recent) > 0]
        standing = {int(start[row, i]): i for i in range(lod.size(1)) if valid[row, i] and lod[row, i] == 0}
        standing = {t: i for t, i in standing.items() if t in fit}
        mine = tokens[row][asked[row]].tolist()
        assert len(set(mine)) == len(mine) == min(count, len(fit))
        assert set(mine) <= set(fit)
        found = dict(zip(tokens[row][there[row]].tolist(), places[row][there[row]].tolist(), strict=True))
        assert found.items() <= standing.items()
        assert len(found) == min(count, len(standing))
        assert not (there & ~asked).any()


def test_every_token_is_asked_as_often_as_others():
    context, count = WorkingContext.finest(400, 100, K), 40
    tokens, asked, _, there = asked_tokens(context, RECENT, count, seeded())
    assert asked.all()
    assert there.all()
    first, share = RECENT + K - 1, count / (100 - RECENT - K + 1)
    counts = tokens.flatten().bincount(minlength=100)
    assert not counts[:first].any()
    assert (counts[first:] / 400 - share).abs().max() < 5 * math.sqrt(share * (1 - share) / 400)


def test_old_blocks_of_tokens():
    for recent in (0, 3, RECENT):
        asked = torch.arange(T)[None]
        old = old_blocks_of(asked, T // K, K, recent)
        for t in range(T):
            n = old_blocks(t + 1, K, recent)
            assert old[0, t].tolist() == [True] * n + [False] * (T // K - n)


# ---------------------------------------------------------------------------------------------------------
# Where they look


def content_of(weights, asked, sinks, old):
    """What looks_for_content is, of attention weights [layers, B, H, P, T]: number by number."""
    L, B, H, P, _ = weights.shape
    n = old.size(2)
    most = torch.zeros(B, P, n)
    for layer in range(L):
        for head in range(H):
            shares, by_age = {}, {}
            for b in range(B):
                for p in range(P):
                    for i in range(n):
                        if old[b, p, i]:
                            block = range(i * K, i * K + K)
                            share = sum(float(weights[layer, b, head, p, t]) for t in block if not sinks[b, t])
                            shares[b, p, i] = share
                            by_age.setdefault(int(asked[b, p]) // K - i, []).append(share)
            for (b, p, i), share in shares.items():
                usual = by_age[int(asked[b, p]) // K - i]
                most[b, p, i] = max(float(most[b, p, i]), share - sum(usual) / len(usual))
    return most


@pytest.mark.parametrize("n_kv_head", [1, 2])
@pytest.mark.parametrize(("length", "P"), [(T, 6), (4 * K, 3), (RECENT + K, 1)])
def test_looks_for_content_against_one_query_at_a_time(n_kv_head, length, P):
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, 70, 3, 2, n_kv_head, 32))
    model.init_rotary()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = tokens(B=3)[0][:, :length]
    sinks = torch.rand(3, length, generator=seeded()) < 0.2
    asked = torch.randint(length, (3, P), generator=seeded(1))  # also twice, and some without an old block
    asked[0, 0] = length - 1
    old = old_blocks_of(asked, old_blocks(length, K, RECENT), K, RECENT)
    looks = model.trunk(model.embed(x), asking=asked)[1]
    got = looks_for_content(looks, asked, sinks, K, old)

    seen = []  # inputs of each attention
    hooks = [block.attn.register_forward_pre_hook(lambda m, args: seen.append(args)) for block in model.transformer.h]
    model(x)
    for hook in hooks:
        hook.remove()
    weights = torch.zeros(3, 3, 2, P, length)
    for layer, (block, (h, (cos, sin), *_)) in enumerate(zip(model.transformer.h, seen, strict=True)):
        q, k = (f(h).view(3, length, -1, 16) for f in (block.attn.c_q, block.attn.c_k))
        q, k = norm(apply_rotary(q, cos, sin)), norm(apply_rotary(k, cos, sin))
        for b in range(3):
            for head in range(2):
                for p, t in enumerate(asked[b].tolist()):
                    logits = k[b, : t + 1, head * n_kv_head // 2] @ q[b, t, head] / 4
                    weights[layer, b, head, p, : t + 1] = logits.detach().softmax(0)
    expected = content_of(weights, asked, sinks, old)
    assert torch.allclose(got, expected, atol=1e-5)
    if P > 1:
        assert got.max() > 0.05


def test_states_are_those_before_the_last_layer():
    """And asking changes nothing of what the trunk says."""
    model = make_model()
    x = model.embed(tokens(B=2)[0])
    asked = torch.tensor([[3, 63, 20], [5, 5, 0]])
    out, looks = model.trunk(x, asking=asked)
    assert torch.equal(out, model.trunk(x)[0])
    assert model.trunk(x)[1] is None
    before = model.states(x)
    for row in range(2):
        assert torch.equal(looks.states[row], before[row, asked[row]])
    cos_sin = tuple(t[:, :T] for t in (model.cos, model.sin))
    last = model.transformer.h[-1]
    assert torch.equal(norm(last(before, cos_sin, None)), out)
    assert not looks.states.requires_grad
    assert not any(t.requires_grad for t in (*looks.queries, *looks.keys))


def looks_of(logits):
    """Looks with these attention logits [B, H, P, T] in one layer: the keys are the unit vectors."""
    n = logits.size(-1)
    keys = torch.eye(n).expand(len(logits), logits.size(1), n, n)
    return Looks((logits * n**0.5,), (keys,), None)


def test_what_the_place_explains_is_no_content():
    """Attention that falls with the distance, alike in all rows but for one block of each that says something."""
    B, P, n = 8, 3, (T - RECENT) // K
    asked = torch.tensor([[T - 1, T - 3, T - 2]]).expand(B, P)
    old = old_blocks_of(asked, n, K, RECENT)
    logits = -1.3 * (1 + asked[..., None] - torch.arange(T)).clamp(min=1).float().log()[:, None].repeat(1, 2, 1, 1)
    logits[..., : T - 2 * K] += 0.3
    none = looks_for_content(looks_of(logits), asked, torch.zeros(B, T, dtype=torch.bool), K, old)
    assert none.abs().max() < 0.03  # tokens of one block differ a little in how far they are from others
    answer = torch.randint(n - 2, (B,), generator=seeded())
    for b in range(B):
        logits[b, 1, :, answer[b] * K + 1] += 3  # one head of the two
    found = looks_for_content(looks_of(logits), asked, torch.zeros(B, T, dtype=torch.bool), K, old)
    assert (found.argmax(2) == answer[:, None]).all()
    others = found.masked_fill(torch.arange(n) == answer[:, None, None], 0)
    assert (found.amax(2) > 3 * others.amax(2)).all()


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
    x[0, 5 * K] = BOS
    asked = torch.tensor([[T - 1, 50, 45]]).expand(2, -1)
    old = old_blocks_of(asked, (T - RECENT) // K, K, RECENT)
    looks = model.trunk(model.embed(x), asking=asked)[1]
    counted = looks_for_content(looks, asked, torch.zeros_like(x, dtype=torch.bool), K, old)
    left_out = looks_for_content(looks, asked, x == BOS, K, old)
    assert (counted[0].argmax(1) == 5).all()
    assert (counted[0, :, 5] > 0.1).all()
    assert (left_out[0, :, 5] < 0.3 * counted[0, :, 5]).all()
    assert (left_out[0, :, 5] <= left_out[0].amax(1)).all()


# ---------------------------------------------------------------------------------------------------------
# The loss


def reference_loss(z, content, old, valid):
    B, P, n = z.shape
    total = weights = 0.0
    for b in range(B):
        for p in range(P):
            if valid[b, p]:
                of = [i for i in range(n) if old[b, p, i]]
                looked = [float(content[b, p, i]) for i in of]
                there = [c / (sum(looked) + LITTLE) for c in (*looked, LITTLE)]
                odds = [math.exp(float(z[b, p, i])) for i in of] + [1.0]
                said = [o / sum(odds) for o in odds]
                divergence = sum(a * math.log(a / q) for a, q in zip(there, said, strict=True) if a > 0)
                weight = LEAST + max(looked, default=0.0)
                total, weights = total + weight * divergence, weights + weight
    return total / weights if weights else 0.0


@pytest.mark.parametrize("much", [0.05, 0.5])  # sums below and above 1
def test_lens_loss_against_a_loop(much):
    z = (3 * torch.randn(3, 5, 7, generator=seeded())).requires_grad_()
    old = torch.arange(7) < torch.tensor([[7, 3, 1, 0, 5]] * 3)[..., None]
    content = (much * torch.rand(3, 5, 7, generator=seeded(1))).masked_fill(~old, 0)
    content[0, 0] = 0
    valid = torch.rand(3, 5, generator=seeded(2)) < 0.8
    loss = lens_loss(z, content, old, valid)
    assert loss.item() == pytest.approx(reference_loss(z.detach(), content, old, valid), rel=1e-5)
    loss.backward()
    assert z.grad.isfinite().all()
    assert torch.equal(z.grad != 0, old & valid[..., None])
    assert not lens_loss(z, content, old, torch.zeros_like(valid)).any()


def test_lens_loss_is_least_where_the_odds_are_right():
    old = torch.ones(1, 1, 4, dtype=torch.bool)
    content, valid = torch.tensor([[[0.5, 0.2, 0.1, 0.05]]]), torch.ones(1, 1, dtype=torch.bool)
    right = (content / LITTLE).log()  # as much is worth "none"
    assert lens_loss(right, content, old, valid).item() == pytest.approx(0, abs=1e-6)
    for i in range(4):
        assert lens_loss(right + 0.5 * (torch.arange(4) == i), content, old, valid) > 1e-3


def test_lens_learns_where_the_model_looks():
    """The model looks at one block if the token asks for one of its words, at none if it asks for another word."""
    torch.manual_seed(0)
    B, P, n, steps = 32, 16, 8, 150
    lens = LensNet(32)
    matrices, others = split_parameters(lens)
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.003)]
    words = norm(torch.randn(48, 32, generator=seeded()))
    generator = seeded()

    def batch():
        order = torch.rand(B, 48, generator=generator).argsort(1)
        asked = torch.randint(48, (B, P), generator=generator)
        children = words[order[:, : n * K]].view(B * n, K, 32)
        keys = lens.keys(children, children[:, :0]).view(B, n, -1)
        tokens = words[order.gather(1, asked)]
        z = lens(torch.cat((tokens, lens.words(lens.heard(tokens))), dim=-1), keys)
        content = torch.zeros(B, P, n + 4).scatter(2, asked[..., None] // K, 0.6)[..., :n]
        return z, content, torch.ones(B, P, n, dtype=torch.bool), torch.ones(B, P, dtype=torch.bool)

    for step in range(steps):
        lens_loss(*batch()).backward()
        for optimizer, rate in zip(optimizers, (0.02, 0.003), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, 2 * (steps - step) / steps)
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        z, content, _, _ = batch()
    scores, there = score(z), content.amax(2) > 0
    assert (z.argmax(2) == content.argmax(2))[there].float().mean() > 0.9
    assert scores[content > 0].mean() > 0.1  # 0.6 : 0.4
    assert (scores.amax(2)[~there] < 0.1).float().mean() > 0.9
    assert scores[content == 0].mean() < -0.8
