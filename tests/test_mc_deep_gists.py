"""Gists that a finished model is told once more further up: in training, in sessions, and for whom they are."""

import pytest
import torch

from megacontext.gistnet import DeepGists
from megacontext.networks import FROZEN_RATES, RATES, MCNetworks
from megacontext.session import MCSession
from megacontext.variants import past_entries
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from tests.helpers import SESSION_GPT, make_model, make_objective, session_settings, tokens

CLOSE = {"atol": 5e-5, "rtol": 1e-4}
DEPTH = GPTConfig(sequence_len=64, vocab_size=70, n_layer=4, n_head=4, n_kv_head=2, n_embd=32)


def disturb(networks):
    for p in networks.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    return networks


def told(deep, inputs, gists):
    """Inputs [W, D] as the model takes them, entry by entry; gists: which of them are."""
    rows = []
    for x, is_gist in zip(inputs, gists, strict=True):
        more = [n * (head.c_proj.weight @ x) * is_gist for n, head in zip(deep.lengths, deep.maps, strict=True)]
        rows.append(torch.cat((x, *more)))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize(("count", "layers"), [(3, [1, 2, 3]), (2, [1, 2]), (1, [2])])
def test_they_have_the_length_of_the_models_states(count, layers):
    model, seen = make_model(DEPTH), {}
    deep = DeepGists(model, count)
    for layer in layers:
        model.transformer.h[layer].register_forward_pre_hook(lambda block, args, i=layer: seen.update({i: args[0]}))
    model(torch.arange(64)[None] * 70 // 64)
    expected = [sorted((x**2).mean().sqrt().item() for x in seen[layer][0])[31] for layer in layers]
    assert deep.lengths.tolist() == pytest.approx(expected, rel=1e-4)
    assert not deep(torch.randn(5, 32)).any()  # at the start they say nothing


def test_a_model_of_one_layer_has_no_place_for_them():
    model = make_model(GPTConfig(sequence_len=64, vocab_size=70, n_layer=1, n_head=4, n_kv_head=2, n_embd=32))
    objective = make_objective(model, gistnet_deep=3, mc_freeze_base=True)
    assert objective.process_batch(*tokens(B=2), 1.0).loss.requires_grad


@pytest.mark.parametrize("sink", [False, True])
def test_training_against_one_row_at_a_time(sink, monkeypatch):
    """With pasts of several lengths, and where the model has a sink, in whose place the first node is a token."""
    monkeypatch.setattr(GPT, "sink", sink)
    seen = []
    model = make_model(DEPTH).requires_grad_(False)
    objective = make_objective(model, gistnet_deep=2, mc_aux_dtype="fp32", mc_lens_loss_weight=0.0)
    networks = disturb(objective.reader.networks)
    read, deep = objective.reader.read_entries, networks.gistnet.deep

    def kept(inputs, entries, targets, teacher=None):
        seen.append((inputs.detach(), entries, targets))
        return read(inputs, entries, targets, teacher)

    monkeypatch.setattr(objective.reader, "read_entries", kept)
    lengths = set()
    for step in range(3):
        origins, generator = torch.tensor([[0, 0], [1, 0], [2, int(step == 2)]]), torch.Generator().manual_seed(1)
        result = objective.process_batch(*tokens(B=3, seed=step), 1.0, generator, origins=origins)
        (inputs, entries, targets), losses = seen.pop(), []
        for row in range(len(inputs)):
            lod, start, _, valid = (t[row] for t in entries)
            gists = (lod > 0) & valid
            if sink:
                gists[0] = False
            lengths.add((int(gists.sum()), bool(start[0] < 0)))
            cos_sin = tuple(t[row : row + 1] for t in objective.reader.positions_of(entries))
            wide = told(deep, inputs[row], gists)[None]
            losses.append(model(inputs_embeds=wide, cos_sin=cos_sin, targets=targets[row : row + 1]))
        assert result.stats["mc/token_loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert {behind for _, behind in lengths} == {False, True}
    assert past_entries(objective.config, 64) > 0
    result.loss.backward()
    assert all(head.c_proj.weight.grad.any() for head in deep.maps)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_session_says_what_the_model_says_when_it_is_told_them(exact, sink, monkeypatch):
    monkeypatch.setattr(GPT, "sink", sink)
    monkeypatch.setattr("megacontext.streams.GIST_DTYPE", torch.float32)
    model = make_model(SESSION_GPT).eval()
    settings = session_settings(gistnet_deep=3, mc_infer_exact=exact, mc_aux_dtype="fp32")
    torch.manual_seed(3)
    networks = disturb(MCNetworks(SESSION_GPT.n_embd, settings, model)).eval()
    session = MCSession(model, networks, settings)
    prompt = torch.randint(0, 290, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    logits, differ = session.prefill(prompt), 0
    for token in range(20):
        context = session.context
        assert context.coarsest > 0
        with torch.inference_mode():
            inputs, gists = session.tree.materialize(context)[0], context.entries.lod[0] > 0
            gists[0] &= not sink
            angles = session.reader.positions(context)
            expected = model(inputs_embeds=told(networks.gistnet.deep, inputs, gists)[None], cos_sin=angles)[:, -1]
            untold = model(inputs_embeds=inputs[None], cos_sin=angles)[:, -1]
            asked = session.reader.states(inputs[None], context, torch.tensor([[len(inputs) - 1]]))
        if exact or token == 0:  # else some entries stay as they were read
            torch.testing.assert_close(logits, expected, **CLOSE)
            torch.testing.assert_close(asked[0], session.decoder.states[-1:], **CLOSE)
        differ += not torch.allclose(logits, untold, atol=1e-2)
        logits = session.step(torch.tensor([token]))
    assert differ == 20


def test_they_are_for_finished_models():
    with pytest.raises(UserError, match="--gistnet_deep: gists go deeper only into a finished model"):
        MCNetworks(32, session_settings(gistnet_deep=1))
    model = make_model(SESSION_GPT)
    assert MCNetworks(32, session_settings(gistnet_deep=1, gistnet_type="mean"), model).gistnet.deep is None


@pytest.mark.parametrize(("frozen", "rates"), [(False, RATES), (True, FROZEN_RATES)])
def test_gistnet_learns_slower_for_a_finished_model(frozen, rates):
    networks = MCNetworks(32, session_settings(mc_freeze_base=frozen))
    groups = [group for optimizer in networks.setup_optimizers() for group in optimizer.param_groups]
    of = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert of[id(networks.gistnet.head.c_proj.weight)] == rates[0]
    assert of[id(networks.gistnet.level_embed)] == rates[1]
    assert {of[id(p)] for p in networks.lensnet.parameters()} <= set(RATES)
