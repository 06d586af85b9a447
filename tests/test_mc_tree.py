"""The tree against nested Python lists; and, with the GPT, that a working context shows only what came before."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megacontext.tree
from megacontext.reader import entry_positions
from megacontext.tree import MegaContextTree, RamStore, build_table
from megacontext.working_context import WorkingContext
from nanochat.gpt import GPT, GPTConfig
from tests import reference_mc as reference

D = 8


def gist(children, level):
    """A stand-in for GistNet that is sensitive to the values, their order and the level."""
    weights = torch.linspace(0.5, 1.5, children.size(1), dtype=children.dtype)[:, None]
    return torch.tanh(1.3 * (children * weights).mean(1) + 0.1 * level) + 0.2 * children[:, 0].roll(1, -1)


def embedding(V=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(V, D, generator=generator, dtype=dtype)
    return lambda ids: table[ids]


def random_context(N, K, rows, rng):
    coarse = rng.random()
    maps = [reference.random_row(rng, N, K, coarse) for _ in range(rows)]
    return WorkingContext.from_map(torch.tensor(maps, dtype=torch.int8), N, K)


def own(gist_fn, K):
    """A gist function for a MegaContextTree, which has no use for what comes before a block."""
    return lambda children, level: gist_fn(children[:, -K:], level)


def new_tree(K, store=None, **options):
    return MegaContextTree(own(gist, K), K, store or RamStore(**options), embedding())


def random_ids(B, N, seed=0):
    return torch.randint(0, 50, (B, N), generator=torch.Generator().manual_seed(seed))


def levels_of(tree, B):
    """All nodes of a tree, as a list of [B, count, …]."""
    out = []
    while count := tree.store.count(len(out)):
        out.append(tree.store.get(len(out), torch.arange(count).expand(B, -1)))
    return out


def levels_of_table(table):
    ends = [*table.offsets[1:], table.values.size(1)]
    return [table.values[:, start:end] for start, end in zip(table.offsets, ends, strict=True)]


@given(st.integers(1, 50), st.integers(2, 5), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_table_holds_every_complete_node(N, K, B):
    embeds = embedding()(random_ids(B, N))
    levels = levels_of_table(build_table(gist, embeds, K))
    assert [level.size(1) for level in levels] == [N // K**lod for lod in range(reference.levels(N, K) + 1)]
    assert torch.equal(levels[0], embeds)
    for b in range(B):
        one = lambda block, level: gist(torch.stack(block)[None], level)[0]  # noqa: E731
        for level, expected in zip(levels, reference.tree(one, list(embeds[b]), K), strict=True):
            torch.testing.assert_close(level[b], torch.stack(expected))


@given(st.integers(2, 5), st.integers(1, 2), st.lists(st.integers(0, 30), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_appending_in_chunks_equals_building(K, B, chunks):
    ids = random_ids(B, sum(chunks))
    tree = new_tree(K)
    for i in range(len(chunks)):
        tree.append(ids[:, sum(chunks[:i]) : sum(chunks[: i + 1])])
        assert tree.num_tokens == sum(chunks[: i + 1])
    if not sum(chunks):
        return
    got, expected = levels_of(tree, B), levels_of_table(build_table(gist, embedding()(ids), K))
    assert torch.equal(got[0], ids)
    for level, other in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(level, other)


@given(st.integers(2, 7), st.lists(st.integers(0, 30), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_blocks_come_behind_the_tokens_before_them(K, chunks):
    """Of the block before, its later half; before the first of all, every second token of its own."""
    seen = []

    def watch(children, level):
        if level == 1:
            seen.extend(children[..., 0].tolist())
        return gist(children[:, -K:], level)

    tree = MegaContextTree(watch, K, RamStore(), lambda ids: ids[..., None].expand(-1, -1, D).double())
    for n in chunks:
        tree.append(torch.arange(tree.num_tokens, tree.num_tokens + n)[None])
    stream = list(range(sum(chunks)))
    for i, block in enumerate(seen):
        earlier = stream[i * K - K // 2 : i * K] if i else stream[1:K:2]
        assert block == earlier + stream[i * K : (i + 1) * K]
    assert len(seen) == sum(chunks) // K
    newest = tree.newest(5)[0, :, 0].tolist() if stream else []
    assert newest == stream[-5:]


def test_long_appends_are_taken_in_pieces(monkeypatch):
    seen = []
    gist_fn = own(lambda x, level: seen.append(x.numel()) or gist(x, level), 4)
    tree = MegaContextTree(gist_fn, 4, RamStore(), embedding())
    monkeypatch.setattr(megacontext.tree, "INGEST_TOKENS", 10)
    ids = random_ids(2, 203)
    tree.append(ids)
    assert max(seen) <= 2 * 12 * D  # what 10 new tokens complete, with up to 2 that waited
    for level, other in zip(
        levels_of(tree, 2)[1:], levels_of_table(build_table(gist, embedding()(ids), 4))[1:], strict=True
    ):
        torch.testing.assert_close(level, other)


@given(st.tuples(st.integers(1, 90), st.integers(2, 5), st.integers(1, 3), st.randoms(use_true_random=False)))
@settings(max_examples=80, deadline=None)
def test_both_forms_materialize_the_nodes_that_the_context_names(shape):
    N, K, B, _ = shape
    context = random_context(*shape)
    ids = random_ids(B, N)
    table, tree = build_table(gist, embedding()(ids), K), new_tree(K)
    tree.append(ids)
    x, levels = table.materialize(context), levels_of_table(table)
    lod, start, span, valid = context.entries
    assert x.shape == (*lod.shape, D)
    for b, w in valid.nonzero().tolist():
        assert torch.equal(x[b, w], levels[lod[b, w]][b, start[b, w] // span[b, w]])
    torch.testing.assert_close(tree.materialize(context), x)


@given(st.tuples(st.integers(1, 90), st.integers(2, 5), st.integers(1, 3), st.randoms(use_true_random=False)))
@settings(max_examples=40, deadline=None)
def test_a_sink_is_the_first_token_in_place_of_a_gist(shape):
    """And all else is what it is without one, in both forms, higher levels included."""
    N, K, B, _ = shape
    context, embed = random_context(*shape), embedding()
    ids = random_ids(B, N)
    tree = MegaContextTree(own(gist, K), K, RamStore(), embed, sink=True)
    tree.append(ids)
    plain = build_table(gist, embed(ids), K).materialize(context)
    for x in (build_table(gist, embed(ids), K, sink=True).materialize(context), tree.materialize(context)):
        assert torch.equal(x[:, 0], embed(ids)[:, 0])
        torch.testing.assert_close(x[:, 1:], plain[:, 1:])


def test_table_serves_several_variants_of_each_row():
    B, V, N, K = 2, 3, 40, 3
    table = build_table(gist, embedding()(random_ids(B, N)), K)
    context = random_context(N, K, B * V, random.Random(3))
    x = table.materialize(context)
    for row in range(B * V):
        one = table._replace(values=table.values[row // V][None])
        width = int(context.lengths()[row])
        assert torch.equal(x[row, :width], one.materialize(context.select([row]))[0])
    with pytest.raises(ValueError, match="expected a multiple of 2 rows, got 3"):
        table.materialize(context.select(slice(3)))


def test_gradients_reach_embeddings_and_gist_function():
    K, N = 3, 29
    weight = torch.eye(D, dtype=torch.float64, requires_grad=True)
    embeds = embedding()(random_ids(1, N)).requires_grad_()
    context = WorkingContext.initial(N, K, 12, 2)
    build_table(lambda x, level: gist(x, level) @ weight, embeds, K).materialize(context).sum().backward()
    assert weight.grad.any()
    assert (embeds.grad != 0).any(-1).all()  # every token is in some entry


def test_table_keeps_the_precision_of_the_embeddings():
    embeds = embedding(dtype=torch.bfloat16)(random_ids(1, 9))
    assert build_table(lambda x, level: gist(x, level).float(), embeds, 3).values.dtype == torch.bfloat16


@given(st.lists(st.tuples(st.integers(0, 25), st.floats(0, 1)), min_size=1, max_size=6), st.integers(2, 4))
@settings(max_examples=50, deadline=None)
def test_going_back_and_on_differently_equals_never_having_been_there(steps, K):
    tree, ids = new_tree(K), random_ids(2, 0)
    for seed, (n, keep) in enumerate(steps):
        more = random_ids(2, n, seed)
        tree.append(more)
        ids = torch.cat((ids, more), dim=1)
        ids = ids[:, : round(keep * ids.size(1))]
        tree.truncate(ids.size(1))
    fresh = new_tree(K)
    fresh.append(ids)
    for level, other in zip(levels_of(tree, 2), levels_of(fresh, 2), strict=True):
        torch.testing.assert_close(level, other)
    with pytest.raises(ValueError, match=f"expected 0 to {ids.size(1)}"):
        tree.truncate(ids.size(1) + 1)


def test_store_does_not_touch_what_it_was_given_and_grows_by_doubling():
    store, given_ids = RamStore(), torch.arange(6)[None]
    store.append(0, given_ids)
    store.truncate(0, 2)
    store.append(0, torch.tensor([[9]]))
    assert given_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert store.get(0, torch.tensor([[2, 0]])).tolist() == [[9, 0]]
    places = set()
    for i in range(1000):
        store.append(0, torch.tensor([[i]]))
        places.add(store._buffers[0].data_ptr())
    assert len(places) < 12
    assert store.count(0) == 1003
    assert store.get(0, torch.tensor([[3, 1002]])).tolist() == [[0, 999]]
    assert store.count(5) == 0


def test_store_keeps_gists_in_the_precision_asked_for_and_ids_exactly():
    tree = new_tree(4, dtype=torch.bfloat16)
    ids = random_ids(1, 64)
    tree.append(ids)
    exact = levels_of_table(build_table(gist, embedding()(ids), 4))
    got = levels_of(tree, 1)
    assert got[0].dtype == torch.int64
    assert got[1].dtype == torch.bfloat16
    for level, other in zip(got[1:], exact[1:], strict=True):
        torch.testing.assert_close(level.double(), other, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_entries_come_in_the_precision_of_the_embeddings(dtype, stored):
    tree = MegaContextTree(own(gist, 4), 4, RamStore(stored), embedding(dtype=dtype))
    tree.append(random_ids(1, 64))
    assert tree.materialize(WorkingContext.initial(64, 4, 20, 0)).dtype == dtype


def test_trees_work_across_inference_mode_and_keep_no_graph():
    weight = torch.eye(D, dtype=torch.float64, requires_grad=True)
    tree = MegaContextTree(own(lambda x, level: gist(x, level) @ weight, 2), 2, RamStore(), embedding())
    ids = random_ids(1, 24)
    with torch.inference_mode():
        tree.append(ids[:, :9])
        tree.append(ids[:, 9:10])  # now the store has room, made in inference mode
    tree.append(ids[:, 10:14])
    for token in ids[:, 14:].split(1, dim=1):
        tree.append(token)
    assert not any(level.requires_grad for level in levels_of(tree, 1))
    expected = build_table(gist, embedding()(ids), 2)
    for level, other in zip(levels_of(tree, 1)[1:], levels_of_table(expected)[1:], strict=True):
        torch.testing.assert_close(level, other)


class ListStore:
    """Another store: everything in Python lists, as one on disk might be in records."""

    device = torch.device("cpu")

    def __init__(self):
        self.levels = {}

    def append(self, level, values):
        rows = self.levels.setdefault(level, [[] for _ in values])
        for row, new in zip(rows, values.tolist(), strict=True):
            row.extend(new)

    def get(self, level, index):
        rows = [[row[i] for i in places] for row, places in zip(self.levels[level], index.tolist(), strict=True)]
        return torch.tensor(rows, dtype=torch.int64 if level == 0 else torch.float64)

    def count(self, level):
        return len(self.levels[level][0]) if level in self.levels else 0

    def truncate(self, level, count):
        for row in self.levels[level]:
            del row[count:]

    def settle(self):
        pass


def test_tree_needs_nothing_of_its_store_but_the_interface():
    ram, lists = new_tree(3), new_tree(3, ListStore())
    for tree in (ram, lists):
        for seed, n in enumerate((5, 0, 17, 31)):
            tree.append(random_ids(2, n, seed))
        tree.truncate(50)
        tree.append(random_ids(2, 9, seed=9))
    context = random_context(59, 3, 2, random.Random(5))
    torch.testing.assert_close(ram.materialize(context), lists.materialize(context))


def test_a_context_beyond_the_tree_is_refused():
    tree = new_tree(3)
    tree.append(random_ids(1, 10))
    with pytest.raises(ValueError, match="at most 10 tokens, got 11"):
        tree.materialize(WorkingContext.finest(1, 11, 3))


# ---------------------------------------------------------------------------------------------------------
# Through the model


def make_gpt(seed=0):
    """A model whose zero-initialized matrices are filled too, so that every path matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.3)
    return model.eval()


