"""The working context against walks over Python lists, for any number of tokens, block size and mixture of levels."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from megacontext.config import MCConfig
from megacontext.focus_allocator import plan
from megacontext.reader import as_positions
from megacontext.working_context import Edit, WorkingContext, damping, smallest_length
from nanochat.common import UserError
from tests import reference_mc as reference

shapes = st.tuples(st.integers(1, 90), st.integers(2, 5), st.integers(1, 3), st.randoms(use_true_random=False))


def random_context(N, K, rows, rng):
    coarse = rng.random()
    maps = [reference.random_row(rng, N, K, coarse) for _ in range(rows)]
    return WorkingContext.from_map(torch.tensor(maps, dtype=torch.int8), N, K)


def row_entries(context, row):
    """[(lod, start, span)] of the valid entries of a row."""
    lod, start, span, valid = (field[row] for field in context.entries)
    return list(zip(lod[valid].tolist(), start[valid].tolist(), span[valid].tolist(), strict=True))


def padded(rows, value):
    longest = max(map(len, rows))
    return [row + [value] * (longest - len(row)) for row in rows]


@given(shapes, st.integers(0, 9))
def test_gists_take_as_many_positions_as_the_limit(shape, limit):
    """Entries stand one after another; of the gists of a row, as many in turn share one as the limit asks for."""
    context = random_context(*shape)
    start, span = as_positions(context.entries, "rank", 0, limit)[1:3]
    assert (span == 1).all()
    for row in range(context.num_rows):
        lods = [lod for lod, *_ in row_entries(context, row)]
        gists = sum(lod > 0 for lod in lods)
        sharing = max(1, math.ceil(gists / limit)) if limit else 1
        expected, tokens, before = [], 0, 0
        for lod in lods:
            expected.append(tokens + math.ceil(before / sharing))
            tokens, before = tokens + (lod == 0), before + (lod > 0)
        assert start[row, : len(lods)].tolist() == expected
        assert expected[-1] < tokens + (limit or gists) + 1


@given(shapes, st.integers(2, 40))
def test_near_entries_stand_where_they_are_and_far_ones_before_them(shape, T):
    context = random_context(*shape)
    start, span = as_positions(context.entries, "near", T)[1:3]
    for row, lods in enumerate(context.lod_map.tolist()):
        expected = reference.near_positions(lods, *shape[:2], T)
        assert list(zip(start[row].tolist(), span[row].tolist(), strict=True))[: len(expected)] == expected
        assert expected[-1][0] - expected[0][0] < T + len(expected)


@given(shapes, st.integers(0, 90))
def test_a_past_stands_one_by_one_before_a_sequence_of_T_tokens(shape, past):
    """As training has it, where tokens of the past have negative numbers."""
    context = random_context(*shape)
    past = min(past, shape[0] - 1)
    entries = context.entries._replace(start=(context.entries.start - past).where(context.entries.valid, 0))
    start, span = as_positions(entries, "near", shape[0] - past)[1:3]
    for row, valid in enumerate(entries.valid):
        far = valid & (entries.start[row] < 0)
        own = valid & ~far
        assert torch.equal(start[row, own], entries.start[row, own])
        assert torch.equal(span[row, own], entries.span[row, own])
        first = int(start[row, own][0]) if own.any() else shape[0] - past
        assert start[row, far].tolist() == list(range(first - int(far.sum()), first))
        assert (span[row, far] == 1).all()


@given(shapes)
@settings(max_examples=300, deadline=None)
def test_entries_are_those_of_a_walk_and_tile_the_tokens(shape):
    N, K, rows, _ = shape
    context = random_context(*shape)
    context.check()
    expected = [reference.entries(row, N, K) for row in context.lod_map.tolist()]
    assert context.lengths().tolist() == [len(row) for row in expected]
    got = context.entries
    assert got.valid.tolist() == padded([[True] * len(row) for row in expected], False)
    for field, place, padding in (("lod", 0, 0), ("start", 1, 0), ("span", 2, 1)):
        values = [[entry[place] for entry in row] for row in expected]
        assert getattr(got, field).tolist() == padded(values, padding)
    for row in range(rows):
        covered = [token for _, start, span in row_entries(context, row) for token in range(start, start + span)]
        assert covered == list(range(N))


@given(st.integers(0, 9999), st.integers(1, 99))
def test_many_gists_weigh_less_than_the_limit(gists, limit):
    weight = gists * damping(torch.tensor(gists), limit).exp().item()
    assert weight == pytest.approx(gists if gists <= limit else limit**2 / gists, rel=1e-5)
    assert damping(torch.tensor(gists), 0).item() == 0


@given(shapes)
@settings(max_examples=200, deadline=None)
def test_targets(shape):
    N, K, rows, rng = shape
    context = random_context(*shape)
    y = [[rng.choice([-1, t + 1]) for t in range(N)] for _ in range(rows)]
    expected = [reference.targets(*pair, N, K) for pair in zip(context.lod_map.tolist(), y, strict=True)]
    assert context.targets(torch.tensor(y)).tolist() == padded(expected, -1)


def test_targets_of_a_row_written_out():
    # tokens 0 1 2 3 | 4 5 6 7 | 8 9 with K = 2: a node of LOD 2, two of LOD 1, two tokens; token t + 1 follows t
    context = WorkingContext.from_map(torch.tensor([[2, 2, 1, 1, 0]], dtype=torch.int8), 10, 2)
    y = torch.arange(1, 11)[None]
    assert context.targets(y).tolist() == [[-1, -1, 8, 9, 10]]


@given(shapes)
@settings(max_examples=200, deadline=None)
def test_table_index(shape):
    N, K, rows, _ = shape
    context = random_context(*shape)
    table, offsets = [], []
    for lod in range(reference.levels(N, K) + 1):
        offsets.append(len(table))
        table += [(lod, i * K**lod) for i in range(N // K**lod)]
    index = context.table_index(offsets)
    for row in range(rows):
        length = int(context.lengths()[row])
        assert [table[i] for i in index[row, :length].tolist()] == [e[:2] for e in row_entries(context, row)]
    assert not index[~context.entries.valid].any()


def is_tiling(tiles, N, K):
    block = 0
    for lod in tiles:
        size = K ** max(lod - 1, 0)
        if lod < 0 or block % size or (lod > 0 and (block + size) * K > N):
            return False
        block += size
    return block == reference.num_blocks(N, K)


@given(st.integers(2, 3), st.integers(1, 28), st.data())
@settings(max_examples=500, deadline=None)
def test_check_accepts_exactly_the_tilings(K, N, data):
    row = reference.random_row(random.Random(data.draw(st.integers(0, 99))), N, K, 0.9)
    tiles = WorkingContext.from_map(torch.tensor([row], dtype=torch.int8), N, K).tiles[0].tolist()
    for place in data.draw(st.lists(st.integers(0, len(tiles) - 1), max_size=2)):
        tiles[place : place + 1] = data.draw(st.lists(st.integers(-1, 4), max_size=2))
    padding = [-1] * data.draw(st.integers(0, 2))
    context = WorkingContext(torch.tensor([tiles + padding], dtype=torch.int8), N, K)
    while tiles[-1:] == [-1]:
        tiles.pop()
    if is_tiling(tiles, N, K):
        context.check()
    else:
        with pytest.raises(ValueError, match="expected"):
            context.check()


@given(st.tuples(st.integers(1, 60), st.integers(2, 3), st.integers(1, 2), st.randoms(use_true_random=False)))
@settings(max_examples=100, deadline=None)
def test_random_edits_are_refused_or_keep_the_invariants(shape):
    K, rng = shape[1], shape[3]
    context = random_context(*shape)
    for _ in range(40):
        if rng.random() < 0.2:
            context = context.append(rng.randint(0, 2 * K))
            context.check()
            continue
        lod = rng.randint(-1, reference.levels(context.num_tokens, K) + 1)
        size = K ** max(lod - 1, 0)
        count = size * rng.randint(0, 2) if rng.random() < 0.8 else rng.randint(0, 4)
        first = rng.randrange(-1, context.num_blocks + 1)
        first = first // size * size if rng.random() < 0.8 else first
        edit = Edit(rng.randrange(context.num_rows), first, count, lod)
        rows = context.lod_map.tolist()
        rows[edit.row][max(first, 0) : first + count] = [lod] * min(count, context.num_blocks - first)
        inside = 0 <= first < first + count <= context.num_blocks
        whole = first % size == 0 and count % size == 0
        if inside and whole and reference.is_valid(rows[edit.row], context.num_tokens, K):
            before, context = context, context.apply([edit])
            assert context.lod_map.tolist() == rows
            assert not torch.equal(before.lod_map, context.lod_map) or lod == before.lod_map[edit.row, first]
        else:
            with pytest.raises(ValueError, match="Edit.*expected"):
                context.apply([edit])
        context.check()


def test_thousands_of_expansions_and_collapses_change_the_length_by_one_less_than_a_block():
    rng, K, N = random.Random(1), 4, 4**4 + 7
    context = WorkingContext.finest(2, N, K)
    for _ in range(3000):
        row = rng.randrange(2)
        lod, start, span = rng.choice(row_entries(context, row))
        block, lengths = start // K, context.lengths()
        if lod > 0 and rng.random() < 0.5:
            edit, change = Edit(row, block, span // K, lod - 1), K - 1
        else:
            size = K**lod  # blocks of the parent
            block = block // size * size
            siblings = context.lod_map[row, block : block + size].tolist()
            if (block + size) * K > N or siblings != [lod] * size:
                continue
            edit, change = Edit(row, block, size, lod + 1), 1 - K
        context = context.apply([edit])
        context.check()
        lengths[row] += change
        assert torch.equal(context.lengths(), lengths)
        assert sum(span for _, _, span in row_entries(context, row)) == N


@given(st.integers(1, 120), st.integers(2, 4), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_any_history_is_that_of_a_map_of_all_blocks(N, K, rng):
    """Rows edited together, each against a map of its own: appending, cutting, expanding, collapsing, selecting."""
    context = WorkingContext.finest(2, N, K)
    maps = [reference.DenseContext([0] * context.num_blocks, N, K) for _ in range(2)]
    for _ in range(25):
        n = rng.randint(1, 3 * K)
        recent, first = rng.randint(0, maps[0].N), rng.randrange(context.num_blocks)
        match rng.choice(["append", "truncate", "collapse_oldest", "edit", "edit", "edit", "select"]):
            case "append":
                context, maps = context.append(n), [one.append(n) for one in maps]
            case "truncate":
                n = max(1, maps[0].N - rng.randint(0, 4 * K))
                context, maps = context.truncate(n), [one.truncate(n) for one in maps]
            case "collapse_oldest":
                context = context.collapse_oldest(n, recent, first)
                maps = [one.collapse_oldest(n, recent, first) for one in maps]
            case "edit":
                row = rng.randrange(2)
                nodes = [(start // K, span // K, lod - 1) for lod, start, span in maps[row].entries() if lod]
                nodes += [(first, size, lod + 1) for lod, first, size in maps[row].groups(0)]
                if nodes:
                    edit = rng.choice(nodes)
                    context = context.apply([Edit(row, *edit)])
                    maps = [one.edit(*edit) if i == row else one for i, one in enumerate(maps)]
            case "select":
                rows = [rng.randrange(2), rng.randrange(2)]
                context, maps = context.select(rows), [maps[row] for row in rows]
        context.check()
        assert context.num_tokens == maps[0].N
        assert [row_entries(context, row) for row in range(2)] == [one.entries() for one in maps]
        assert context.tiles.size(1) <= context.entries.lod.size(1)


def test_edits_are_applied_in_order_and_leave_the_old_context_alone():
    context = WorkingContext.finest(1, 8, 2)
    edits = [Edit(0, 0, 2, 1), Edit(0, 0, 2, 2), Edit(0, 2, 1, 1)]
    assert context.apply(edits).lod_map.tolist() == [[2, 2, 1, 0]]
    assert context.lod_map.tolist() == [[0, 0, 0, 0]]
    with pytest.raises(ValueError, match="got block 1 inside LOD 2"):
        context.apply([*edits, Edit(0, 1, 1, 0)])


@given(shapes, st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_append_adds_tokens_at_full_detail(shape, n):
    context = random_context(*shape)
    longer = context.append(n)
    longer.check()
    for row in range(context.num_rows):
        tokens = [(0, context.num_tokens + t, 1) for t in range(n)]
        assert row_entries(longer, row) == row_entries(context, row) + tokens


@given(st.integers(1, 400), st.integers(2, 6), st.integers(0, 60), st.integers(1, 400))
@settings(max_examples=300, deadline=None)
def test_initial_is_as_fine_as_the_budget_allows(N, K, recent, budget):
    recent = min(recent, N)
    smallest = reference.smallest_length(N, K, recent)
    assert smallest_length(N, K, recent) == smallest
    if budget < smallest:
        with pytest.raises(UserError, match=f"at least {smallest} entries for {N} tokens.*got {budget}"):
            WorkingContext.initial(N, K, budget, recent)
        return
    context = WorkingContext.initial(N, K, budget, recent, rows=2)
    context.check()
    row = context.lod_map[0].tolist()
    assert context.lod_map[1].tolist() == row
    assert row == sorted(row, reverse=True)  # the older the coarser
    length = int(context.lengths()[0])
    assert length <= budget
    assert length > budget - (K - 1) or length == N  # one node less would not fit
    assert not any(lod for lod, start, span in row_entries(context, 0) if start + span > N - recent)


@given(shapes)
@settings(max_examples=200, deadline=None)
def test_collapse_oldest(shape):
    """Level by level, a group of siblings at a time, until it is short enough."""
    N, K, _, rng = shape
    context = random_context(*shape)
    budget, recent, first_block = rng.randint(1, N), rng.randint(0, N), rng.randint(0, context.num_blocks)
    expected = context.lod_map.tolist()
    for row in expected:
        for lod in range(1, 9):
            size = K ** (lod - 1)
            for first in range(0, (N - recent) // K - size + 1, size):
                group = slice(first, first + size)
                if first >= first_block and len(reference.entries(row, N, K)) > budget and set(row[group]) == {lod - 1}:
                    row[group] = [lod] * size
    collapsed = context.collapse_oldest(budget, recent, first_block)
    collapsed.check()
    assert collapsed.lod_map.tolist() == expected


@given(shapes)
@settings(max_examples=200, deadline=None)
def test_truncate_takes_cut_nodes_apart(shape):
    N, K, rows, rng = shape
    context, n = random_context(*shape), rng.randint(1, N)

    def parts(lod, start, span):
        if start >= n or start + span <= n:
            return [(lod, start, span)] if start < n else []
        return [part for i in range(K) for part in parts(lod - 1, start + i * (span // K), span // K)]

    shorter = context.truncate(n)
    shorter.check()
    assert shorter.num_tokens == n
    for row in range(rows):
        assert row_entries(shorter, row) == [part for entry in row_entries(context, row) for part in parts(*entry)]


def test_select():
    context = random_context(30, 3, 3, random.Random(0))
    for rows in (slice(1, 3), [2, 0, 2], torch.tensor([1])):
        assert torch.equal(context.select(rows).lod_map, context.lod_map[rows])


@pytest.mark.parametrize(
    ("lod_map", "N", "K", "message"),
    [
        (torch.zeros(1, 3), 9, 3, "expected int8 .B, 3. for 9 tokens in blocks of 3, got torch.float32"),
        (torch.zeros(1, 3, dtype=torch.int8), 10, 3, "expected int8 .B, 4.*got torch.int8 .1, 3."),
        (torch.zeros(3, dtype=torch.int8), 9, 3, "expected int8 .B, 3.*got torch.int8 .3."),
        (torch.zeros(1, 0, dtype=torch.int8), 0, 3, "at least 1 token.*got 0 and 3"),
        (torch.zeros(1, 9, dtype=torch.int8), 9, 1, "a block_size of at least 2, got 9 and 1"),
    ],
)
def test_wrong_maps_are_refused(lod_map, N, K, message):
    with pytest.raises(ValueError, match=message):
        WorkingContext.from_map(lod_map, N, K)


def test_wrong_targets_are_refused():
    with pytest.raises(ValueError, match="expected shape .2, 9., got .1, 9."):
        WorkingContext.finest(2, 9, 3).targets(torch.zeros(1, 9, dtype=torch.long))


class LargestTensor(TorchFunctionMode):
    """Remembers the most elements that the result of any call had."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        self.elements = max([self.elements, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


def test_no_tensor_grows_with_the_stream():
    N, K, budget = 10**9, 32, 2048
    settings = MCConfig(allocator_recent_tokens=128, mc_infer_allocator_max_replacements=4)
    with LargestTensor() as largest:
        context = WorkingContext.initial(N, K, budget, 128).append(1)
        context.check()
        assert plan(torch.full((1000,), 0.5), context, budget, settings, first=context.num_blocks - 2000)
        context.collapse_oldest(budget - 500, 128).truncate(N - 1000)
    assert context.entries.span.sum() == N + 1
    assert largest.elements <= K * budget
