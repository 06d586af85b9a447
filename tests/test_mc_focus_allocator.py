"""The focus allocator against plain Python references, and what it promises on random contexts, scores and budgets."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.config import MCConfig
from megacontext.focus_allocator import Change, plan, worth
from megacontext.working_context import Edit, WorkingContext, smallest_length
from nanochat.common import UserError

NO_WISHES = {"allocator_expand_threshold": 1.0, "allocator_collapse_threshold": 1.0}


def configure(recent=0, most=4, **options):
    return MCConfig(allocator_recent_tokens=recent, mc_infer_allocator_max_replacements=most, **options)


def context_of(lods, K, tail=0):
    """One row with these LODs a block, and `tail` tokens more."""
    lod_map = torch.tensor([lods + [0] * (tail > 0)], dtype=torch.int8)
    context = WorkingContext.from_map(lod_map, len(lods) * K + tail, K)
    context.check()
    return context


def changes(directions):
    """What makes `recent` of 1 for each block that was expanded, −1 for those that were collapsed, else 0."""
    return [Change(block, 1, 1, 1 - direction) for block, direction in enumerate(directions) if direction]


def length(context):
    return int(context.lengths()[0])


def blocks(edit):
    return range(edit.first_block, edit.first_block + edit.num_blocks)


# ---------------------------------------------------------------------------------------------------------
# References in plain Python, entry by entry


def entries(context):
    """[(lod, start, span)], in order."""
    lods, N, K = context.lod_map[0].tolist(), context.num_tokens, context.block_size
    out, t = [], 0
    while t < N:
        lod = lods[t // K]
        out.append((lod, t, K**lod))
        t += K**lod
    return out


def best_in(scores, first_block, num_blocks):
    """The best score of these blocks; those without one, as the unfinished last one, count as −1."""
    return max(scores[first_block : first_block + num_blocks], default=-1.0)


def openings(context, scores):
    """[(score, its block, its node's level, the edits that open it)] of the best block of each node."""
    K, out = context.block_size, []
    for lod, start, span in entries(context):
        if lod > 0:
            first, n = start // K, span // K
            best = best_in(scores, first, n)
            block = next((b for b in range(first, first + n) if scores[b : b + 1] == [best]), first)
            sizes = [(K ** (level - 1), level - 1) for level in range(lod, 0, -1)]
            out.append((best, block, lod, [Edit(0, block // n * n, n, level) for n, level in sizes]))
    return out


def collapses(context, scores, recent):
    """{edit: worth} of K neighbours of one level that make up one parent, whole and not recent."""
    K, every, out = context.block_size, entries(context), {}
    for i in range(len(every) - K + 1):
        lod, start, span = every[i]
        whole = all(entry[0] == lod for entry in every[i : i + K]) and start % (K * span) == 0
        if whole and start + K * span <= context.num_tokens - recent:
            out[Edit(0, start // K, span, lod + 1)] = best_in(scores, start // K, span)
    return out


def fit(context, scores, budget, newest, recent):
    """Collapse the lowest-scored group, again and again, until the context fits."""
    edits = []
    while length(context) > budget:
        groups = collapses(context, scores, newest)
        rests = {edit: any(recent[b] == 1 for b in blocks(edit)) for edit in groups}
        edits.append(min(groups, key=lambda e: (rests[e], groups[e], e.new_lod, e.first_block)))
        context = context.apply(edits[-1:])
    return edits


def greedy(context, scores, budget, config, recent):
    """What plan is to answer where all is greedy: one wish after the other, and what is paid for it."""
    K, newest = context.block_size, config.allocator_recent_tokens
    edits = fit(context, scores, budget, newest, recent)
    left, after = config.mc_infer_allocator_max_replacements - len(edits), context.apply(edits)
    touched = {b for edit in edits for b in blocks(edit)}
    groups = sorted(collapses(context, scores, newest).items(), key=lambda g: (g[1], g[0].new_lod, g[0].first_block))
    wishes = [wish for wish in openings(context, scores) if wish[0] >= config.allocator_expand_threshold]
    for score, _, _, path in sorted(wishes, key=lambda wish: (-wish[0], wish[2], wish[1])):
        if left <= 0 or touched & set(blocks(path[0])) or any(recent[b] == -1 for b in blocks(path[0])):
            continue
        paid, longest = [], length(after) + (K - 1) * len(path)
        for edit, best in groups:
            gain = score - best
            enough = gain > 0 and gain >= config.allocator_expand_threshold + config.allocator_collapse_threshold
            free = enough and not touched & set(blocks(edit)) and not any(recent[b] == 1 for b in blocks(edit))
            if free and longest - (K - 1) * len(paid) > budget:
                paid.append(edit)
        if longest - (K - 1) * len(paid) <= budget:
            left -= 1
            edits += [*paid, *path]
            after = after.apply([*paid, *path])
            touched |= {b for edit in (*paid, *path) for b in blocks(edit)}
    return edits


# ---------------------------------------------------------------------------------------------------------
# Random contexts


@st.composite
def contexts(draw, max_blocks=40):
    K = draw(st.sampled_from((2, 3, 4)))
    context = WorkingContext.finest(1, draw(st.integers(1, max_blocks * K)), K)
    for _ in range(draw(st.integers(0, 4))):  # collapse some of what can be collapsed, level upon level
        groups = list(collapses(context, [0.0] * context.num_blocks, recent=0))
        context = context.apply([edit for edit in groups if draw(st.booleans())])
    return context


def draw_scores(draw, n):
    """Scores of which many are equal, so that ties come up."""
    return draw(st.lists(st.sampled_from([x / 8 for x in range(-7, 8)]), min_size=n, max_size=n))


@st.composite
def problems(draw, **options):
    context = draw(contexts())
    newest = draw(st.integers(0, context.num_tokens))
    scores = draw_scores(draw, context.num_tokens // context.block_size)  # the whole blocks
    smallest = smallest_length(context.num_tokens, context.block_size, newest)
    budget = draw(st.integers(smallest, max(smallest, length(context)) + 6))
    recent = draw(st.lists(st.integers(-1, 1), min_size=context.num_blocks, max_size=context.num_blocks))
    for name in ("expand", "collapse"):
        options.setdefault(f"allocator_{name}_threshold", draw(st.sampled_from((0.0, 0.125, 0.5))))
    options.setdefault("allocator", draw(st.sampled_from(("greedy", "stochastic_greedy"))))
    config = configure(newest, draw(st.integers(1, 5)), **options)
    return context, scores, budget, config, recent


@settings(max_examples=300, deadline=None)
@given(problems())
def test_every_plan_keeps_its_promises(problem):
    context, scores, budget, config, recent = problem
    before = context.lod_map.clone()
    edits = plan(
        torch.tensor(scores), context, budget, config, changes(recent), generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(context.lod_map, before)

    K, newest = context.block_size, config.allocator_recent_tokens
    excess = length(context) - budget
    forced = max(0, math.ceil(excess / (K - 1)))
    after = context
    for edit in edits:
        longer = length(after)
        after = after.apply([edit])
        assert abs(length(after) - longer) == K - 1
    after.check()
    assert length(after) <= budget
    old = context.old_blocks(newest)
    assert not (after.lod_map[:, old:] > before[:, old:]).any()  # nothing recent or unfinished got coarser

    wishes, paid, opened, touched = edits[forced:], [], 0, set()
    room = max(0, -excess) // (K - 1) if not forced else forced - math.ceil(excess / (K - 1))
    while wishes:
        edit = wishes.pop(0)
        if edit.new_lod > before[0, edit.first_block]:  # a payment, for the opening that follows
            assert 1 not in [recent[b] for b in blocks(edit)]  # nothing is undone
            paid.append(edit)
            continue
        path = [edit]
        while path[-1].new_lod:  # down to the tokens of one block
            path.append(wishes.pop(0))
            assert set(blocks(path[-1])) < set(blocks(path[-2]))
        opened += 1
        assert -1 not in [recent[b] for b in blocks(edit)]
        score = scores[path[-1].first_block]
        assert score >= config.allocator_expand_threshold
        assert len(paid) == max(0, len(path) - room)  # nothing collapses for which there is no need
        room += len(paid) - len(path)
        for payment in paid:
            gain = score - collapses(context, scores, newest)[payment]
            assert gain > 0
            assert gain >= config.allocator_expand_threshold + config.allocator_collapse_threshold
        for one in (*paid, edit):
            assert not touched & set(blocks(one))
            touched |= set(blocks(one))
        paid = []
    assert not paid
    assert opened <= max(0, config.mc_infer_allocator_max_replacements - forced)
    assert not {b for edit in edits[:forced] for b in blocks(edit)} & touched


@settings(max_examples=300, deadline=None)
@given(problems(allocator="greedy"))
def test_greedy_equals_the_reference(problem):
    context, scores, budget, config, recent = problem
    expected = greedy(context, scores, budget, config, recent)
    assert plan(torch.tensor(scores), context, budget, config, changes(recent)) == expected


@settings(max_examples=150, deadline=None)
@given(problems(allocator="greedy", **NO_WISHES))
def test_what_must_go_is_what_the_reference_lets_go(problem):
    context, scores, budget, config, recent = problem
    expected = fit(context, scores, budget, config.allocator_recent_tokens, recent)
    assert plan(torch.tensor(scores), context, budget, config, changes(recent)) == expected


@settings(max_examples=200, deadline=None)
@given(problems(allocator="greedy"), st.data())
def test_a_higher_score_never_closes_what_would_be_opened(problem, data):
    context, scores, budget, config, recent = problem
    edits = plan(torch.tensor(scores), context, budget, config, changes(recent))
    opened = [edit for edit in edits if edit.new_lod == 0]
    if not opened:
        return
    edit = data.draw(st.sampled_from(opened))
    scores[edit.first_block] = data.draw(st.floats(scores[edit.first_block], 1.0, width=16))
    assert edit in plan(torch.tensor(scores), context, budget, config, changes(recent))


# ---------------------------------------------------------------------------------------------------------
# One thing at a time


def test_opens_what_scores_high_and_closes_nothing_without_need():
    context = context_of([1, 1, 0, 0, 1], K=4, tail=2)
    scores = torch.tensor([0.9, 0.05, -0.2, -0.9, 0.3])
    assert plan(scores, context, 99, configure()) == [Edit(0, 0, 1, 0), Edit(0, 4, 1, 0)]


@pytest.mark.parametrize("levels", [2, 3])
def test_a_block_in_a_coarse_node_opens_at_once(levels):
    K = 4
    n = K ** (levels - 1)
    context = context_of([levels] * n + [0] * n, K)
    scores = torch.full((2 * n,), -0.9)
    scores[n - 2] = 0.9
    edits = plan(scores, context, 999, configure(most=1))
    assert [edit.new_lod for edit in edits] == list(range(levels - 1, -1, -1))
    after = context.apply(edits)
    assert after.lod_map[0, n - 2] == 0
    assert length(after) == length(context) + levels * (K - 1)
    # Where there is no room, as many blocks pay as there are levels; with one too few of them nothing happens
    full = plan(scores, context, length(context), configure(most=1))
    assert full == [*(Edit(0, n + i, 1, 1) for i in range(levels)), *edits]
    assert plan(scores, context, length(context), configure(recent=K * (n - levels + 1), most=1)) == []


@pytest.mark.parametrize(
    ("options", "budget", "first_blocks"),
    [
        ({}, 99, [0, 4]),
        ({"most": 1}, 99, [0]),
        ({"allocator_expand_threshold": 0.3125}, 99, [0]),
        ({"allocator_expand_threshold": 0.03125}, 99, [0, 4, 1]),
        ({}, 13, [3, 0, 2, 4]),
        ({"allocator_collapse_threshold": 0.5}, 13, [3, 0]),  # 0.25 + 0.25 is less than both thresholds
        ({"allocator_collapse_threshold": 1.0}, 13, [3, 0]),
        ({"allocator_collapse_threshold": 1.0, "allocator_expand_threshold": 0.8}, 13, []),
        ({"recent": 7}, 13, [2, 0]),
    ],
    ids=str,
)
def test_each_setting_changes_what_it_should(options, budget, first_blocks):
    context = context_of([1, 1, 0, 0, 1], K=4, tail=2)
    scores = torch.tensor([0.875, 0.0625, -0.25, -0.875, 0.25])
    edits = plan(scores, context, budget, configure(**options))
    assert [edit.first_block for edit in edits] == first_blocks


def test_a_full_budget_makes_openings_pay():
    context = context_of([1, 0, 0], K=4)
    scores = torch.tensor([0.5, 0.2, 0.1])
    swap = [Edit(0, 2, 1, 1), Edit(0, 0, 1, 0)]
    assert plan(scores, context, 9, configure()) == swap  # the cheapest pays
    assert plan(scores, context, 11, configure()) == swap  # 2 entries of room are not enough for 3
    assert plan(scores, context, 12, configure()) == swap[1:]
    weak = configure(allocator_expand_threshold=0.25, allocator_collapse_threshold=0.25)
    assert plan(scores, context, 9, weak) == []  # 0.5 − 0.1 is less than both thresholds
    assert plan(torch.full((3,), 0.5), context, 9, configure(allocator_expand_threshold=0.0)) == []  # for nothing


def test_no_node_pays_for_one_that_scores_lower():
    context = context_of([1, 1, 0, 0, 1], K=2)  # blocks 0 and 1 are siblings
    scores = torch.tensor([0.6, -0.9, 0.9, 0.9, 0.5])
    config = configure(recent=6)
    # 0.6 comes first but nothing can pay for it; 0.5 must not take its siblings
    assert plan(scores, context, 7, config) == []
    scores[4] = 0.9
    assert plan(scores, context, 7, config) == [Edit(0, 0, 2, 2), Edit(0, 4, 1, 0)]


def test_a_group_is_worth_its_best():
    """Over budget, the four siblings of which one is wanted most are not the first to go."""
    context = context_of([1] * 8, K=4)
    scores = torch.tensor([0.9, -0.6, -0.6, -0.6, *[-0.1] * 4])  # means of -0.225 and -0.1
    assert plan(scores, context, 5, configure(**NO_WISHES)) == [Edit(0, 4, 4, 2)]


def test_of_a_node_one_block_opens_in_a_plan_and_the_next_goes_on():
    context = context_of([2] * 4 + [1], K=4)
    scores = torch.tensor([0.5, 0.9, 0.8, 0.0, 0.3])
    edits = plan(scores, context, 99, configure())
    assert edits == [Edit(0, 0, 4, 1), Edit(0, 1, 1, 0), Edit(0, 4, 1, 0)]
    assert plan(scores, context.apply(edits), 99, configure()) == [Edit(0, 2, 1, 0), Edit(0, 0, 1, 0)]


def test_many_wanted_blocks_of_one_node_do_not_hide_others():
    context = context_of([3] * 16 + [1], K=4)
    assert plan(torch.tensor([0.9] * 16 + [0.5]), context, 99, configure(most=2))[-1] == Edit(0, 16, 1, 0)


def test_what_was_opened_lately_does_not_pay_but_opens_further():
    context = context_of([1, 0, 0, 0, 1, 1, 1, 1], K=4)
    scores = torch.tensor([0.9, -0.9, 0.0, 0.0, *[-0.9] * 4])
    pays = plan(scores, context, length(context), configure())
    assert pays == [Edit(0, 1, 1, 1), Edit(0, 0, 1, 0)]
    expanded = changes([1, 1, 0, 0, 1, 1, 1, 1])
    assert plan(scores, context, length(context), configure(), expanded) == [Edit(0, 2, 1, 1), Edit(0, 0, 1, 0)]


def test_a_collapse_is_not_undone():
    context = context_of([1, 1, 1, 1, 0, 1], K=4)
    scores = torch.tensor([-0.9] * 4 + [0.0, 0.9])
    collapsed = changes([-1] * 4 + [0, 0])
    assert plan(torch.tensor([0.9] * 4 + [0.0, 0.0]), context, 99, configure(), collapsed) == []
    further = [Edit(0, 0, 4, 2), Edit(0, 5, 1, 0)]
    assert plan(scores, context, length(context), configure(), collapsed) == further


def test_the_budget_is_above_rest_and_the_number_of_edits():
    context = WorkingContext.finest(1, 64, 4)
    expanded = changes([1] * 15 + [0])
    edits = plan(torch.zeros(16), context, 1, configure(most=1), expanded)
    assert edits[0] == Edit(0, 15, 1, 1)  # what was not expanded just now goes first
    after = context.apply(edits)
    assert entries(after) == [(3, 0, 64)]


def test_a_lens_without_opinions_leaves_a_context_alone_and_gives_up_the_oldest_tokens():
    context = context_of([2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0], K=4)
    for zeros in (torch.zeros(12), torch.zeros(0)):  # nothing is known yet of what is wanted
        for allocator in ("greedy", "stochastic_greedy"):
            assert plan(zeros, context, 99, configure(allocator=allocator)) == []
        assert plan(zeros, context, length(context) - 4, configure()) == [Edit(0, 8, 1, 1), Edit(0, 9, 1, 1)]


@settings(max_examples=100, deadline=None)
@given(problems(allocator="greedy", allocator_expand_threshold=0.0), st.data())
def test_blocks_without_a_score_count_as_the_worst(problem, data):
    """Those before `first` and those after the last score."""
    context, scores, budget, config, recent = problem
    first = data.draw(st.integers(0, len(scores)))
    end = data.draw(st.integers(first, len(scores)))
    known = torch.full((context.num_blocks,), -1.0)
    known[first:end] = torch.tensor(scores[first:end])
    expected = plan(known, context, budget, config, changes(recent))
    assert plan(known[first:end], context, budget, config, changes(recent), first=first) == expected


@settings(max_examples=100, deadline=None)
@given(contexts(), st.data())
def test_worth_is_the_best_of_each_tile(context, data):
    first = data.draw(st.integers(0, context.num_blocks))
    scores = draw_scores(data.draw, data.draw(st.integers(0, context.num_blocks - first)))
    tiles = zip(context.first_blocks[0].tolist(), context.tile_blocks[0].tolist(), strict=True)
    expected = [best_in([-1.0] * first + scores, begin, n) for begin, n in tiles]
    assert worth(torch.tensor(scores), context, first).tolist() == expected


# ---------------------------------------------------------------------------------------------------------
# stochastic_greedy

THREE_GAINS = [0.7, 0.4, 0.6]


def draw_plans(n, most, top_k, temperature):
    """Counts of the blocks opened, in order, out of three."""
    context = context_of([1, 1, 1], K=2)
    config = configure(
        most=most,
        allocator="stochastic_greedy",
        allocator_sample_top_k=top_k,
        allocator_sample_temperature=temperature,
    )
    generator = torch.Generator().manual_seed(0)
    plans = (plan(torch.tensor(THREE_GAINS), context, 9, config, generator=generator) for _ in range(n))
    return Counter(tuple(edit.first_block for edit in edits) for edits in plans)


@pytest.mark.parametrize(("top_k", "temperature"), [(2, 0.25), (3, 0.5), (8, 1.0)])
def test_draws_have_the_distribution_of_the_definition(top_k, temperature):
    n = 1000
    counts = draw_plans(n, 2, top_k, temperature)
    expected = {}
    ranked = sorted(range(3), key=lambda i: -THREE_GAINS[i])
    for first in ranked[:top_k]:
        rest = [i for i in ranked if i != first]
        for second in rest[:top_k]:
            p = 1.0
            for choice, pool in ((first, ranked[:top_k]), (second, rest[:top_k])):
                p *= math.exp(THREE_GAINS[choice] / temperature)
                p /= sum(math.exp(THREE_GAINS[i] / temperature) for i in pool)
            expected[first, second] = p
    assert sum(expected.values()) == pytest.approx(1)
    assert set(counts) <= set(expected)
    for pair, p in expected.items():
        assert abs(counts[pair] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n), (pair, p, counts)


def test_one_candidate_or_no_temperature_is_greedy():
    assert draw_plans(20, 3, top_k=1, temperature=5.0) == {(0, 2, 1): 20}
    assert draw_plans(20, 3, top_k=3, temperature=1e-3) == {(0, 2, 1): 20}
    assert len(draw_plans(50, 3, top_k=3, temperature=5.0)) > 3


# ---------------------------------------------------------------------------------------------------------
# What cannot be done


def test_a_budget_that_nothing_fits_names_the_smallest_that_does():
    context = WorkingContext.finest(1, 100, 4)
    config = configure(recent=10)
    smallest = smallest_length(100, 4, 10)
    with pytest.raises(UserError, match=f"budget of at least {smallest} entries.*last 10 .* got {smallest - 1}"):
        plan(torch.zeros(25), context, smallest - 1, config)
    after = context.apply(plan(torch.zeros(25), context, smallest, config))
    assert length(after) == smallest


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.zeros(1, 2), torch.full((2,), torch.nan)], ids=str)
def test_scores_that_do_not_fit_are_refused(scores):
    with pytest.raises(ValueError, match="finite scores of blocks among its 2"):
        plan(scores, WorkingContext.finest(1, 8, 4), 8, configure())


def test_several_rows_are_refused():
    with pytest.raises(ValueError, match="one row .* got 2 rows"):
        plan(torch.zeros(2), WorkingContext.finest(2, 8, 4), 8, configure())


def test_a_prompt_takes_what_gains_anything():
    """Where there is no room, a wish that scores a little more than what is open takes its place for a prompt alone."""
    config = MCConfig(block_size=4, allocator_recent_tokens=0).resolve(32)
    context = WorkingContext.from_map(torch.tensor([[0, 1, 1]], dtype=torch.int8), 12, 4)
    scores, budget = torch.tensor([0.5, -0.5, 0.55]), int(context.lengths()[0])
    assert plan(scores, context, budget, config) == []
    edits = plan(scores, context, budget, config, eager=True)
    assert [(edit.first_block, edit.new_lod) for edit in edits] == [(0, 1), (2, 0)]
    scores[2] = 0.5
    assert plan(scores, context, budget, config, eager=True) == []
