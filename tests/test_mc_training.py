"""Training with MegaContext: variants, losses, the controller, and that gists carry the context."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.auto_batch import auto_batch_size, variant_tokens
from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.gaussian_rope import entry_cos_sin
from megacontext.networks import MCNetworks
from megacontext.training import MCObjective
from megacontext.tree import build_table
from megacontext.variants import random_variants, target_length
from megacontext.working_context import WorkingContext
from nanochat.gpt import GPT, GPTConfig, norm
from tests.helpers import RECENT, K, T, make_controller, make_model, tokens

# ---------------------------------------------------------------------------------------------------------
# Variants


@given(
    K=st.integers(2, 8),
    n=st.integers(1, 300),
    recent=st.integers(0, 40),
    progress=st.floats(0, 1),
    share=st.floats(0.02, 1),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_variants_have_the_length_and_keep_the_tail(K, n, recent, progress, share, seed):
    smallest = WorkingContext.finest(1, n, K).smallest_length(recent)
    length = target_length(progress, n, K, max(smallest, round(share * n)))
    context = random_variants(5, n, K, length, recent, torch.Generator().manual_seed(seed))
    context.check()
    assert context.lod_map[:, context.old_blocks(recent) :].eq(0).all()
    assert (n - length) % (K - 1) == 0
    # All rows have exactly this length, unless single blocks cannot save so much (then they are all collapsed)
    for row, actual in enumerate(context.lengths().tolist()):
        if actual != length:
            assert actual > length
            assert context.lod_map[row, : context.old_blocks(recent)].ge(1).all()


def test_variants_differ_and_use_every_level():
    context = random_variants(200, 256, 4, 60, 8, torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in context.lod_map.tolist()}) > 150
    assert set(context.lod_map.flatten().tolist()) >= {0, 1, 2}
    collapsed = (context.lod_map > 0).float().mean(0)[: context.old_blocks(8)]
    assert collapsed.min() > 0.6  # no block is spared
    again = random_variants(200, 256, 4, 60, 8, torch.Generator().manual_seed(0))
    assert torch.equal(context.lod_map, again.lod_map)


def test_a_level_of_one_node_is_used_too():
    """At 2,048 tokens in blocks of 32 a node of LOD 2 saves more than the share that is meant for it."""
    context = random_variants(200, 2048, 32, 420, 128, torch.Generator().manual_seed(0))
    share = (context.lod_map == 2).any(1).float().mean()
    assert 0.15 < share < 0.35
    assert set(context.lengths().tolist()) == {target_length(1, 2048, 32, 420)}


def test_only_levels_that_were_read_count_as_trained():
    """64 tokens in blocks of 4 make three levels; these variants have no node of the third."""
    model = make_model()
    controller = make_controller(model)
    controller.process_batch(*tokens(), 1.0, torch.Generator().manual_seed(0))
    assert controller.networks.gistnet.trained_levels == 2


def test_lengths_go_down_in_few_steps():
    lengths = [target_length(p / 100, 256, 8, 40) for p in range(101)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == pytest.approx(0.8 * 256, abs=8)
    assert 40 - 8 < lengths[-1] <= 40
    assert len(set(lengths)) <= 8


# ---------------------------------------------------------------------------------------------------------
# Controller


def test_base_loss_is_the_flagless_loss():
    """Bit for bit: the same tokens through the same model."""
    model, (x, y) = make_model(), tokens()
    result = make_controller(model).process_batch(x, y, 0.5, torch.Generator().manual_seed(0))
    assert result.stats["mc/base_loss"].item() == model(x, y).item()
    assert torch.equal(result.cached_embeddings, model.embed(x))


def test_variant_loss_against_one_row_at_a_time():
    """Batched over samples, variants and entries: the same as each working context read by itself."""
    model, (x, y) = make_model(), tokens(B=2)
    controller = make_controller(model)
    V = controller.config.mc_num_random_variants
    result = controller.process_batch(x, y, 1.0, torch.Generator().manual_seed(5))
    length = target_length(1.0, T, K, controller.config.mc_train_wc_length)
    context = random_variants(2 * V, T, K, length, RECENT, torch.Generator().manual_seed(5))
    table = build_table(controller.gist, model.embed(x), K)
    losses = []
    for row in range(2 * V):
        pieces, where, target = [], [], []
        t = 0
        while t < T:  # entry by entry
            lod = int(context.lod_map[row, t // K])
            span = K**lod
            pieces.append(table.values[row // V, table.offsets[lod] + t // span])
            where.append((t, span))
            end = t + span
            next_is_token = end == T or int(context.lod_map[row, end // K]) == 0
            target.append(int(y[row // V, end - 1]) if next_is_token else -1)
            t = end
        start, span = (torch.tensor([[w[i] for w in where]]) for i in (0, 1))
        loss = model(
            inputs_embeds=torch.stack(pieces)[None],
            cos_sin=entry_cos_sin(start, span, model.config.n_embd // 2),
            targets=torch.tensor([target]),
        )
        losses.append(loss.item())
    assert result.stats["mc/token_loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    cos, sin = result.positional_cache
    assert set(result.positional_caches) == {0, 1}
    assert torch.equal(result.positional_caches[1][0], cos[V:])
    assert torch.equal(result.positional_caches[1][1], sin[V:])
    assert result.positional_caches[1][2] is None


def test_session_ids_name_the_caches():
    model, (x, y) = make_model(), tokens()
    result = make_controller(model).process_batch(x, y, 0.0, session_ids=["a", "b"])
    assert set(result.positional_caches) == {"a", "b"}


def gradients(model, controller):
    x, y = tokens()
    result = controller.process_batch(x, y, 1.0, torch.Generator().manual_seed(0))
    result.loss.backward()
    return {
        "trunk": model.transformer.h[0].attn.c_q.weight.grad,
        "embedding": model.transformer.wte.weight.grad,
        "gistnet": controller.networks.gistnet.head.c_proj.weight.grad,
        "lensnet": controller.networks.lensnet.head.c_proj.weight.grad,
    }


def test_every_network_learns_from_its_loss():
    model = make_model()
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(model, make_controller(model)).values())


def test_lens_loss_reaches_the_networks_only():
    """The same gradients of the trunk, to the bit, with and without it; GistNet is taught by it too."""
    grads = []
    for weight in (0.0, 5.0):
        model = make_model()
        controller = make_controller(model, mc_lens_loss_weight=weight)
        torch.nn.init.normal_(controller.networks.lensnet.head.c_proj.weight, std=0.3)  # from 0, nothing comes
        grads.append(gradients(model, controller))
    assert torch.equal(grads[0]["trunk"], grads[1]["trunk"])
    assert torch.equal(grads[0]["embedding"], grads[1]["embedding"])
    assert (grads[1]["gistnet"] - grads[0]["gistnet"]).norm() > 0.1 * grads[0]["gistnet"].norm()
    assert grads[0]["lensnet"] is None


def test_networks_keep_their_precision():
    """Whatever autocast surrounds them, and with embeddings in bf16, as on a GPU."""
    model = make_model()
    networks = make_controller(model).networks
    for p in networks.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    children = torch.randn(2, 4, 32).bfloat16()
    entries = WorkingContext.finest(2, 4, 4).entries()

    def outputs(dtype):
        return networks.gist(children, 1, dtype), networks.score(children, entries, 4, dtype)

    exact = networks.gistnet(children.float(), 1), networks.lensnet(children.float(), *entries, 4)
    for around in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            fine, coarse = outputs(torch.float32), outputs(torch.bfloat16)
        for a, b, c in zip(fine, coarse, exact, strict=True):
            assert torch.equal(a, c)
            assert not torch.equal(b.float(), c)
            torch.testing.assert_close(b.float(), c, atol=0.05, rtol=0.05)


def test_options_change_what_they_should():
    def stats(**options):
        model, (x, y) = make_model(), tokens()
        controller = make_controller(model, **options)
        for p in controller.networks.parameters():  # away from the start, at which all GistNets are the mean
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        result = controller.process_batch(x, y, 1.0, torch.Generator().manual_seed(0))
        return {k: float(v) for k, v in result.stats.items()} | {"loss": result.loss.item()}

    plain = stats()
    for name, values in {
        "gistnet_type": ["mean"],
        "gistnet_layers": [4],
        "gistnet_pooling": ["query", "cls"],
        "gistnet_head": ["linear"],
        "mc_positional": ["simple"],
        "block_size": [8],
    }.items():
        for value in values:
            assert stats(**{name: value})["mc/token_loss"] != plain["mc/token_loss"], (name, value)
    for name, value in {"lensnet_layers": 4, "lensnet_head": "linear"}.items():
        other = stats(**{name: value})
        assert other["mc/token_loss"] == plain["mc/token_loss"]
        assert other["mc/lens_loss"] != plain["mc/lens_loss"], name
    other = stats(mc_max_counterfactuals=1)
    assert other["loss"] == plain["loss"]
    assert other["mc/adv_delta_mean"] != plain["mc/adv_delta_mean"]
    assert stats(mc_num_random_variants=2)["mc/variants_total"] == 4
    assert stats(mc_train_wc_length=40)["mc/lod_count/0"] > plain["mc/lod_count/0"]
    assert stats(allocator_recent_tokens=16)["mc/lod_count/0"] != plain["mc/lod_count/0"]
    assert stats(mc_lens_loss_weight=2.0)["loss"] != plain["loss"]
    assert stats(mc_freeze_base=True)["mc/base_loss"] == 0


def test_flops_count_all_that_runs():
    def work(**options):
        controller = make_controller(make_model(), **options)
        objective = MCObjective(controller.model, controller.networks, controller.config, torch.float32)
        return objective.work(1.0, T)

    variants = variant_tokens(make_controller(make_model()).config, 1.0, T) / T
    assert work(mc_lens_loss_weight=0.0) > 1 + variants
    assert work() > 1 + variants + 1 / 3
    frozen = make_controller(make_model(), mc_freeze_base=True)
    gists = 6 * sum(p.numel() for p in frozen.networks.gistnet.parameters()) * K / (K - 1)
    expected = 1 + gists / frozen.model.flops_per_token()  # the baseline, and gists anew for LensNet's loss
    assert work() - work(mc_freeze_base=True) == pytest.approx(expected)


def test_auto_batch():
    config = MCConfig(block_size=K, mc_num_random_variants=3).resolve(T)
    assert variant_tokens(config, 0.0, T) == pytest.approx(3 * 0.8 * T, abs=3 * K)
    assert auto_batch_size(32, config, T) == 8  # 32 / 3.4 is 9.4, of which 8 divides 32
    assert auto_batch_size(1, config, T) == 1
    assert auto_batch_size(32, MCConfig(block_size=K, mc_auto_batch=False).resolve(T), T) == 32


def test_validation_against_its_parts():
    """With all of the budget the working context is the full one; with less, gists and tail are scored as they are."""
    model, batch = make_model(), tokens(B=3)
    token_bytes = torch.arange(70, dtype=torch.int32) % 4
    for budget in (T, 32):
        controller = make_controller(model, mc_eval_soft_max_length=budget)
        objective = MCObjective(model, controller.networks, controller.config, torch.float32)
        got = objective.validate(iter([batch]), 1, token_bytes)
        tail = batch[1][:, -RECENT:]
        weights = (token_bytes[tail] > 0).float()
        total = token_bytes[tail].sum().item() * math.log(2)
        full = model(*batch, loss_reduction="none").view(3, -1)[:, -RECENT:]
        assert got["val/mc_full_bpb"] == pytest.approx((full * weights).sum().item() / total, rel=1e-4)
        short = model(batch[0][:, -budget:], batch[1][:, -budget:], loss_reduction="none").view(3, -1)[:, -RECENT:]
        assert got["val/mc_truncated_bpb"] == pytest.approx((short * weights).sum().item() / total, rel=1e-4)
        if budget == T:
            assert got["val/mc_bpb"] == pytest.approx(got["val/mc_full_bpb"], rel=1e-6)
        else:
            assert got["val/mc_bpb"] != pytest.approx(got["val/mc_full_bpb"], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------
# The proof: documents that each use a few words of many, so that what came before tells which


def documents(B, T, generator, words=64, used=8):
    vocabulary = torch.rand(B, words, generator=generator).argsort(1)[:, :used]
    ids = vocabulary.gather(1, torch.randint(used, (B, T + 1), generator=generator))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize(("K", "blocks", "goal"), [(8, 8, 0.95), (32, 4, 0.85)])
def test_gists_carry_the_context(K, blocks, goal):
    """
    Context gain recovered, (truncated − gists) / (truncated − full) in loss on the newest 16 tokens, with all of the
    history as gists. Gists of other documents are worse than none. Of 32 words, learned gists tell more than means in
    their place; of 8, means tell as much.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tail, steps = 16, 150
    T = blocks * K + tail
    model = GPT(GPTConfig(T, 64, 2, 1, 1, 64))
    model.init_weights()
    config = MCConfig(
        block_size=K, allocator_recent_tokens=tail, mc_num_random_variants=1, mc_train_wc_length=blocks + tail
    ).resolve(T)
    networks = MCNetworks(64, config)
    controller = MCController(model, networks, config)
    optimizers = model.setup_optimizers() + networks.setup_optimizers()
    for step in range(steps):
        x, y = documents(16, T, generator)
        controller.process_batch(x, y, 2 * step / steps, generator).loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * min(1, (steps - step) / (0.3 * steps))
            optimizer.step()
            optimizer.zero_grad()

    x, y = documents(256, T, generator)
    context = WorkingContext.initial(T, K, blocks + tail, tail, rows=256)
    entries, targets = context.entries(), context.targets(y)
    cos_sin = entry_cos_sin(entries.start, entries.span, 64)

    @torch.no_grad()
    def loss_with(gist, shuffle=False):
        inputs = build_table(gist, model.embed(x), K).materialize(context)
        if shuffle:
            inputs[:, :blocks] = inputs[torch.randperm(256, generator=generator), :blocks]
        nll = model(inputs_embeds=inputs, cos_sin=cos_sin, targets=targets, loss_reduction="none")
        return nll.view(256, -1)[:, -tail:].mean().item()

    with torch.no_grad():
        full = model(x, y, loss_reduction="none").view(256, -1)[:, -tail:].mean().item()
        truncated = model(x[:, -tail:], y[:, -tail:]).item()
    assert full < truncated - 0.5  # there is something to carry
    gained = (truncated - loss_with(controller.gist)) / (truncated - full)
    assert gained >= goal
    assert loss_with(controller.gist, shuffle=True) > truncated
    if K == 32:
        assert loss_with(controller.gist) < loss_with(lambda children, level: norm(children.mean(1)))