def forward(model, ids, context, mode="gaussian", **kwargs):
    """The model's output for each entry of working contexts over ids [B, N]."""
    table = build_table(gist, model.embed(ids), context.block_size)
    _, start, span, _ = context.entries
    cos_sin = entry_positions(start, span, model.frequencies, mode)
    return model(inputs_embeds=table.materialize(context), cos_sin=cos_sin, **kwargs)


@pytest.mark.parametrize("mode", ["gaussian", "simple"])
@pytest.mark.parametrize("N", [1, 31, 64, 100])
def test_a_context_of_tokens_only_is_the_plain_model_bit_for_bit(N, mode):
    model, ids = make_gpt(), random_ids(2, N)
    y = torch.where(torch.rand(2, N) < 0.2, -1, random_ids(2, N, seed=1))
    context = WorkingContext.finest(2, N, 4)
    with torch.no_grad():
        assert torch.equal(forward(model, ids, context, mode), model(ids))
    assert torch.equal(context.targets(y), y)
    grads = []
    for loss in (forward(model, ids, context, mode, targets=context.targets(y)), model(ids, y)):
        model.zero_grad()
        loss.backward()
        grads.append((loss, [p.grad for p in model.parameters()]))
    assert torch.equal(grads[0][0], grads[1][0])
    for mine, plain in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-5)  # sums over positions in another order


@given(st.tuples(st.integers(2, 64), st.integers(2, 5), st.integers(1, 3), st.randoms(use_true_random=False)))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_a_token_changes_no_output_that_comes_before_it(shape):
    N, _, rows, rng = shape
    model, ids = make_gpt(), random_ids(rows, N)
    context = random_context(*shape)
    before = forward(model, ids, context)
    t = rng.randrange(N)
    changed = ids.clone()
    changed[:, t] = (changed[:, t] + 1 + rng.randrange(48)) % 50
    after = forward(model, changed, context)
    _, start, span, valid = context.entries
    end = start + span
    past = valid & (end <= t)
    assert torch.equal(before[past], after[past])
    now = valid & (start <= t) & (end > t)
    assert (before[now] != after[now]).any(-1).all()  # the entry that holds the token does change
    # What an entry is to predict is the first token that could not have changed it
    targets = context.targets(torch.arange(1, N + 1).expand(rows, -1))
    has_target = targets >= 0
    assert torch.equal(targets[has_target], end[has_target])
