"""What must hold of a model that reads gists, whatever the mixture of levels and however its networks are built."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.reader import entry_positions
from megacontext.working_context import WorkingContext
from nanochat.gpt import rotary_frequencies
from tests import reference_mc as reference
from tests.helpers import K, T, make_model, make_objective, tokens

VOCAB = 70


def built(model, options=None):
    """An objective whose networks are far from their start, so that they can hide nothing."""
    objective = make_objective(model, **(options or {}))
    objective.reader.networks.eval()
    for name, p in objective.reader.networks.named_parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return objective


MODEL = make_model()
READER = built(MODEL).reader


def logits(x, context):
    with torch.no_grad():
        inputs = READER.tree(READER.embed(x)).materialize(context)
        return MODEL(inputs_embeds=inputs, cos_sin=READER.positions(context))


@given(N=st.integers(1, T), coarse=st.floats(0, 1), rng=st.randoms(use_true_random=False), data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_ends_before_a_token_does_not_know_it(N, coarse, rng, data):
    """For any mixture of levels: entries that end at or before a changed token stay as they were, bit for bit."""
    context = WorkingContext.from_map(torch.tensor([reference.random_row(rng, N, K, coarse)], dtype=torch.int8), N, K)
    t = data.draw(st.integers(0, N - 1))
    x = torch.tensor([[rng.randrange(VOCAB) for _ in range(N)]])
    changed = x.clone()
    changed[0, t] = (x[0, t] + 1 + rng.randrange(VOCAB - 1)) % VOCAB
    entries = context.entries
    before = (entries.start + entries.span <= t)[0]
    one, two = logits(x, context)[0], logits(changed, context)[0]
    assert torch.equal(one[before], two[before])
    assert not torch.equal(one[~before][:1], two[~before][:1])  # the entry that holds it does know


@pytest.mark.parametrize("positional", ["near", "gaussian", "simple"])
def test_all_tokens_is_the_flagless_model_bit_for_bit(positional):
    x, y = tokens(B=3)
    reader = built(MODEL, {"mc_positional": positional}).reader
    context = WorkingContext.finest(3, T, K)
    inputs = reader.tree(reader.embed(x)).materialize(context)
    with torch.no_grad():
        assert torch.equal(reader.read(inputs, context, y).nll.flatten(), MODEL(x, y, loss_reduction="none"))
    assert torch.equal(reader.read(inputs, context, y).loss, MODEL(x, y))


@pytest.mark.parametrize("pooling", ["mean", "query", "cls"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_few_steps_change_every_parameter(pooling, head):
    model = make_model()
    objective = make_objective(
        model, gistnet_pooling=pooling, gistnet_head=head, lensnet_head=head, mc_num_random_variants=4
    )
    networks = objective.reader.networks
    before = {name: p.detach().clone() for name, p in networks.named_parameters()}
    optimizers = networks.setup_optimizers()
    for step in range(4):  # what is zero at first holds back the gradient of what lies before it
        objective.process_batch(*tokens(B=4, seed=step), 1.0, torch.Generator().manual_seed(step)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    same = [name for name, p in networks.named_parameters() if torch.equal(p, before[name])]
    assert not same


def test_no_span_is_so_vague_that_its_key_is_lost():
    """The slowest frequency of even the widest span is left with e^−½ of itself."""
    for lod in range(1, 6):
        span = torch.tensor([[32**lod]])
        fade = entry_positions(torch.zeros_like(span), span, rotary_frequencies(64))[2]
        assert fade.max() >= 0.6
        if lod > 1:
            assert fade.min() < 1e-6
