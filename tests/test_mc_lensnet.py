"""LensNet: equals a slow reference, sees all of the context and nothing else, and learns to look things up."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from megacontext.layers import split_parameters
from megacontext.lensnet import SCALES, LensNet
from megacontext.working_context import Edit, WorkingContext
from nanochat.muon import Muon
from tests.helpers import root_mean_square

D, K, LEVELS = 96, 4, 3
OPTIONS = [{"layers": layers, "head": head} for layers, head in ((2, "mlp"), (2, "linear"), (4, "mlp"), (8, "linear"))]


def rms_norm(x):
    return F.rms_norm(x, (x.size(-1),))


def make(seed=0, spread=0.1, n_embd=D, **options):
    """A LensNet; spread > 0 moves all parameters off their initial values, so that every path matters."""
    torch.manual_seed(seed)
    lens = LensNet(n_embd, LEVELS, **options)
    with torch.no_grad():
        for p in lens.parameters():
            p.add_(torch.randn_like(p), alpha=spread)
        lens.head.c_proj.weight.mul_(3)
    return lens


def exactly(lens, args):
    """The same in float64, so that what is equal in exact arithmetic is equal but for the last rounding, to float32."""
    return lens.double(), args | {"x": args["x"].double()}


LAST_ROUNDING = {"atol": 2**-23, "rtol": 0}  # of scores below 1


def make_context():
    """70 tokens in two rows: one of 28 entries, up to LOD 2, and one of 40, so that the first is padded."""
    context = WorkingContext.finest(2, 70, K)
    edits = [Edit(0, 0, 8, 2), Edit(0, 8, 4, 1), Edit(1, 0, 10, 1)]
    return context.apply(edits)


def inputs(context=None, seed=0):
    """What forward takes, for a working context and random embeddings."""
    context = context or make_context()
    lod, start, span, valid = context.entries
    x = rms_norm(torch.randn(*lod.shape, D, generator=torch.Generator().manual_seed(seed)))
    return {"x": x, "lod": lod, "start": start, "span": span, "valid": valid, "num_tokens": context.num_tokens}


def reference(lens, x, lod, start, span, valid, num_tokens):
    """Scores of one row, written out entry by entry and head by head, in float64."""
    w = {name: p.detach().double() for name, p in lens.named_parameters()}
    H, C = lens.encoder.n_head, w["embed.weight"].size(0)
    d = C // H

    def rms(v):
        return v / torch.sqrt((v * v).mean() + torch.finfo(torch.float64).eps)

    W = int(valid.sum())
    distance = [num_tokens - int(start[i]) - int(span[i]) for i in range(W)]
    xs = []
    for i in range(W):
        place = [math.log2(int(span[i])) / 10] + [distance[i] / (distance[i] + s) for s in SCALES]
        level = w["lod_embed.weight"][min(int(lod[i]), LEVELS)]
        place = w["embed_place.weight"] @ torch.tensor(place).double()
        xs.append(rms(w["embed.weight"] @ x[i].double() + place + level))
    for layer in range(len(lens.encoder.attn)):
        q, k, v = ([w[f"encoder.attn.{layer}.{c}.weight"] @ rms(x) for x in xs] for c in ("c_q", "c_k", "c_v"))
        out = []
        for i in range(W):
            heads = []
            for h in range(H):
                part = slice(h * d, (h + 1) * d)
                slope = 2 * h / (H - 1)
                p = []
                for j in range(W):
                    p.append(torch.exp(rms(q[i][part]) @ rms(k[j][part]) / math.sqrt(d)) * (1 + distance[j]) ** -slope)
                heads.append(sum(p[j] * v[j][part] for j in range(W)) / sum(p))
            out.append(w[f"encoder.attn.{layer}.c_proj.weight"] @ torch.cat(heads))
        xs = [x + o for x, o in zip(xs, out, strict=True)]
        fc, proj = (w[f"encoder.mlp.{layer}.{c}.weight"] for c in ("c_fc", "c_proj"))
        xs = [x + proj @ torch.relu(fc @ rms(x)) ** 2 for x in xs]
    scores = torch.zeros(len(valid)).double()
    for i, x in enumerate(xs):
        x = rms(x)
        if "head.c_fc.weight" in w:
            x = torch.relu(w["head.c_fc.weight"] @ x) ** 2
        scores[i] = torch.tanh(w["head.c_proj.weight"][0] @ x / math.sqrt(C))
    return scores


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_equals_the_reference(options):
    lens, args = exactly(make(**options), inputs())
    assert lens.encoder.n_head == 3
    scores = lens(**args)
    assert scores.dtype == torch.float32
    for row in range(2):
        one = {name: value if name == "num_tokens" else value[row] for name, value in args.items()}
        torch.testing.assert_close(scores[row].double(), reference(lens, **one), atol=1e-6, rtol=0)
    assert scores.std() > 0.05


def test_an_untrained_lens_has_no_wishes_and_any_lens_scores_between_minus_one_and_one():
    for options in OPTIONS:
        assert not LensNet(D, LEVELS, **options)(**inputs()).any()
        scores = make(spread=0.5, **options)(**inputs())
        assert scores.abs().max() <= 1
        assert scores.min() < -0.1
        assert scores.max() > 0.1


def test_every_option_changes_parameters_and_scores():
    lenses = [make(**options) for options in OPTIONS]
    for a, b in itertools.combinations(lenses, 2):
        assert dict(a.named_parameters()).keys() != dict(b.named_parameters()).keys()
        assert not torch.allclose(a(**inputs()), b(**inputs()), atol=1e-3)


def test_every_entry_is_seen_from_every_other():
    lens, args = make(), inputs()
    scores = lens(**args)
    last = int(args["valid"][0].sum()) - 1
    for changed, seen_from in ((last, 0), (0, last)):
        x = args["x"].clone()
        x[0, changed] = -x[0, changed]
        new = lens(**args | {"x": x})
        assert (new - scores)[0, seen_from].abs() > 1e-5
        assert torch.equal(new[1], scores[1])  # the other row


def test_padding_changes_nothing_and_scores_zero():
    lens, args = exactly(make(), inputs())
    scores = lens(**args)
    assert args["valid"].sum(1).tolist() == [28, 40]
    assert not scores[0, 28:].any()
    alone = lens(**{name: value if name == "num_tokens" else value[:1, :28] for name, value in args.items()})
    torch.testing.assert_close(scores[:1, :28], alone, **LAST_ROUNDING)
    x = args["x"].clone()
    x[0, 28:] = 1e3
    torch.testing.assert_close(lens(**args | {"x": x}), scores, **LAST_ROUNDING)


def test_entries_are_a_set():
    lens, args = exactly(make(), inputs())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = {name: value if name == "num_tokens" else value[:, order] for name, value in args.items()}
    torch.testing.assert_close(lens(**shuffled), lens(**args)[:, order], **LAST_ROUNDING)


@pytest.mark.parametrize("name", ["lod", "start", "span", "num_tokens"])
def test_level_span_and_distance_matter(name):
    lens, args = make(), inputs()
    changed = args[name] + 1 if name == "num_tokens" else args[name].clone()
    if name != "num_tokens":
        changed[1, 3] += 1 if name == "lod" else -1  # a gist, of 4 tokens
    assert (lens(**args | {name: changed}) - lens(**args))[1].abs().max() > 1e-4


def test_levels_above_the_highest_share_its_embedding():
    lens, args = make(), inputs()
    high = {"lod": torch.full_like(args["lod"], LEVELS)}
    higher = {"lod": torch.full_like(args["lod"], LEVELS + 2)}
    assert torch.equal(lens(**args | high), lens(**args | higher))


def test_a_stream_may_be_shifted_and_grow_without_end():
    lens, args = make(), inputs()
    scores = lens(**args)
    for shift in (1, 10**6, 10**12):
        moved = args | {"start": args["start"] + shift, "num_tokens": args["num_tokens"] + shift}
        assert torch.equal(lens(**moved), scores)
    # The same old span, but ever older; the newest 20 entries stay where they are
    by_age = []
    for age in (0, 10**6, 10**7, 10**9):
        start = args["start"] - age
        start[:, 20:] = args["start"][:, 20:]
        by_age.append(lens(**args | {"start": start}))
    changes = [(b - a).abs().max() for a, b in itertools.pairwise(by_age)]
    assert changes[0] > 1e-3  # to be old is to be judged otherwise
    assert changes[1] < 1e-3  # but not to be older still
    assert changes[2] < 1e-3


def test_lengths_may_differ_by_row():
    lens, args = exactly(make(), inputs())
    both = lens(**args | {"num_tokens": torch.tensor([70, 90])})
    torch.testing.assert_close(both[0], lens(**args)[0], **LAST_ROUNDING)
    torch.testing.assert_close(both[1], lens(**args | {"num_tokens": 90})[1], **LAST_ROUNDING)


def test_gradients():
    lens, args = make(), inputs()
    args["x"].requires_grad_()
    lens(**args).square().sum().backward()
    for tensor in (args["x"], *lens.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert (args["x"].grad.abs().sum(2) > 0).equal(args["valid"])


def test_bf16_by_autocast():
    lens, args = make(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = lens(**args)
    assert scores.dtype == torch.float32
    exact = lens(**args)
    assert 0 < root_mean_square(scores - exact) < 0.05 * root_mean_square(exact)  # ε is 2^-8, after a few layers


def test_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        lens = LensNet(D, LEVELS)
    lens.to_empty(device="cpu")
    torch.manual_seed(5)
    lens.init_weights()
    torch.manual_seed(5)
    other = LensNet(D, LEVELS)
    other.init_weights()
    for p, q in zip(lens.parameters(), other.parameters(), strict=True):
        assert p.isfinite().all()
        assert p.shape == q.shape
    assert not lens(**inputs()).any()


def test_wide_models_get_a_narrow_lens():
    lens = LensNet(768, LEVELS)
    assert lens.encoder.n_head == 8
    assert 1.7e6 < sum(p.numel() for p in lens.parameters()) < 2.2e6


@pytest.mark.parametrize("gists", [False, True])
def test_learns_to_point_at_what_the_newest_token_is_about(gists):
    """Score highest the entry that is the newest token, or the gist (mean of 4 words) that contains it."""
    n_embd, words, W, B = 64, 256, 16, 32
    torch.manual_seed(0)
    lens = LensNet(n_embd, LEVELS)
    matrices, rest = split_parameters(lens)
    assert len(matrices) + len(rest) == len(list(lens.parameters()))
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]
    before = {name: p.detach().clone() for name, p in lens.named_parameters()}
    table = rms_norm(torch.randn(words, n_embd))
    size = 4 if gists else 1
    span = torch.tensor([size] * W + [1]).expand(B, -1)
    place = {
        "lod": (span > 1).long(),
        "start": (torch.arange(W + 1) * size).expand(B, -1),
        "span": span,
        "valid": torch.ones(B, W + 1, dtype=torch.bool),
        "num_tokens": W * size + 1,
    }
    right = []
    for _ in range(100):
        word = torch.rand(B, words).argsort(1)[:, : W * size].view(B, W, size)
        answer = torch.randint(0, W, (B,))
        asked = word[torch.arange(B), answer, torch.randint(0, size, (B,))]
        x = torch.cat((rms_norm(table[word].mean(2)), table[asked][:, None]), dim=1)
        scores = lens(x, **place)[:, :W]
        loss = F.cross_entropy(8 * scores, answer)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        right.append((scores.argmax(1) == answer).float().mean().item())
    assert sum(right[:5]) / 5 < 0.3
    assert sum(right[-20:]) / 20 > (0.6 if gists else 0.95), right
    for name, p in lens.named_parameters():
        assert not torch.equal(p, before[name]), name
