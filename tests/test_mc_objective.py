"""The training recipe: its losses, whom they teach, and that gists learn to carry the context."""

import math

import pytest
import torch

import megacontext.objective
from megacontext.config import MCConfig
from megacontext.evaluation.validation import validate
from megacontext.inference import MCInference
from megacontext.lensnet import KEY, word_size
from megacontext.losses import ASKED, asked_tokens, lens_loss, looks_for_content, old_blocks_of
from megacontext.networks import MCNetworks
from megacontext.objective import MCObjective
from megacontext.reader import Reader
from megacontext.tree import build_table
from megacontext.variants import random_variants, target_length
from megacontext.working_context import Edit, WorkingContext
from nanochat.gpt import GPT, GPTConfig, norm
from nanochat.loss_eval import evaluate_bpb
from nanochat.training import PlainObjective
from scripts.base_train import relative_work
from tests.helpers import BOS, RECENT, K, T, make_model, make_objective, root_mean_square, tokens
from tests.reference_mc import bias_of


def process(objective, x, y, progress=1.0, seed=0):
    return objective.process_batch(x, y, progress, torch.Generator().manual_seed(seed))


def roles(B, generator=None, seed=0):
    """The numbers of B sequences, those that are dense first, as process_batch draws them."""
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    torch.rand((), generator=generator)
    return torch.randperm(B, generator=generator).tolist()


def test_dense_sequences_have_the_flagless_loss():
    """Bit for bit: the same tokens through the same model."""
    model, (x, y) = make_model(), tokens(B=4)
    result = process(make_objective(model), x, y)
    dense = roles(B=4)[:2]
    assert result.stats["mc/base_loss"].item() == model(x[dense], y[dense]).item()
    assert torch.equal(result.cached_embeddings, model.embed(x))


def test_before_mc_start_the_model_learns_alone():
    """All sequences are read in full, bit for bit as without MegaContext, and the step costs what it does then."""
    model, (x, y) = make_model(), tokens(B=4)
    objective = make_objective(model, mc_start=0.5)
    result = process(objective, x, y, progress=0.49)
    result.loss.backward()
    assert result.loss.item() == model(x[roles(B=4)], y[roles(B=4)]).item()
    assert all(p.grad is None for p in objective.reader.networks.parameters())
    assert objective.work(0.49, T) == 1.0
    whole = make_objective(make_model())
    for later, progress in (
        (0.5, 0.0),
        (0.75, 0.5),
        (1.0, 1.0),
    ):  # from then on, what is left of it is a whole training
        assert process(objective, x, y, later).stats.keys() == process(whole, x, y, progress).stats.keys()
        assert objective.work(later, T) == whole.work(progress, T)
    # --target_minutes measures the first steps, which are cheaper than the later ones
    half = sum(whole.work(step / 50, T) for step in range(50)) / 50
    assert relative_work(objective, T) == pytest.approx((1 + half) / 2)
    assert relative_work(PlainObjective(model), T) == 1


def test_each_sequence_has_both_roles():
    """A stream of text that is the same row of every batch is read in full at times, and compressed at times."""
    objective = make_objective(make_model(), mc_positional="gaussian")
    compressed = set()
    for seed in range(12):
        caches = process(objective, *tokens(B=4), seed=seed).positional_caches
        now = {name for name, (cos, _, fade) in caches.items() if fade is not None}
        assert len(now) == 2
        compressed |= now
    assert compressed == {0, 1, 2, 3}


def test_what_is_frozen_and_has_no_weight_needs_no_sequences():
    """Frozen, and one of the two networks with nothing to learn: all sequences are for the other; nothing crashes."""
    frozen = {"mc_freeze_base": True}
    stats = process(make_objective(make_model(), mc_lens_loss_weight=0.0, **frozen), *tokens(B=1)).stats
    assert stats["mc/variants_total"] == 3
    result = process(make_objective(make_model(), gistnet_type="mean", **frozen), *tokens(B=1))
    assert "mc/token_loss" not in result.stats
    assert result.loss.requires_grad


