"""GistNet: starts as mean pooling, equals a slow reference, learns, and every option of it does something."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from megacontext.gistnet import GistNet, num_heads, split_parameters
from tests.helpers import root_mean_square

D, K, LEVELS = 32, 4, 2
POOLINGS = ("mean", "query", "cls")
OPTIONS = [
    {"layers": layers, "pooling": pooling, "head": head}
    for layers, pooling, head in [
        *itertools.product((2,), POOLINGS, ("linear", "mlp")),
        (4, "mean", "mlp"),
        (4, "cls", "linear"),
    ]
] + [{"layers": 2, "pooling": "mean", "head": "linear", "start": "last"}]
DEFAULT = {"layers": 2, "pooling": "mean", "head": "mlp"}


def ids(options):
    return "-".join(map(str, options.values()))


def rms_norm(x):
    return F.rms_norm(x, (x.size(-1),))


def blocks(M=6, seed=0):
    return rms_norm(torch.randn(M, K, D, generator=torch.Generator().manual_seed(seed)))


def make(options, seed=0, spread=0.0, n_embd=D):
    """A GistNet; spread > 0 moves all parameters off their initial values, so that every path matters."""
    torch.manual_seed(seed)
    net = GistNet(n_embd, K, LEVELS, **options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=spread)
    return net


ANGLES = {"atol": 1e-6, "rtol": 1e-6}  # in float64, but for the cosines and sines of places, which are float32


WORDS = rms_norm(torch.randn(48, D, generator=torch.Generator().manual_seed(1)))
KEYS = torch.linalg.qr(torch.randn(K, D, D, generator=torch.Generator().manual_seed(2))).Q


def train(net, steps=30):
    """Teach it to let each child's word be read from the gist by a fixed rotation for its place; the losses."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        word = torch.randint(len(WORDS), (64, K), generator=generator)
        child = WORDS[word]
        loss = 0.0
        for level in (1, 2):  # at level 2 in the opposite order, so that the level is worth knowing
            seen = net(child if level == 1 else child.flip(1), level)
            logits = torch.einsum("md,kde,ve->mkv", seen, KEYS, WORDS) / D**0.5
            loss = loss + F.cross_entropy(logits.flatten(0, 1), word.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def trained():
    """For every set of options, a network after a few steps, its losses, and the parameters it began with."""
    out = {}
    for options in OPTIONS:
        net = make(options)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        out[ids(options)] = net, train(net), before
    return out


def reference(net, children, level):
    """The gist of one block [K, D], written out position by position and head by head, in float64."""
    w = {name: p.detach().double() for name, p in net.named_parameters()}
    H, d = net.encoder.n_head, D // net.encoder.n_head

    def rms(v):
        return v / torch.sqrt((v * v).mean() + torch.finfo(torch.float64).eps)

    def rotate(v, position):
        angle = torch.tensor([position / 10000 ** (2 * i / d) for i in range(d // 2)]).double()
        a, b = v[: d // 2], v[d // 2 :]
        return torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()))

    start = children.double().mean(0) if net.start == "mean" else children[-1].double()
    xs = [child.double() + w["level_embed"][level - 1] for child in children]
    if net.pooling == "cls":
        xs.append(w["cls"])
    for layer in range(len(net.encoder.attn)):
        q, k, v = ([w[f"encoder.attn.{layer}.{c}.weight"] @ rms(x) for x in xs] for c in ("c_q", "c_k", "c_v"))
        out = []
        for t in range(len(xs)):
            heads = []
            for h in range(H):
                part = slice(h * d, (h + 1) * d)
                query = rms(rotate(q[t][part], t))
                logits = [query @ rms(rotate(k[s][part], s)) / math.sqrt(d) for s in range(len(xs))]
                p = torch.stack(logits).softmax(0)
                heads.append(sum(p[s] * v[s][part] for s in range(len(xs))))
            out.append(w[f"encoder.attn.{layer}.c_proj.weight"] @ torch.cat(heads))
        xs = [x + o for x, o in zip(xs, out, strict=True)]
        fc, proj = (w[f"encoder.mlp.{layer}.{c}.weight"] for c in ("c_fc", "c_proj"))
        xs = [x + proj @ torch.relu(fc @ rms(x)) ** 2 for x in xs]
    xs = [rms(x) for x in xs]
    if net.pooling == "cls":
        pooled = xs[-1]
    elif net.pooling == "mean":
        pooled = sum(xs) / len(xs)
    else:
        pooled = []
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            p = torch.stack([x[part] @ w["query"][h] for x in xs]).softmax(0)
            pooled.append(sum(p[t] * x[part] for t, x in enumerate(xs)))
        pooled = torch.cat(pooled)
    x = rms(pooled)
    if "head.c_fc.weight" in w:
        x = torch.relu(w["head.c_fc.weight"] @ x) ** 2
    return rms(start + w["head.c_proj.weight"] @ x)


@pytest.mark.parametrize("options", [{"type": "mean"}, *OPTIONS], ids=ids)
def test_starts_exactly_as_plain_pooling(options):
    net, children = make(options), blocks()
    start = children[:, -1] if "start" in options else children.mean(1)
    for level in (1, 2):
        assert torch.equal(net(children, level), rms_norm(start))


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_equals_the_reference(options):
    net, children = make(options, spread=0.2).double(), blocks(3).double()
    for level in (1, 2):
        expected = torch.stack([reference(net, block, level) for block in children])
        torch.testing.assert_close(net(children, level), expected, **ANGLES)
        assert not torch.allclose(expected, rms_norm(children.mean(1)), atol=0.05)
        assert not torch.allclose(expected, rms_norm(children[:, -1]), atol=0.05)


def test_several_heads_equal_the_reference(monkeypatch):
    monkeypatch.setattr("megacontext.gistnet.HEAD_DIM", 8)
    for pooling in POOLINGS:
        net, children = make(DEFAULT | {"pooling": pooling}, spread=0.2).double(), blocks(2).double()
        assert net.encoder.n_head == 4
        expected = torch.stack([reference(net, block, 1) for block in children])
        torch.testing.assert_close(net(children, 1), expected, **ANGLES)


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_learns_and_every_parameter_takes_part(options, trained):
    net, losses, before = trained[ids(options)]
    assert losses[-1] < 0.9 * losses[0]  # mean pooling stays at losses[0]
    for name, p in net.named_parameters():
        rows = p if name == "level_embed" else p[None]
        for row, old in zip(rows, before[name].view_as(rows), strict=True):
            assert not torch.equal(row, old), name


def test_each_option_changes_parameters_and_outputs(trained):
    children = blocks()
    outputs, shapes = {}, set()
    for options in OPTIONS:
        net = trained[ids(options)][0]
        outputs[ids(options)] = net(children, 1)
        shapes.add(tuple((name, p.shape) for name, p in net.named_parameters()))
    for a, b in itertools.combinations(outputs, 2):
        assert not torch.allclose(outputs[a], outputs[b], atol=1e-3), (a, b)
    assert len(shapes) == len({(o["layers"], o["pooling"], o["head"]) for o in OPTIONS})
    assert list(GistNet(D, K, LEVELS, type="mean").parameters()) == []


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_order_matters_after_training_but_never_to_the_mean(options, trained):
    children = blocks()
    net = trained[ids(options)][0]
    assert (net(children, 1) - net(children.flip(1), 1)).abs().max() > 0.01
    mean = GistNet(D, K, LEVELS, type="mean")
    torch.testing.assert_close(mean(children, 1), mean(children.flip(1), 1))


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_levels_differ_after_training_and_the_highest_share_one_embedding(options, trained):
    net, children = trained[ids(options)][0], blocks()
    assert (net(children, 1) - net(children, 2)).abs().max() > 0.01
    assert torch.equal(net(children, LEVELS), net(children, LEVELS + 3))


def test_gists_live_among_normalized_embeddings_and_blocks_are_independent():
    net, children = make(DEFAULT, spread=0.2).double(), blocks().double()
    gists = net(children, 1)
    torch.testing.assert_close(gists.square().mean(-1), torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
    changed = children.clone()
    changed[2, 1] += 1.0
    moved = (net(changed, 1) - gists).abs().amax(-1) > 1e-12
    assert moved.tolist() == [False, False, True, False, False, False]
    torch.testing.assert_close(net(children[2:3], 1), gists[2:3])  # the same alone and in a batch
    children.requires_grad_()
    net(children, 1)[0, 0].backward()
    assert children.grad[0].abs().min() > 0
    assert not children.grad[1:].any()


def test_no_blocks_give_no_gists():
    assert make(DEFAULT)(torch.empty(0, K, D), 1).shape == (0, D)


def test_bf16_by_autocast():
    net, children = make(DEFAULT | {"pooling": "query"}, spread=0.1), blocks()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gists = net(children, 1)
    exact = net(children, 1)
    assert 0 < root_mean_square(gists.float() - exact) < 0.05 * root_mean_square(exact)  # ε is 2^-8


def test_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        net = GistNet(D, K, LEVELS, pooling="cls")
    net.to_empty(device="cpu")
    net.init_weights()
    assert torch.equal(net(blocks(), 1), rms_norm(blocks().mean(1)))


def test_parameters_for_the_optimizers():
    net = make(DEFAULT | {"pooling": "cls"})
    matrices, rest = split_parameters(net)
    assert {id(p) for p in rest} == {id(net.level_embed), id(net.cls)}
    assert len(matrices) + len(rest) == len([*net.parameters()])
    assert all(p.ndim == 2 for p in matrices)
    assert split_parameters(GistNet(D, K, LEVELS, type="mean")) == ([], [])


@pytest.mark.parametrize("n_embd", [2, 32, 96, 256, 320, 700, 1280, 1664])
def test_heads_are_of_equal_even_size(n_embd):
    n = num_heads(n_embd, 64)
    assert n_embd % n == 0
    assert n_embd // n % 2 == 0
    assert n == 1 or n_embd // n >= 64
    assert n_embd % 128 or n == n_embd // 64


def test_what_does_not_fit_is_refused():
    net = make(DEFAULT)
    with pytest.raises(ValueError, match=r"blocks of 4 children and a level of 1 or more, got 5 and 1"):
        net(torch.randn(2, 5, D), 1)
    with pytest.raises(ValueError, match="got 4 and 0"):
        net(blocks(), 0)
