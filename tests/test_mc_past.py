"""The past of a training's sequences: against the whole stream kept in a list, and who learns from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.config import MCConfig
from megacontext.variants import Pasts, past_entries, put_before, random_past, random_variants, target_length
from megacontext.working_context import smallest_length
from nanochat.common import UserError
from tests import reference_mc as reference
from tests.helpers import CLOSE, RECENT, K, T, assert_equal, make_model, make_objective, tokens

FAR = 16 * T


def learned(**options):
    """An objective whose gists are not means."""
    objective = make_objective(make_model(), **{"mc_aux_dtype": "fp32", **options})
    for name, p in objective.reader.networks.named_parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return objective


def origins(streams, fresh=()):
    return torch.tensor([[stream, int(row in fresh)] for row, stream in enumerate(streams)])


def slow_tree(reader, ids):
    """All levels over a list of token ids, node by node: lists of vectors."""
    with torch.no_grad():
        leaves = list(reader.embed(torch.tensor([ids], dtype=torch.long))[0])
        return reference.tree(lambda children, level: reader.gist(torch.stack(children)[None], level)[0], leaves, K)


@given(blocks=st.integers(1, 400), K=st.integers(2, 8), most=st.integers(1, 120), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_a_past_is_a_tiling_within_its_bound(blocks, K, most, seed):
    context = random_past(blocks * K, K, most, torch.Generator().manual_seed(seed))
    context.check()
    length = int(context.lengths())
    assert length <= max(most, smallest_length(blocks * K, K, 0))
    assert length > most - (K - 1) or not context.tiles.any()  # no more room, or nothing left to open


def test_pasts_have_every_level():
    rows = [random_past(4**4 * K, 4, 64, torch.Generator().manual_seed(seed)) for seed in range(60)]
    assert {lod for row in rows for lod in row.entries.lod[0].tolist()} >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("length", [8, 12])  # of the sequences; 12 is not whole nodes of LOD 2
def test_pasts_against_the_whole_stream(length):
    """
    Two streams, whose sequences come two at a time, with beginnings of new text here and there. What is put before a
    sequence covers what its stream said since the last beginning, or the newest part of that, without a gap, and each
    entry is the node that GistNet makes of these tokens.
    """
    reader, chance = learned().reader, torch.Generator().manual_seed(1)
    pasts, told, lengths, seen = Pasts(reader, most=14 * length), {0: [], 1: []}, {0: [], 1: []}, set()
    for step in range(24):
        ids = torch.randint(70, (4, length), generator=chance)
        streams, fresh = [0, 0, 1, 1], {1: {2}, 7: {1}}.get(step, set())
        with torch.no_grad():
            gists = reader.tree(reader.embed(ids)).level(1)
        before = pasts.extend(origins(streams, fresh), ids, gists, chance)
        for row, (stream, (_, n)) in enumerate(zip(streams, before, strict=True)):
            assert n == 0 or (row not in fresh and n == lengths[stream][-1] + length)  # it goes on, or begins anew
            past, lengths[stream] = told[stream][len(told[stream]) - n :], [*lengths[stream], n]
            told[stream] += ids[row].tolist()
            most = 24
            inputs, entries, targets = put_before(
                before[row : row + 1],
                K,
                most,
                torch.zeros(1, 3, 32),
                random_variants(1, 3, K, 3, 3).entries,
                torch.ones(1, 3, dtype=torch.long),
                chance,
            )
            levels, end = slow_tree(reader, past), None
            assert targets.tolist() == [[-1] * (targets.size(1) - 3) + [1] * 3]
            assert entries.start[0, -3:].tolist() == [0, 1, 2]
            assert entries.valid.all()
            for x, lod, start, span in zip(inputs[0, :-3], *(t[0, :-3].tolist() for t in entries[:3]), strict=False):
                assert span == K**lod
                assert start == end or end is None
                assert (start + n) % span == 0
                torch.testing.assert_close(x, levels[lod][(start + n) // span], **CLOSE)
                seen.add(lod)
                end = start + span
            if n:
                assert end == 0
                coarsest = smallest_length(n, K, 0)
                assert min(coarsest, most) <= inputs.size(1) - 3 <= most
                assert entries.start[0, 0] == -n or coarsest > most - K
    assert max(map(max, lengths.values())) >= 4**3
    assert seen == {0, 1, 2, 3}
    starts = [n for stream in lengths.values() for n in stream[1:] if n == 0]
    assert len(starts) >= 3  # two of new text, others by chance
    assert max(map(max, lengths.values())) <= 14 * length


@pytest.mark.parametrize("limit", [0, 2])
def test_the_loss_against_one_row_at_a_time(limit):
    """A batch with pasts of different lengths, among them none: as the model reads each row by itself."""
    objective = learned(mc_gist_limit=limit)
    model, reader, V = objective.model, objective.reader, objective.config.mc_num_random_variants
    for step in range(3):
        objective.process_batch(*tokens(B=3, seed=step), 1.0, None, origins=origins([0, 0, 1]))
    x, y = tokens(B=4, seed=9)
    rows = origins([0, 1, 1, 2], fresh={1})
    saved = [objective.keeper.save(stream) for stream in range(3)]
    result = objective.process_batch(x, y, 1.0, torch.Generator().manual_seed(0), origins=rows)

    generator = torch.Generator().manual_seed(0)
    torch.rand((), generator=generator)
    order = torch.randperm(4, generator=generator)
    context = random_variants(
        2 * V, T, K, target_length(1.0, T, K, objective.config.mc_train_wc_length), RECENT, generator
    )
    pasts = Pasts(reader, FAR)
    for stream in (0, 1):
        pasts.load(stream, saved[stream])
    with torch.no_grad():
        before = pasts.extend(rows, x, reader.tree(model.embed(x)).level(1), generator)
        losses, totals = [], []
        for row in range(2 * V):
            i = int(order[2 + row // V])
            table, one = reader.tree(model.embed(x[i : i + 1])), context.select([row])
            inputs, entries, targets = put_before(
                [before[i]], K, past_entries(objective.config, T), table.materialize(one), one.entries,
                one.targets(y[i : i + 1]), generator,
            )  # fmt: skip
            read = {
                "cos_sin": reader.positions_of(entries),
                "key_bias": reference.bias_of(entries.lod[0].tolist(), limit),
            }
            losses.append(model(inputs_embeds=inputs, **read, targets=targets).item())
            totals.append(inputs.size(1))
    assert len(set(totals)) > 1
    assert result.stats["mc/token_loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.stats["mc/wc_entries"] == pytest.approx(sum(totals) / len(totals))
    assert sum(v for name, v in result.stats.items() if "lod_count" in name) == pytest.approx(sum(totals) / len(totals))


def test_who_learns_from_a_past():
    """Tokens that stand in the past alone get no gradient, but change the loss; those of the present get one."""
    grads, losses = [], []
    for other in (0, 1):
        objective = learned(mc_lens_loss_weight=0.0)
        old = torch.randint(35, 70, (4, T), generator=torch.Generator().manual_seed(other))
        for _ in range(2):
            objective.process_batch(old, old, 1.0, torch.Generator().manual_seed(0), origins=origins(range(4)))
        x, y = (t % 35 for t in tokens(B=4))
        result = objective.process_batch(x, y, 1.0, torch.Generator().manual_seed(2), origins=origins(range(4)))
        result.loss.backward()
        grads.append(objective.model.transformer.wte.weight.grad)
        losses.append(result.stats["mc/token_loss"].item())
        head = objective.reader.networks.gistnet.head.c_proj.weight.grad
        assert head.any()
    assert losses[0] != losses[1]
    for grad in grads:
        assert not grad[35:70].any()
        assert grad[:35].any(1).all()


def test_gists_of_the_past_have_no_gradient_and_stay_as_they_were():
    objective = learned()
    x, y = tokens(B=2)
    objective.process_batch(x, y, 1.0, torch.Generator().manual_seed(0), origins=origins([0, 1])).loss.backward()
    kept = objective.keeper.save(0)
    with torch.no_grad():
        for p in objective.reader.networks.gistnet.parameters():
            p.add_(1.0)
    objective.process_batch(*tokens(B=2, seed=1), 1.0, torch.Generator().manual_seed(3), origins=origins([0, 1]))
    for level, values in enumerate(objective.keeper.save(0)):
        assert not values.requires_grad
        if level < len(kept):
            assert torch.equal(values[:, : kept[level].size(1)], kept[level])
    assert objective.keeper.save(0)[1].size(1) == 2 * T // K


def test_what_was_saved_goes_on_bit_for_bit():
    one, two = learned(), learned()
    for step in range(3):
        batch = *tokens(B=4, seed=step), 1.0, torch.Generator().manual_seed(step)
        one.process_batch(*batch, origins=origins([3, 3, 5, 5]))
    for stream in (3, 5, 7):
        two.keeper.load(stream, one.keeper.save(stream))
    batch = tokens(B=4, seed=8)
    results = [
        o.process_batch(*batch, 1.0, torch.Generator().manual_seed(9), origins=origins([3, 5, 5, 7]))
        for o in (one, two)
    ]
    assert results[0].loss.item() == results[1].loss.item()
    for stream in (3, 5, 7):
        assert_equal(one.keeper.save(stream), two.keeper.save(stream))


def test_without_a_past_nothing_changes():
    """mc_past 0, or no origins, is the training of sequences alone, and the first sequence of each stream is, too."""
    losses = []
    for options, rows in (({"mc_past": 0}, origins(range(4))), ({}, None)):
        objective = learned(**options)
        batch = *tokens(B=4), 1.0, torch.Generator().manual_seed(0)
        losses.append(objective.process_batch(*batch, origins=rows).loss.item())
    assert losses[0] == losses[1]


def test_the_option():
    assert MCConfig().resolve(2048).mc_past == 16 * 2048
    assert MCConfig().resolve(2050).mc_past == 0  # not whole blocks
    assert MCConfig(mc_past=0).resolve(2048).mc_past == 0
    for length, past in ((2048, 2047), (2050, 8192)):
        with pytest.raises(UserError, match="--mc_past: expected 0, or at least max_seq_len"):
            MCConfig(mc_past=past).resolve(length)


@pytest.mark.parametrize("most", [T, 3 * T])
def test_all_lengths_up_to_the_bound_occur(most):
    pasts, x = Pasts(learned().reader, most), torch.zeros(300, T, dtype=torch.long)
    gists = torch.zeros(300, T // K, 32)
    lengths = [n for _, n in pasts.extend(origins([0] * 300), x, gists, torch.Generator().manual_seed(0))]
    assert set(lengths) == set(range(0, most + 1, T))
