"""Random working contexts to train on: their lengths, their levels, and what a batch of them costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.config import MCConfig
from megacontext.variants import (
    DENSE_SHARE,
    auto_batch_size,
    inputs_per_sequence,
    past_entries,
    random_variants,
    step_work,
    target_length,
    variant_length,
)
from megacontext.working_context import smallest_length
from nanochat.gpt import GPTConfig
from tests.helpers import K, T, make_model, make_objective, tokens


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
    smallest = smallest_length(n, K, recent)
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


def test_lengths_go_down_in_few_steps():
    lengths = [target_length(p / 100, 256, 8, 40) for p in range(101)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == pytest.approx(0.8 * 256, abs=8)
    assert 40 - 8 < lengths[-1] <= 40
    assert len(set(lengths)) <= 8
    frozen = MCConfig(block_size=8, mc_freeze_base=True, mc_train_wc_length=40).resolve(256)
    assert {variant_length(frozen, p / 100, 256) for p in range(101)} == {lengths[-1]}


# ---------------------------------------------------------------------------------------------------------
# Costs


def test_inputs_are_what_a_batch_puts_in():
    """Counted at the networks themselves, over a batch of as many dense sequences as compressed ones."""
    options = {"mc_num_random_variants": 3, "mc_max_counterfactuals": 2, "mc_past": 0}
    for more in ({}, {"mc_freeze_base": True}, {"mc_freeze_base": True, "mc_lens_loss_weight": 0.0}):
        model = make_model()
        objective = make_objective(model, **options, **more)
        networks, counts = objective.reader.networks, dict.fromkeys(("trunk", "gistnet", "lensnet"), 0)

        def counting(name, size, counts=counts):
            def hook(module, args, kwargs):
                counts[name] += size(args, kwargs)

            return hook

        def trunk(args, kwargs):
            return kwargs["inputs_embeds"][..., 0].numel()  # not what a frozen model reads without a gradient

        model.register_forward_pre_hook(counting("trunk", trunk), with_kwargs=True)
        networks.gistnet.register_forward_pre_hook(  # forward only: a third
            counting("gistnet", lambda args, _: args[0][..., 0].numel() / (1 if torch.is_grad_enabled() else 3)),
            with_kwargs=True,
        )
        networks.lensnet.embed.register_forward_pre_hook(  # what keys are made of
            counting("lensnet", lambda args, _: args[0][..., 0].numel()), with_kwargs=True
        )
        objective.process_batch(*tokens(B=4), 1.0, torch.Generator().manual_seed(0))
        trunk, gists, of_blocks = (4 * n for n in inputs_per_sequence(objective.config, 1.0, T))
        assert counts["trunk"] == trunk
        assert counts["gistnet"] == pytest.approx(gists, rel=0.02)  # the geometric series ends at the top level
        assert counts["lensnet"] == of_blocks


def test_work_counts_all_that_runs():
    def work(**options):
        objective = make_objective(make_model(), **options)
        return objective.work(1.0, T)

    length = target_length(1.0, T, K, make_objective(make_model()).config.mc_train_wc_length)
    variants = (1 - DENSE_SHARE) * length / T
    assert work(mc_lens_loss_weight=0.0) > DENSE_SHARE + 3 * variants
    assert work() > work(mc_lens_loss_weight=0.0)
    less = 2 / 3 * DENSE_SHARE - (1 - DENSE_SHARE) / 3  # a frozen model still looks, and teaches
    assert work() - work(mc_freeze_base=True) == pytest.approx(less)
    more = work(mc_max_counterfactuals=3) - work(mc_max_counterfactuals=1)
    assert more == pytest.approx(2 * length / T * DENSE_SHARE / 3)  # read without a gradient
    objective = make_objective(make_model(), gistnet_type="mean", mc_lens_loss_weight=0.0)
    own = step_work(objective.model, objective.reader.networks, objective.config, 1.0, T)
    assert own == pytest.approx(
        DENSE_SHARE + 3 * (variants + (1 - DENSE_SHARE) * past_entries(objective.config, T) / T)
    )


def saved_bytes(function):
    """Bytes of activations that autograd keeps for the backward pass of function() -> loss; parameters left out."""
    seen = {}

    def pack(tensor):
        if not tensor.is_leaf or not tensor.requires_grad:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = function()
    assert loss.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize(
    "options", [{}, {"mc_num_random_variants": 1}, {"gistnet_type": "mean"}, {"mc_past": 0}], ids=str
)
def test_auto_batch_keeps_to_the_memory_of_the_plain_model(options):
    """What autograd keeps of a micro-batch in the chosen number of rows is no more than of the plain one, nearly."""
    model = make_model(GPTConfig(128, 70, 4, 2, 2, 64))
    objective = make_objective(model, block_size=8, **options)
    rows = auto_batch_size(16, objective.config, model.config)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(70, (16, 128), generator=generator)
    plain = saved_bytes(lambda: model(x, x))
    origins = torch.tensor([[row, 0] for row in range(rows)])
    for _ in range(4):  # so that there is a past
        objective.process_batch(x[:rows], x[:rows], 0.0, generator, origins=origins)
    ours = saved_bytes(lambda: objective.process_batch(x[:rows], x[:rows], 0.0, generator, origins=origins).loss)
    assert ours < 1.15 * plain
    assert ours > 0.4 * plain  # and the memory is used


def test_auto_batch_divides():
    config = MCConfig(block_size=K, mc_num_random_variants=4).resolve(T)
    model_config = GPTConfig(T, 70, 12, 6, 6, 384)
    assert auto_batch_size(32, config, model_config) == 8  # 32 / 2.3 is 14, of which 8 divides 32
    assert [auto_batch_size(B, config, model_config) for B in (1, 2, 9)] == [1, 2, 3]
    assert auto_batch_size(32, MCConfig(block_size=K, mc_auto_batch=False).resolve(T), model_config) == 32
