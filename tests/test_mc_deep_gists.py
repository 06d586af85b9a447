"""Gists that a model is told once more further up: in training and in sessions."""

import pytest
import torch
import torch.nn.functional as F

from megacontext.gistnet import DeepGists
from megacontext.networks import FROZEN_RATES, RATES, MCNetworks
from megacontext.session import MCSession
from megacontext.variants import random_past, random_variants, target_length
from nanochat.gpt import GPT, GPTConfig, deepened
from tests.helpers import SESSION_GPT, K, make_model, make_objective, session_settings, tokens

CLOSE = {"atol": 5e-5, "rtol": 1e-4}
DEPTH = GPTConfig(sequence_len=64, vocab_size=70, n_layer=4, n_head=4, n_kv_head=2, n_embd=32)


def disturb(networks):
    for p in networks.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    return networks


def told(networks, model, ids, context):
    """
    What a model is told of a working context of one row, entry by entry: per entry its embedding or gist and, behind a
    gist, the vectors for further up; with a sink the first entry is the first token.
    """
    net, K, embeds, rows = networks.gistnet, context.block_size, model.embed(ids), []
    levels = [list(embeds[0])]
    while len(levels[-1]) >= K:
        blocks = [torch.stack(levels[-1][i : i + K])[:, :32] for i in range(0, len(levels[-1]) // K * K, K)]
        levels.append([net(block[None], len(levels))[0] for block in blocks])
    for lod, start, span in zip(*(t[0].tolist() for t in context.entries[:3]), strict=True):
        node = levels[0][0] if model.sink and start == 0 else levels[lod][start // span]
        rows.append(F.pad(node, (0, 32 + net.deep.width - len(node))))
    return torch.stack(rows)[None]


@torch.no_grad()
def test_at_the_start_they_say_nothing():
    """And a model that learns with them can begin: what it is told is of the length of its own states, 1 or 100."""
    model, deep = make_model(DEPTH), DeepGists(32, 3)
    assert deep.width == 3 * 32
    assert not deep(torch.randn(5, 32)).any()
    x, told = model.embed(torch.randint(70, (1, 9))), torch.randn(1, 9, 32)
    for length in (1.0, 100.0):
        state = length * x
        added = deepened(state, {1: told}, 1) - state
        expected = state.square().mean(-1, keepdim=True).sqrt() * told
        torch.testing.assert_close(added, expected, **CLOSE)
        assert deepened(state, {1: told}, 2) is state
    assert torch.equal(deepened(x, {1: torch.zeros_like(x)}, 1), x)


def test_a_model_of_one_layer_has_no_place_for_them():
    model = make_model(GPTConfig(sequence_len=64, vocab_size=70, n_layer=1, n_head=4, n_kv_head=2, n_embd=32))
    objective = make_objective(model, gistnet_deep=3, mc_freeze_base=True)
    assert objective.process_batch(*tokens(B=2), 1.0).loss.requires_grad


@pytest.mark.parametrize("kind", ["transformer", "copied"])
def test_a_gist_stands_before_what_it_adds(kind):
    """GistNet without them makes the same gists; they are made of the same block."""
    model, children = make_model(DEPTH), torch.randn(5, K, 32)
    settings = session_settings(gistnet_deep=2, gistnet_type=kind)
    net = disturb(MCNetworks(32, 4, settings, model)).gistnet
    with torch.no_grad():
        wide, deep, net.deep = net(children, 1), net.deep, None
        assert torch.equal(wide[:, :32], net(children, 1))
        pooled, (fc, proj) = net._pooled(children, 1), (deep.head.c_fc.weight, deep.head.c_proj.weight)
        torch.testing.assert_close(wide[:, 32:], torch.relu(pooled @ fc.T) ** 2 @ proj.T, **CLOSE)


@pytest.mark.parametrize("sink", [False, True])
def test_training_against_one_row_at_a_time(sink, monkeypatch):
    """Where the model has a sink, the first node is a token."""
    monkeypatch.setattr(GPT, "sink", sink)
    model = make_model(DEPTH).requires_grad_(False)
    objective = make_objective(model, gistnet_deep=2, mc_aux_dtype="fp32", mc_lens_loss_weight=0.0, mc_past=0)
    networks, V = disturb(objective.reader.networks), objective.config.mc_num_random_variants
    x, y = tokens(B=2)
    result = objective.process_batch(x, y, 1.0, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    torch.rand((), generator=generator)
    i = int(torch.randperm(2, generator=generator)[1])  # the compressed one
    T, recent = 64, objective.config.allocator_recent_tokens
    length = target_length(1.0, T, K, objective.config.mc_train_wc_length)
    contexts, losses = random_variants(V, T, K, length, recent, generator), []
    for row in range(V):
        context = contexts.select([row])
        inputs = told(networks, model, x[i : i + 1], context)
        targets, angles = context.targets(y[i : i + 1]), objective.reader.positions(context)
        losses.append(model(inputs_embeds=inputs, cos_sin=angles, targets=targets))
    assert result.stats["mc/token_loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    result.loss.backward()
    assert networks.gistnet.deep.head.c_proj.weight.grad.any()
    assert networks.gistnet.deep.head.c_fc.weight.grad.any()
    assert all(p.grad is None for p in model.parameters())


def test_they_stand_in_pasts_too():
    """What a stream said before: told as a session would be that had read all of it."""
    model = make_model(DEPTH)
    objective = make_objective(model, gistnet_deep=2, mc_aux_dtype="fp32")
    networks, pasts = disturb(objective.reader.networks), objective.keeper
    ids = torch.cat([tokens(B=1, seed=seed)[0] for seed in range(4)])
    with torch.no_grad():
        for row in ids:
            gists = objective.reader.tree(objective.reader.embed(row[None])).level(1)
            (before,) = pasts.extend(torch.zeros(1, 2).long(), row[None], gists, torch.Generator().manual_seed(0))
        assert before.num_tokens == 192
        context = random_past(192, K, 40, torch.Generator().manual_seed(1))
        assert context.coarsest > 1
        expected = told(networks, model, ids[:3].reshape(1, -1), context)
        torch.testing.assert_close(before.tree.materialize(context), expected, **CLOSE)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_session_says_what_the_model_says_when_it_is_told_them(exact, sink, monkeypatch):
    monkeypatch.setattr(GPT, "sink", sink)
    monkeypatch.setattr("megacontext.session.GIST_DTYPE", torch.float32)
    model = make_model(SESSION_GPT).eval()
    settings = session_settings(gistnet_deep=3, mc_infer_exact=exact, mc_aux_dtype="fp32")
    torch.manual_seed(3)
    networks = disturb(MCNetworks(SESSION_GPT.n_embd, SESSION_GPT.n_layer, settings, model)).eval()
    session = MCSession(model, networks, settings)
    prompt = torch.randint(0, 290, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    logits, differ = session.prefill(prompt), 0
    for token in range(20):
        context = session.context
        assert context.coarsest > 0
        with torch.inference_mode():
            ids, angles = torch.tensor([prompt + list(range(token))]), session.reader.positions(context)
            inputs = told(networks, model, ids, context)
            expected = model(inputs_embeds=inputs, cos_sin=angles)[:, -1]
            untold = model(inputs_embeds=inputs[..., :32], cos_sin=angles)[:, -1]
            asked = session.reader.states(inputs, context, torch.tensor([[inputs.size(1) - 1]]))
        if exact or token == 0:  # else some entries stay as they were read
            torch.testing.assert_close(logits, expected, **CLOSE)
            torch.testing.assert_close(asked[0], session.decoder.states[-1:], **CLOSE)
        differ += not torch.allclose(logits, untold, atol=1e-2)
        logits = session.step(torch.tensor([token]))
    assert differ == 20


def test_means_have_none():
    assert MCNetworks(32, 2, session_settings(gistnet_type="mean")).gistnet.deep is None


def test_a_model_learns_with_them():
    """Not frozen: model and vectors have gradients, and those of the tokens' embeddings reach them through gists."""
    objective = make_objective(make_model(DEPTH), gistnet_deep=3, mc_lens_loss_weight=0.0)
    networks = disturb(objective.reader.networks)
    objective.process_batch(*tokens(B=2), 1.0, torch.Generator().manual_seed(5)).loss.backward()
    for layer in networks.gistnet.deep.head.c_proj.weight.grad.unflatten(0, (3, 32)):
        assert layer.any()
    assert all(p.grad is not None for p in objective.model.parameters())


@pytest.mark.parametrize(("frozen", "rates"), [(False, RATES), (True, FROZEN_RATES)])
def test_gistnet_learns_slower_for_a_finished_model(frozen, rates):
    networks = MCNetworks(32, 2, session_settings(mc_freeze_base=frozen))
    groups = [group for optimizer in networks.setup_optimizers() for group in optimizer.param_groups]
    of = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert of[id(networks.gistnet.head.c_proj.weight)] == rates[0]
    assert of[id(networks.gistnet.level_embed)] == rates[1]
    assert {of[id(p)] for p in networks.lensnet.parameters()} <= set(RATES)
