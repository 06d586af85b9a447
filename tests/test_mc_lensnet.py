"""LensNet: equals a slow reference, knows blocks by their words alone, and learns to look things up."""

import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megacontext.gistnet import split_parameters
from megacontext.lensnet import (
    FADE,
    HEADS,
    KEY,
    LEAK,
    NEWEST,
    NEWEST_FADE,
    SHARP,
    WIDTH,
    Demand,
    LensNet,
    word_size,
)
from megacontext.reader import score
from megacontext.tree import RamStore
from nanochat.muon import Muon
from tests.helpers import root_mean_square

D, K = 96, 4
OPTIONS = [{"layers": layers, "head": head} for layers, head in ((2, "mlp"), (2, "linear"), (4, "mlp"), (8, "linear"))]


def rms_norm(x):
    return F.rms_norm(x, (x.size(-1),))


def make(seed=0, spread=0.1, n_embd=D, **options):
    """A LensNet; spread > 0 moves all parameters off their initial values, so that every path matters."""
    torch.manual_seed(seed)
    lens = LensNet(n_embd, **options)
    with torch.no_grad():
        for p in lens.parameters():
            p.add_(torch.randn_like(p), alpha=spread)
    return lens


def blocks(n=10, seed=0, rows=()):
    return rms_norm(torch.randn(*rows, n, K, D, generator=torch.Generator().manual_seed(seed)))


def tokens_asking(rows=2, tokens=5, seed=1):
    """States as the trunk's, which are not normalized, and words."""
    random = torch.randn(rows, tokens, D + word_size(D), generator=torch.Generator().manual_seed(seed))
    return torch.cat((7 * random[..., :D], F.normalize(random[..., D:], dim=-1)), dim=-1)