def test_a_frozen_model_teaches_what_it_says_of_all_tokens():
    """The loss is the divergence from that, entry by entry; the second time, behind a past that nobody scores."""
    model, (x, y) = make_model(), tokens(B=2)
    objective = make_objective(model, mc_freeze_base=True, mc_lens_loss_weight=0.0)
    seen, read = [], objective.reader.read_entries
    objective.reader.read_entries = lambda *given: seen.append((given, read(*given))) or seen[-1][1]
    for seed in (0, 1):
        generator, origins = torch.Generator().manual_seed(seed), torch.tensor([[0, 0], [1, 0]])
        result = objective.process_batch(x, y, 1.0, generator, origins=origins)
        (inputs, entries, targets, _), reading = seen.pop()
        log_p = model(x[roles(B=2, seed=seed)]).log_softmax(-1).repeat_interleave(len(inputs) // 2, 0)
        log_q = model(inputs_embeds=inputs, cos_sin=reading.positions).log_softmax(-1)
        last = (entries.start + entries.span - 1).clamp(min=0)
        log_p = log_p.gather(1, last[..., None].expand_as(log_q))
        expected = (log_p.exp() * (log_p - log_q)).sum(-1) * (targets >= 0)
        torch.testing.assert_close(reading.nll, expected.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(result.loss, reading.loss)
        assert reading.nll.max() > 0.01
    assert (entries.start < 0).any()


@pytest.mark.parametrize("length", [23, 24, 25])
def test_contexts_shorter_than_the_tokens_to_be_asked(length):
    """Variants end at this length or, where no number of collapses gives it, just below."""
    for progress in (0.0, 1.0):
        result = process(make_objective(make_model(), mc_train_wc_length=length), *tokens(B=4), progress)
        assert result.stats["mc/lens_loss"].isfinite()


def test_without_old_blocks_there_is_no_lens_loss():
    result = process(make_objective(make_model(), allocator_recent_tokens=T - 1), *tokens(B=4))
    assert "mc/lens_loss" not in result.stats
    assert result.loss.isfinite()


@pytest.mark.parametrize("limit", [0, 2])
def test_variant_loss_against_one_row_at_a_time(limit):
    """Batched over samples, variants and entries: the same as each working context read by itself."""
    model, (x, y) = make_model(), tokens(B=4)
    objective = make_objective(model, mc_positional="gaussian", mc_gist_limit=limit)
    V, generator = objective.config.mc_num_random_variants, torch.Generator().manual_seed(5)
    result = process(objective, x, y, seed=5)
    length = target_length(1.0, T, K, objective.config.mc_train_wc_length)
    order = roles(B=4, generator=generator)
    context = random_variants(2 * V, T, K, length, RECENT, generator)
    x, y = x[order], y[order]
    table = objective.reader.tree(model.embed(x[2:]))
    losses = []
    for row in range(2 * V):
        pieces, target, lods = [], [], []
        t = 0
        while t < T:  # entry by entry
            lod = int(context.lod_map[row, t // K])
            pieces.append(table.values[row // V, table.offsets[lod] + t // K**lod])
            lods.append(lod)
            end = t + K**lod
            next_is_token = end == T or int(context.lod_map[row, end // K]) == 0
            target.append(int(y[2 + row // V, end - 1]) if next_is_token else -1)
            t = end
        cos_sin = objective.reader.positions(context.select([row]))
        inputs, bias = torch.stack(pieces)[None], bias_of(lods, limit)
        loss = model(inputs_embeds=inputs, cos_sin=cos_sin, key_bias=bias, targets=torch.tensor([target]))
        losses.append(loss.item())
    assert result.stats["mc/token_loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert set(result.positional_caches) == {0, 1, 2, 3}
    for mine, whole in zip(result.positional_caches[order[3]], objective.reader.positions(context), strict=True):
        assert torch.equal(mine, whole[V:])
    cos, _, fade = result.positional_caches[order[0]]
    assert torch.equal(cos, model.cos[:, :T])
    assert fade is None


def test_the_loss_is_the_sum_of_its_parts():
    objective = wishful(make_objective(make_model(), mc_lens_loss_weight=0.5))
    result = process(objective, *tokens(B=4))
    base, token, lens = (result.stats[f"mc/{name}"].item() for name in ("base_loss", "token_loss", "lens_loss"))
    assert result.loss.item() == pytest.approx(base + token + 0.5 * lens, rel=1e-5)


@pytest.mark.parametrize("B", [1, 3])
def test_an_odd_sequence_is_dense_or_compressed_by_chance(B):
    objective, both = make_objective(make_model()), set()
    for seed in range(12):
        stats = process(objective, *tokens(B=B), seed=seed).stats
        both.add(("mc/base_loss" in stats, stats.get("mc/variants_total", 0)))
    V = 3
    assert both == ({(True, 0), (False, V)} if B == 1 else {(True, V), (True, 2 * V)})


def test_session_ids_name_the_caches():
    result = make_objective(make_model()).process_batch(*tokens(), 0.0, session_ids=["a", "b"])
    assert set(result.positional_caches) == {"a", "b"}


def wishful(objective):
    """The objective, with a LensNet that wants something; from the start, only its weights get a gradient."""
    networks = objective.reader.networks
    torch.nn.init.normal_(networks.lensnet.weigh, std=0.1, generator=torch.Generator().manual_seed(0))
    return objective


def gradients(model, objective):
    process(objective, *tokens(B=4)).loss.backward()
    networks = objective.reader.networks
    return {
        "trunk": model.transformer.h[0].attn.c_q.weight.grad,
        "embedding": model.transformer.wte.weight.grad,
        "gistnet": networks.gistnet.head.c_proj.weight.grad,
        "lensnet": networks.lensnet.weigh.grad,
    }


def test_every_network_learns_from_its_loss():
    model = make_model()
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(model, make_objective(model)).values())
    objective = wishful(make_objective(make_model()))
    process(objective, *tokens(B=4)).loss.backward()
    for name, p in objective.reader.networks.lensnet.named_parameters():
        if ("encoder.attn" not in name and "c_fc" not in name) or name.endswith("c_proj.weight"):
            assert p.grad.any(), name  # of all but what lies behind a matrix that is zero at first


def test_lens_loss_reaches_lensnet_only():
    """The same gradients of the trunk and of GistNet, to the bit, with and without it."""
    grads = []
    for weight in (0.0, 5.0):
        model = make_model()
        grads.append(gradients(model, wishful(make_objective(model, mc_lens_loss_weight=weight))))
    for name in ("trunk", "embedding", "gistnet"):
        assert torch.equal(grads[0][name], grads[1][name]), name
    assert grads[0]["lensnet"] is None
    assert grads[1]["lensnet"].any()


def test_lensnet_learns_from_its_loss_alone():
    """All sequences dense and a frozen trunk: no other parameter gets a gradient, and every one of LensNet does."""
    model = make_model()
    objective = make_objective(model, mc_freeze_base=True, gistnet_type="mean")
    for p in objective.reader.networks.lensnet.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    process(objective, *tokens(B=4)).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    for name, p in objective.reader.networks.lensnet.named_parameters():
        assert p.grad.any(), name


def test_what_a_model_sinks_into_is_no_content(monkeypatch):
    """A BOS in any model, and in one of others whatever comes first."""
    seen, (x, y) = [], tokens(B=4)
    x[:, 5] = BOS
    real = megacontext.objective.looks_for_content
    monkeypatch.setattr(megacontext.objective, "looks_for_content", lambda *a: seen.append(a[2]) or real(*a))
    for sink in (False, True):
        monkeypatch.setattr(GPT, "sink", sink)
        process(make_objective(make_model()), x, y)
    (plain, others), bos = seen, x[roles(B=4)[:2]] == BOS
    assert torch.equal(plain, bos)
    assert others[:, 0].all()
    assert torch.equal(others[:, 1:], bos[:, 1:])


@pytest.mark.parametrize("limit", [0, 2])
def test_lens_loss_against_one_sequence_at_a_time(limit):
    """Tokens of dense sequences ask as they are there, and as they are in working contexts of these."""
    model, (x, y) = make_model(), tokens(B=4)
    objective = wishful(make_objective(model, mc_max_counterfactuals=2, mc_aux_dtype="fp32", mc_gist_limit=limit))
    reader, config = objective.reader, objective.config
    for p in reader.networks.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    got = process(objective, x, y, seed=5).stats["mc/lens_loss"].item()

    generator = torch.Generator().manual_seed(5)
    x = x[roles(B=4, generator=generator)][:2]
    length = target_length(1.0, T, K, config.mc_train_wc_length)
    random_variants(2 * config.mc_num_random_variants, T, K, length, RECENT, generator)
    contexts = random_variants(2 * 2, T, K, length, RECENT, generator)
    tokens_asked, asked, _, there = asked_tokens(contexts, RECENT, ASKED, generator)
    n, lens = (T - RECENT) // K, reader.networks.lensnet
    per_row = tokens_asked.view(2, -1)
    with torch.no_grad():
        looks = model.trunk(model.embed(x), asking=per_row)[1]
        old = old_blocks_of(per_row, n, K, RECENT)
        content = looks_for_content(looks, per_row, x == BOS, K, old)
        z, parts = [], ([], [], [])
        for row in range(2):
            embeds = model.embed(x[row : row + 1])
            earlier = [embeds[:, i * K - K // 2 : i * K] if i else embeds[:, 1:K:2] for i in range(n)]
            keys = [lens.keys(embeds[:, i * K : (i + 1) * K], before)[0] for i, before in enumerate(earlier)]
            keys = torch.stack(keys)[None]
            table, dense = reader.tree(embeds), model.states(embeds)
            for c in range(2):
                context = contexts.select([2 * row + c])
                inputs = torch.stack(
                    [
                        table.values[0, table.offsets[lod] + start // K**lod]
                        for lod, start in zip(*(t[0].tolist() for t in context.entries[:2]), strict=True)
                    ]
                )
                bias = bias_of(context.entries.lod[0].tolist(), limit)
                compressed = model.states(inputs[None], reader.positions(context), bias)
                place = {int(start): i for i, start in enumerate(context.entries.start[0])}
                lod_of = dict(zip(*(t[0].tolist() for t in context.entries[1::-1]), strict=True))
                for p in range(asked.size(1)):
                    if asked[2 * row + c, p]:
                        t = int(tokens_asked[2 * row + c, p])
                        assert there[2 * row + c, p] == (t in place and lod_of[t] == 0)
                        for state in (dense[:, t], *([compressed[:, place[t]]] if there[2 * row + c, p] else [])):
                            z.append(lens(lens.asking(state[:, None], embeds, torch.tensor([[t]])), keys)[0, 0])
                            i = c * asked.size(1) + p
                            for part, value in zip(parts, (content[row, i], old[row, i]), strict=False):
                                part.append(value)
    content, old = (torch.stack(part)[None] for part in parts[:2])
    expected = lens_loss(torch.stack(z)[None], content, old, old[..., 0]).item()
    assert got == pytest.approx(expected, rel=1e-4)


def test_the_weight_of_the_lens_loss_scales_what_lensnet_learns():
    """Its optimizers are blind to the scale of gradients, so the weight is in its rates; GistNet's stay as they are."""

    def moved(weight):
        objective = wishful(make_objective(make_model(), mc_lens_loss_weight=weight))
        networks = objective.reader.networks
        before = {name: p.detach().clone() for name, p in networks.named_parameters()}
        optimizers = networks.setup_optimizers()
        process(objective, *tokens(B=4)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        change = {name: (p - before[name]).norm().item() for name, p in networks.named_parameters()}
        return change["lensnet.embed.weight"], change["gistnet.head.c_proj.weight"]

    (little, gist), (more, same_gist) = moved(0.1), moved(1.0)
    assert more == pytest.approx(10 * little, rel=1e-2)
    assert same_gist == pytest.approx(gist, rel=0.2)


def test_networks_keep_their_precision():
    """Whatever autocast surrounds them, and with embeddings in bf16, as on a GPU."""
    model = make_model()
    networks = make_objective(model).reader.networks
    for p in networks.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    children = torch.randn(2, 6, 32).bfloat16()  # K and those before
    asking, keys = torch.randn(2, 3, 32 + word_size(32)).bfloat16(), torch.randn(2, 5, KEY + word_size(32))

    def outputs(dtype):
        config = MCConfig(block_size=K, mc_aux_dtype=dtype).resolve(T)
        reader = Reader(model, networks, config)
        return reader.gist(children[:, 2:], 1), reader.block_keys(children), reader.wants(asking, keys)

    lens = networks.lensnet
    before, block = children.float().split((2, 4), dim=1)
    exact = networks.gistnet(block, 1), lens.keys(block, before), lens(asking.float(), keys)
    for around in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            fine, coarse = outputs("fp32"), outputs("bf16")
        for a, b, c in zip(fine, coarse, exact, strict=True):
            assert torch.equal(a, c)
            assert not torch.equal(b.float(), c)
            assert root_mean_square(b.float() - c) < 0.05 * root_mean_square(c)


@pytest.mark.parametrize("fast", [False, True])
def test_networks_are_in_bf16_where_the_hardware_has_it(fast, monkeypatch):
    monkeypatch.setattr("nanochat.common.has_fast_bf16", lambda device_type: fast)
    dtype = make_objective(make_model(), mc_aux_dtype="auto").reader.dtype
    assert dtype == (torch.bfloat16 if fast else torch.float32)


def test_options_change_what_they_should():
    def stats(**options):
        model, (x, y) = make_model(), tokens(B=4)
        objective = make_objective(model, **options)
        for p in objective.reader.networks.parameters():  # away from the start, at which all GistNets are the mean
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        result = process(objective, x, y)
        return {k: float(v) for k, v in result.stats.items()} | {"loss": result.loss.item()}

    plain = stats()
    for name, values in {
        "gistnet_type": ["mean"],
        "gistnet_layers": [4],
        "gistnet_pooling": ["query", "cls"],
        "gistnet_head": ["linear"],
        "gistnet_start": ["last"],
        "mc_positional": ["simple"],
        "block_size": [8],
    }.items():
        for value in values:
            assert stats(**{name: value})["mc/token_loss"] != plain["mc/token_loss"], (name, value)
    for name, value in {"lensnet_layers": 4, "lensnet_head": "linear", "mc_max_counterfactuals": 2}.items():
        other = stats(**{name: value})
        assert other["mc/token_loss"] == plain["mc/token_loss"]
        assert other["mc/lens_loss"] != plain["mc/lens_loss"], name
    assert stats(mc_num_random_variants=2)["mc/variants_total"] == 4
    assert stats(mc_train_wc_length=40)["mc/lod_count/0"] > plain["mc/lod_count/0"]
    assert stats(allocator_recent_tokens=16)["mc/lod_count/0"] != plain["mc/lod_count/0"]
    assert stats(mc_lens_loss_weight=2.0)["loss"] != plain["loss"]
    assert "mc/base_loss" not in stats(mc_freeze_base=True)


def test_figures_of_each_level():
    model, (x, y) = make_model(), tokens(B=4)
    stats = process(make_objective(model), x, y).stats
    counts = [value for name, value in stats.items() if name.startswith("mc/lod_count/")]
    assert sum(counts) == pytest.approx(stats["mc/wc_entries"])
    assert sum(count * K**lod for lod, count in enumerate(counts)) == pytest.approx(stats["mc/tree_tokens"])


def test_validation_against_its_parts():
    """With all of the budget the working context is the full one; with less, gists and tail are scored as they are."""
    model, batch = make_model(), tokens(B=3)
    token_bytes = torch.arange(70, dtype=torch.int32) % 4
    for budget in (T, 32):
        reader = make_objective(model, mc_eval_soft_max_length=budget).reader
        got = validate(reader, iter([batch, batch]), 2, token_bytes)
        assert got["val/bpb"] == pytest.approx(evaluate_bpb(model, iter([batch]), 1, token_bytes), rel=1e-6)
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


def test_validation_scores_the_newest_tokens_of_rows_that_differ_in_length():
    """A lens that expands a block in one row only: each row's own last entries are scored."""
    model, (x, y) = make_model(), tokens(B=2)
    reader = make_objective(model, mc_eval_soft_max_length=40).reader
    token_bytes = torch.ones(70, dtype=torch.int32)
    uneven = WorkingContext.initial(T, K, 36, RECENT, 2)
    uneven = uneven.apply([Edit(0, int((uneven.lod_map[0] > 0).nonzero()[0]), 1, 0)])
    assert len(set(uneven.lengths().tolist())) == 2
    reader.focus = lambda table, context, budget: uneven
    got = validate(reader, iter([(x, y)]), 1, token_bytes)["val/mc_bpb"]
    losses = []
    for row in range(2):
        context = uneven.select([row])
        inputs = reader.tree(model.embed(x[row : row + 1])).materialize(context)
        losses.append(reader.read(inputs, context, y[row : row + 1]).nll[0, -RECENT:])
    assert got == pytest.approx(torch.stack(losses).mean().item() / math.log(2), rel=1e-4)


def test_validation_uses_the_budget_of_the_runtime():
    assert MCConfig().resolve(2048).mc_eval_soft_max_length == 3 * 2048 // 4 - 32
    config = MCConfig(allocator_soft_max=512, mc_infer_refocus_interval=10).resolve(1024)
    assert config.mc_eval_soft_max_length == config.budget_of_a_refocus == 502
    assert MCInference(allocator_soft_max=256).apply(config).mc_eval_soft_max_length == 246
    assert MCConfig(mc_eval_soft_max_length=300).resolve(1024).mc_eval_soft_max_length == 300


@pytest.mark.parametrize(("blocks", "rounds"), [(1, 1), (1, 3), (2, 2)])
def test_focus_in_validation_uses_the_settings_of_the_runtime(blocks, rounds):
    """And not those of the same names without "infer": as many blocks open as a session would open in its rounds."""
    model, (x, _) = make_model(), tokens(B=1)
    options = {"mc_infer_allocator_max_replacements": blocks, "mc_infer_allocator_iterations": rounds}
    reader = make_objective(model, allocator_max_replacements=7, allocator_iterations=7, **options).reader
    reader.wanted = lambda states, keys: torch.full(keys.shape[:2], 4.0)  # all blocks
    lod_map = (torch.arange(T // K) < (T - RECENT) // K).to(torch.int8)[None]
    context = WorkingContext.from_map(lod_map, T, K)
    focused = reader.focus(reader.tree(model.embed(x)), context, T)
    assert focused.lengths() - context.lengths() == blocks * rounds * (K - 1)


# ---------------------------------------------------------------------------------------------------------
# The proof: documents that each use a few words of many, so that what came before tells which


def documents(B, T, generator, words=64, used=8):
    vocabulary = torch.rand(B, words, generator=generator).argsort(1)[:, :used]
    ids = vocabulary.gather(1, torch.randint(used, (B, T + 1), generator=generator))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize(("K", "blocks", "B", "steps", "goal"), [(8, 8, 16, 150, 0.93), (32, 4, 32, 200, 0.85)])
def test_gists_carry_the_context(K, blocks, B, steps, goal):
    """
    Context gain recovered, (truncated − gists) / (truncated − full) in loss on the newest 16 tokens, with all of the
    history as gists. Gists of other documents are worse than none. Of 32 words, learned gists tell more than means in
    their place; of 8, means tell as much.
    """
    torch.manual_seed(0)
    generator, chance = torch.Generator().manual_seed(0), torch.Generator().manual_seed(100)
    tail = 16
    T = blocks * K + tail
    model = GPT(GPTConfig(T, 64, 2, 1, 1, 64))
    model.init_weights()
    config = MCConfig(block_size=K, allocator_recent_tokens=tail, mc_train_wc_length=blocks + tail).resolve(T)
    networks = MCNetworks(64, 2, config)
    objective = MCObjective(model, networks, config, BOS)
    optimizers = model.setup_optimizers() + networks.setup_optimizers()
    for step in range(steps):
        x, y = documents(B, T, generator)  # half of them are read as gists
        objective.process_batch(x, y, 2 * step / steps, chance).loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * min(1, (steps - step) / (0.3 * steps))
            optimizer.step()
            optimizer.zero_grad()

    x, y = documents(256, T, generator)
    context = WorkingContext.initial(T, K, blocks + tail, tail, rows=256)
    cos_sin, targets = objective.reader.positions(context), context.targets(y)

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
    gained = (truncated - loss_with(objective.reader.gist)) / (truncated - full)
    assert gained >= goal
    assert loss_with(objective.reader.gist, shuffle=True) > truncated
    if K == 32:
        assert loss_with(objective.reader.gist) < loss_with(lambda children, level: norm(children.mean(1)))