def before(n=10, rows=()):
    return rms_norm(torch.randn(*rows, n, K // 2, D, generator=torch.Generator().manual_seed(8)))


def keys_of(lens, rows=2, n=10):
    children, earlier = blocks(n, rows=(rows,)).flatten(0, 1), before(n, (rows,)).flatten(0, 1)
    return lens.keys(children, earlier).unflatten(0, (rows, n))


def rms(v):
    return v / torch.sqrt((v * v).mean() + torch.finfo(torch.float64).eps)


def reference_key(lens, children):
    """The key of a block [K, D], token by token and head by head, in float64."""
    w = {name: p.detach().double() for name, p in lens.named_parameters()}
    H, C = lens.encoder.n_head, WIDTH
    d = C // H

    def rotated(v, place):
        a, b = v[: d // 2], v[d // 2 :]
        phase = place * 10000.0 ** (-torch.arange(0, d, 2).double() / d)
        return torch.cat((a * phase.cos() + b * phase.sin(), b * phase.cos() - a * phase.sin()))

    xs = [w["embed.weight"] @ (child.double() - lens.mean) for child in children]
    for layer in range(len(lens.encoder.attn)):
        q, k, v = ([w[f"encoder.attn.{layer}.{c}.weight"] @ rms(x) for x in xs] for c in ("c_q", "c_k", "c_v"))
        out = []
        for i in range(K):
            heads = []
            for h in range(H):
                part = slice(h * d, (h + 1) * d)
                query = rms(rotated(q[i][part], i))
                p = [torch.exp(query @ rms(rotated(k[j][part], j)) / math.sqrt(d)) for j in range(K)]
                heads.append(sum(p[j] * v[j][part] for j in range(K)) / sum(p))
            out.append(w[f"encoder.attn.{layer}.c_proj.weight"] @ torch.cat(heads))
        xs = [x + o for x, o in zip(xs, out, strict=True)]
        fc, proj = (w[f"encoder.mlp.{layer}.{c}.weight"] for c in ("c_fc", "c_proj"))
        xs = [x + proj @ torch.relu(fc @ rms(x)) ** 2 for x in xs]
    x = sum(rms(x) for x in xs) / K
    if "head.c_fc.weight" in w:
        x = torch.relu(w["head.c_fc.weight"] @ x) ** 2
    return rms(w["head.c_proj.weight"] @ x)


def reference_heard(lens, token):
    w = {name: p.double() for name, p in lens.named_buffers()}
    loud = token.double() @ w["loudness"][:-1] + w["loudness"][-1]
    return max(loud, 0.0) * (token.double() - w["mean"])


def reference_z(lens, asks, key):
    """z of one token for one block, head by head."""
    w = {name: p.detach().double() for name, p in (*lens.named_parameters(), *lens.named_buffers())}
    state, asked = asks.double().split((D, word_size(D)))
    key, words = key.double().split((KEY, word_size(D)))
    h = rms(state) - w["state_mean"]
    z = w["bias"][0] + w["anywhere"] @ h + w["match"][0] * asked @ words
    for head in range(HEADS):
        query = w["query.weight"][head * KEY : (head + 1) * KEY] @ h
        found = query @ key
        z = z + (w["weigh"][head] @ h) * (found if found > 0 else LEAK * found) / math.sqrt(KEY)
    return SHARP * z


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_keys_equal_the_reference(options):
    lens, children, earlier = make(**options).double(), blocks(3), before(3)
    nn.init.normal_(lens.mean, std=0.1)
    nn.init.normal_(lens.loudness, std=0.1)  # some tokens are not heard
    assert lens.encoder.n_head == 4
    keys = lens.keys(children.double(), earlier.double())
    assert keys.shape == (3, KEY + word_size(D))
    for key, block, some in zip(keys, children, earlier, strict=True):
        # The angles of rotary positions are float32
        torch.testing.assert_close(key[:KEY], reference_key(lens, block), atol=1e-6, rtol=0)
        words = sum(lens.projection @ reference_heard(lens, token) for token in (*some, *block))
        torch.testing.assert_close(key[KEY:].double(), words / words.norm(), atol=1e-6, rtol=0)
    assert (keys[0] - keys[1])[:KEY].abs().max() > 0.1


def test_z_and_what_is_wanted_equal_the_reference():
    lens, asks = make(), tokens_asking()
    with torch.no_grad():
        lens.state_mean.normal_(std=0.3)
        keys = keys_of(lens)
        z, heard = lens(asks, keys), lens.wanted(asks, keys)
    assert z.dtype == torch.float32
    assert z.shape == (2, 5, 10)
    for row, n in itertools.product(range(2), range(10)):
        expected = [float(reference_z(lens, asks[row, p], keys[row, n])) for p in range(5)]
        assert z[row, :, n].tolist() == pytest.approx(expected, abs=1e-3, rel=1e-4)
        assert heard[row, n].item() == pytest.approx(max(e - FADE * (4 - p) for p, e in enumerate(expected)), abs=1e-3)
    assert z.std() > 1


def test_an_untrained_lens_has_no_wishes_and_any_lens_scores_between_minus_one_and_one():
    for options in OPTIONS:
        lens = LensNet(D, **options)
        assert not score(lens.wanted(tokens_asking(), keys_of(lens))).any()
        lens = make(**options)
        scores = score(lens(tokens_asking(), keys_of(lens)).detach())
        assert scores.abs().max() <= 1
        assert scores.min() < -0.1
        assert scores.max() > 0.1


def test_nothing_scores_1():
    """Which a threshold of 1 relies on, however sure a lens is: in float32 tanh(9.1) is 1."""
    assert score(torch.tensor([-99.0, 99.0])).abs().max() < 1
    assert score(torch.tensor([-99.0, 99.0])).prod() < -0.999999


def test_every_option_changes_parameters_and_keys():
    lenses = [make(**options) for options in OPTIONS]
    for a, b in itertools.combinations(lenses, 2):
        assert dict(a.named_parameters()).keys() != dict(b.named_parameters()).keys()
        assert not torch.allclose(keys_of(a), keys_of(b), atol=1e-3)


def test_a_key_knows_all_words_of_its_block_and_their_order_and_nothing_else():
    lens, children, earlier = make(), blocks(), before()
    keys = lens.keys(children, earlier)
    for token in range(K):
        changed = children.clone()
        changed[3, token] = -changed[3, token]
        moved = (lens.keys(changed, earlier) - keys).abs()
        assert moved[3, :KEY].max() > 1e-3
        assert moved[3, KEY:].max() > 1e-3
        assert moved[torch.arange(10) != 3].max() < 1e-5
    moved = (lens.keys(children, -earlier) - keys).abs()  # what comes before counts as words only
    assert moved[:, :KEY].max() < 1e-5 < 1e-3 < moved[:, KEY:].max()
    assert (lens.keys(children.flip(1), earlier) - keys)[:, :KEY].abs().amax() > 1e-3
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))  # its place does not matter
    torch.testing.assert_close(lens.keys(children[order], earlier[order]), keys[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(lens.keys(children[:1], earlier[:1]), keys[:1], atol=1e-5, rtol=0)


def test_what_a_token_wants_of_a_block_depends_on_the_two_alone():
    lens, asks = make(), tokens_asking()
    keys = keys_of(lens)
    z = lens(asks, keys)
    torch.testing.assert_close(lens(asks[:, 2:3], keys[:, 4:6]), z[:, 2:3, 4:6], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lens(asks.flip(0), keys.flip(0)), z.flip(0), atol=1e-4, rtol=1e-4)
    many = torch.cat((keys, keys_of(lens, n=500)), 1)  # however long the stream is
    torch.testing.assert_close(lens(asks, many)[..., :10], z, atol=1e-4, rtol=1e-4)
    louder = torch.cat((3 * asks[..., :D], asks[..., D:]), dim=-1)  # the size of a state says nothing
    torch.testing.assert_close(lens(louder, keys), z, atol=1e-4, rtol=1e-4)


def test_what_is_wanted_fades():
    """The same state at each place: the newest counts; and what an old one wants more than that, less its age."""
    lens = make()
    keys, state = keys_of(lens, rows=1), tokens_asking(rows=1, tokens=1, seed=1)
    z = lens(state, keys)[:, 0]
    torch.testing.assert_close(lens.wanted(state.expand(-1, 6, -1), keys), z, atol=1e-4, rtol=1e-4)
    remembered = False
    for seed in range(20):
        other = tokens_asking(rows=1, tokens=3, seed=seed)
        later, latest = lens.wanted(torch.cat((state, other), 1), keys), lens.wanted(other, keys)
        torch.testing.assert_close(later, torch.maximum(z - 3 * FADE, latest), atol=1e-4, rtol=1e-4)
        remembered |= bool((later > latest + 1e-3).any())
    assert remembered


@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_wanted_fades_with_each_token(tokens):
    """Also within autocast, and of no blocks."""
    lens = make()
    keys, asks = keys_of(lens, rows=1, n=30).detach(), tokens_asking(rows=1, tokens=tokens)
    expected = (lens(asks, keys)[0] - FADE * torch.arange(tokens - 1, -1, -1)[:, None]).amax(0).detach()
    for around in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            torch.testing.assert_close(lens.wanted(asks, keys)[0], expected, atol=1e-3, rtol=1e-4)
    assert lens.wanted(asks, keys[:, :0]).shape == (1, 0)


@given(st.lists(st.floats(-9, 9, width=32), max_size=9), st.sampled_from([0.0, 0.5, 1.0]))
def test_blocks_beside_a_wanted_one_are_wanted_in_part(z, beside):
    lens = make()
    lens.forward = lambda asking, keys: torch.tensor(z).expand(1, 1, -1)
    expected = []
    for i, own in enumerate(z):
        neighbours = [beside * z[j] for j in (i - 1, i + 1) if 0 <= j < len(z) and beside * z[j] > 0]
        expected.append(max([own, *neighbours]))
    (wanted,) = lens.wanted(torch.zeros(1, 1, 8), torch.zeros(1, len(z), 8), beside).tolist()
    assert wanted == pytest.approx(expected, rel=1e-6, abs=1e-37)  # products in float32


def test_what_is_wanted_is_as_exact_far_into_a_stream():
    """At numbers of tokens beside which z counts little in float32."""
    lens, store = make(), RamStore()
    keys = keys_of(lens, rows=1, n=30).detach()
    store.append(0, torch.zeros(1, 1))
    store.append(1, keys[:, :20])

    def demand(start):
        demand, values = Demand(lens, store, gist_size=0), []
        for i in range(8):
            demand.listen(tokens_asking(rows=1, tokens=2, seed=i)[0], start + 3 * i)
            values.append(demand.wanted())
        return torch.stack(values)

    near, far = demand(100), demand(50_000_000)
    assert torch.equal(near, far)
    latest = lens.wanted(tokens_asking(rows=1, tokens=2, seed=7), keys[:, :20])[0]
    torch.testing.assert_close(near[-1], torch.maximum(near[-2] - 3 * FADE, latest))
    assert (near[-1] > latest).any()


def test_gradients():
    lens, children, earlier, asks = make(), blocks(20), before(20), tokens_asking(rows=1)
    for tensor in (children, earlier, asks):
        tensor.requires_grad_()
    lens(asks, lens.keys(children, earlier)[None]).square().sum().backward()
    for tensor in (children, earlier, asks, *lens.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


def test_bf16_by_autocast():
    lens = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys = keys_of(lens)
        z = lens(tokens_asking(), keys)
    assert z.dtype == torch.float32
    exact = lens(tokens_asking(), keys_of(lens))
    assert 0 < root_mean_square(z - exact) < 0.05 * root_mean_square(exact)  # ε is 2^-8, after a few layers


def test_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        lens = LensNet(D)
    lens.to_empty(device="cpu")
    torch.manual_seed(5)
    lens.init_weights()
    torch.manual_seed(5)
    other = LensNet(D)
    other.init_weights()
    for p, q in zip(lens.parameters(), other.parameters(), strict=True):
        assert p.isfinite().all()
        assert p.shape == q.shape
    assert not lens(tokens_asking(), keys_of(lens)).any()
    assert keys_of(lens).any()


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_wide_models_get_a_narrow_lens(head):
    layers, n_embd = 2, 768
    lens = LensNet(n_embd, layers, head)
    of_keys = 12 * layers * WIDTH**2 + WIDTH * n_embd + (4 * WIDTH * (WIDTH + KEY) if head == "mlp" else WIDTH * KEY)
    assert sum(p.numel() for p in lens.parameters()) == of_keys + (KEY + 1) * HEADS * n_embd + n_embd + 2


def test_a_token_asks_with_the_words_of_the_newest_that_fade():
    N = NEWEST + 20
    states, embeds = torch.randn(1, 3, D), torch.randn(1, N, D)
    places = [0, 7, N - 1]
    lens = make()
    nn.init.normal_(lens.mean, std=0.1)
    nn.init.normal_(lens.loudness[:-1], std=0.05)
    asks = lens.asking(states, embeds, torch.tensor([places]))
    assert torch.equal(asks[..., :D], states)
    for i, place in enumerate(places):
        span = range(max(0, place - NEWEST + 1), place + 1)
        weights = [NEWEST_FADE ** (place - t) for t in span]
        heard = sum(w * reference_heard(lens, embeds[0, t]) for w, t in zip(weights, span, strict=True))
        words = lens.projection.double() @ heard
        torch.testing.assert_close(asks[0, i, D:], (words / words.norm()).float(), atol=1e-5, rtol=1e-5)


def test_whitened_words_have_no_mean_and_no_direction_in_common():
    """And blocks are found by their rarest words, untrained, where all embeddings are nearly alike."""
    n_embd, V = 64, 500
    generator = torch.Generator().manual_seed(0)
    shape = torch.linspace(2, 0.05, n_embd)
    table = 3 + torch.randn(V, n_embd, generator=generator) * shape
    counts = (1000 / torch.arange(1.0, V + 1)).round()
    table[:, 0] -= counts.log()  # as in tables of models, how rare a token is can be read from it
    lens = LensNet(n_embd)
    states = 5 + torch.randn(20, n_embd, generator=torch.Generator().manual_seed(1))
    lens.whiten(table, counts, states, torch.tensor([V - 1]))
    projected = F.linear(table - lens.mean, lens.projection)
    p = counts / counts.sum()
    torch.testing.assert_close(p @ projected, torch.zeros(word_size(n_embd)), atol=1e-3, rtol=0)
    covariance = projected.T @ (p[:, None] * projected)
    torch.testing.assert_close(covariance, torch.eye(word_size(n_embd)), atol=0.02, rtol=0)

    loud = lens.heard(table).norm(dim=1) / (table - lens.mean).norm(dim=1)
    assert loud[-50:-1].mean() > 2 * loud[:5].mean()  # what is rare is louder,
    assert loud[-1] < loud[-50:-1].mean() / 2  # but for what stands around turns

    text = p.multinomial(50 * 16, replacement=True, generator=generator).view(50, 16)
    rare = torch.arange(V - 51, V - 1)
    text[:, 3] = rare
    question = torch.cat((text[:, 8:12], rare[:, None]), dim=1)  # ends with the word that stands in one block only

    def found(lens):
        asks = lens.asking(torch.zeros(50, 1, n_embd), table[question], torch.full((50, 1), 4))
        keys = lens.keys(table[text], table[text][:, :0])
        return (lens(asks, keys.expand(50, -1, -1))[:, 0].argmax(1) == torch.arange(50)).float().mean()

    plain = LensNet(n_embd)  # with a match, but not whitened
    nn.init.ones_(plain.match)
    assert found(lens) > 0.8 > 0.7 > found(plain)


def test_learns_to_point_at_what_the_newest_token_is_about():
    """The odds of the one block of 4 words in which a token's word occurs; also among more blocks than in training."""
    n_embd, words, B, P, steps = 64, 128, 16, 16, 150
    torch.manual_seed(0)
    lens = LensNet(n_embd)
    matrices, rest = split_parameters(lens)
    assert len(matrices) + len(rest) == len(list(lens.parameters()))
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.003)]
    before = {name: p.detach().clone() for name, p in lens.named_parameters()}
    table = rms_norm(torch.randn(words, n_embd))

    def batch(n):
        word = torch.rand(B, words).argsort(1)[:, : n * K].view(B, n, K)
        answer = torch.randint(0, n, (B, P))
        asked = word[torch.arange(B)[:, None], answer, torch.randint(0, K, (B, P))]
        children = table[word].flatten(0, 1)
        keys = lens.keys(children, children[:, :0]).unflatten(0, (B, n))
        return lens(torch.cat((table[asked], lens.words(lens.heard(table[asked]))), dim=-1), keys), answer

    for step in range(steps):
        z, answer = batch(8)
        for optimizer, rate in zip(optimizers, (0.02, 0.003), strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, 2 * (steps - step) / steps)
        F.cross_entropy(F.pad(z, (0, 1)).flatten(0, 1), answer.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        for n, goal in ((8, 0.9), (32, 0.8)):
            z, answer = batch(n)
            assert (z.argmax(2) == answer).float().mean() > goal
            assert score(z).gather(2, answer[..., None]).mean() > 0.5
    for name, p in lens.named_parameters():
        assert not torch.equal(p, before[name]), name
