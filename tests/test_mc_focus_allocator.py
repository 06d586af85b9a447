"""The focus allocator against plain Python references, and what it promises on random contexts, scores and budgets."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.config import MCConfig
from megacontext.focus_allocator import Change, plan
from megacontext.working_context import Edit, WorkingContext, smallest_length
from nanochat.common import UserError

NO_WISHES = {"allocator_expand_threshold": 1.0, "allocator_collapse_threshold": 1.0}


def configure(recent=0, most=4, **options):
    return MCConfig(allocator_recent_tokens=recent, allocator_max_replacements=most, **options)


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


def expansions(context, scores):
    K = context.block_size
    return {
        Edit(0, start // K, span // K, lod - 1): score
        for (lod, start, span), score in zip(entries(context), scores, strict=True)
        if lod > 0
    }


def collapses(context, scores, recent):
    """{edit: worth} of K neighbours of one level that make up one parent, whole and not recent."""
    K, every, out = context.block_size, entries(context), {}
    for i in range(len(every) - K + 1):
        lod, start, span = every[i]
        whole = all(entry[0] == lod for entry in every[i : i + K]) and start % (K * span) == 0
        if whole and start + K * span <= context.num_tokens - recent:
            worth = max(scores[i : i + K]) if lod else sum(scores[i : i + K]) / K
            out[Edit(0, start // K, span, lod + 1)] = worth
    return out


def fit(context, scores, budget, newest, recent):
    """Collapse the lowest-scored group, again and again, until the context fits."""
    edits = []
    while length(context) > budget:
        groups = collapses(context, scores, newest)
        rests = {edit: any(recent[b] == 1 for b in blocks(edit)) for edit in groups}
        edit = min(groups, key=lambda e: (rests[e], groups[e], e.new_lod, e.first_block))
        value = {(start, span): s for (_, start, span), s in zip(entries(context), scores, strict=True)}
        value[edit.first_block * context.block_size, context.block_size**edit.new_lod] = groups[edit]
        context = context.apply([edit])
        scores = [value[start, span] for _, start, span in entries(context)]
        edits.append(edit)
    return edits


def total_gain(edits, context, scores, recent=0):
    gains = expansions(context, scores) | {e: -worth for e, worth in collapses(context, scores, recent).items()}
    return sum(gains[edit] for edit in edits)


def best_gain(context, scores, budget, most):
    """The greatest total gain of any set of disjoint edits that fits, by trying all."""
    wishes = [e for e, score in expansions(context, scores).items() if score >= 0]
    candidates = wishes + list(collapses(context, scores, 0))
    best = 0.0
    for n in range(1, most + 1):
        for edits in itertools.combinations(candidates, n):
            touched = [b for edit in edits for b in blocks(edit)]
            disjoint = len(set(touched)) == len(touched)
            if disjoint and length(context.apply(edits)) <= budget:
                best = max(best, total_gain(edits, context, scores))
    return best


# ---------------------------------------------------------------------------------------------------------
# Random contexts


@st.composite
def contexts(draw, max_blocks=40):
    K = draw(st.sampled_from((2, 3, 4)))
    context = WorkingContext.finest(1, draw(st.integers(1, max_blocks * K)), K)
    for _ in range(draw(st.integers(0, 4))):  # collapse some of what can be collapsed, level upon level
        groups = list(collapses(context, [0.0] * length(context), recent=0))
        context = context.apply([edit for edit in groups if draw(st.booleans())])
    return context


def draw_scores(draw, n):
    """Scores of which many are equal, so that ties come up."""
    return draw(st.lists(st.sampled_from([x / 8 for x in range(-7, 8)]), min_size=n, max_size=n))


@st.composite
def problems(draw, **options):
    context = draw(contexts())
    newest = draw(st.integers(0, context.num_tokens))
    scores = draw_scores(draw, length(context))
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
    assert len(edits) <= max(config.allocator_max_replacements, forced)
    after = context
    for edit in edits:
        longer = length(after)
        after = after.apply([edit])
        assert abs(length(after) - longer) == K - 1
    after.check()
    assert length(after) <= budget
    old = context.old_blocks(newest)
    assert not (after.lod_map[:, old:] > before[:, old:]).any()  # nothing recent or unfinished got coarser

    wishes = edits[forced:]
    touched = [b for edit in wishes for b in blocks(edit)]
    assert len(set(touched)) == len(touched)
    for edit in wishes:
        expands = edit.new_lod < before[0, edit.first_block]
        assert (-1 if expands else 1) not in [recent[b] for b in blocks(edit)]  # nothing is undone
    assert not {b for edit in edits[:forced] for b in blocks(edit)} & set(touched)
    if not forced:
        expand, collapse = config.allocator_expand_threshold, config.allocator_collapse_threshold
        gains = [total_gain([edit], context, scores, newest) for edit in edits]
        grown = [edit.new_lod < before[0, edit.first_block] for edit in edits]
        for i, (gain, expands) in enumerate(zip(gains, grown, strict=True)):
            if expands:
                assert gain >= expand
            elif gain < collapse:  # nobody's wish, so it pays for the expansion that follows
                assert grown[i + 1]
                assert gain + gains[i + 1] >= expand + collapse


@settings(max_examples=150, deadline=None)
@given(problems(allocator="greedy", **NO_WISHES))
def test_what_must_go_is_what_the_reference_lets_go(problem):
    context, scores, budget, config, recent = problem
    expected = fit(context, scores, budget, config.allocator_recent_tokens, recent)
    assert plan(torch.tensor(scores), context, budget, config, changes(recent)) == expected


@st.composite
def tiny(draw):
    """Few edits to choose from, and no sibling that could collapse asks to be expanded: then greedy is optimal."""
    context = draw(contexts(max_blocks=6).filter(lambda c: len(entries(c)) <= 14))
    scores = draw(st.lists(st.floats(-1, 1, width=16), min_size=length(context), max_size=length(context)))
    siblings = {b for edit in collapses(context, scores, 0) for b in blocks(edit)}
    for i, (lod, start, _) in enumerate(entries(context)):
        if lod > 0 and start // context.block_size in siblings:
            scores[i] = -abs(scores[i]) - 2**-10
    budget = draw(st.integers(length(context), length(context) + 3))
    return context, scores, budget, draw(st.integers(1, 4))


@settings(max_examples=200, deadline=None)
@given(tiny())
def test_greedy_gains_as_much_as_the_best_of_all_plans(problem):
    context, scores, budget, most = problem
    config = configure(most=most, allocator_expand_threshold=0.0, allocator_collapse_threshold=0.0)
    edits = plan(torch.tensor(scores), context, budget, config)
    assert total_gain(edits, context, scores) == pytest.approx(best_gain(context, scores, budget, most), abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(problems(allocator="greedy"), st.data())
def test_a_higher_score_never_costs_a_node_its_expansion(problem, data):
    context, scores, budget, config, recent = problem
    edits = plan(torch.tensor(scores), context, budget, config, changes(recent))
    nodes = list(expansions(context, range(len(scores))).items())
    expanded = [(edit, entry) for edit, entry in nodes if edit in edits]
    if not expanded:
        return
    edit, entry = data.draw(st.sampled_from(expanded))
    scores[entry] = data.draw(st.floats(scores[entry], 1.0, width=16))
    assert edit in plan(torch.tensor(scores), context, budget, config, changes(recent))


# ---------------------------------------------------------------------------------------------------------
# One thing at a time


def test_expands_what_scores_high_and_collapses_what_scores_low():
    context = context_of([1, 1, 0, 0, 1], K=4, tail=2)
    #        nodes     block 2             block 3             node  tail
    scores = [0.9, 0.05, *[-0.2, 0.1] * 2, *[-0.9, -0.8] * 2, 0.3, 0.9, -0.9]
    edits = plan(torch.tensor(scores), context, 99, configure())
    assert edits == [Edit(0, 0, 1, 0), Edit(0, 3, 1, 1), Edit(0, 4, 1, 0)]


@pytest.mark.parametrize(
    ("options", "first_blocks"),
    [
        ({}, [0, 3, 4]),
        ({"most": 2}, [0, 3]),
        ({"allocator_expand_threshold": 0.3125}, [0, 3]),
        ({"allocator_expand_threshold": 0.03125}, [0, 3, 4, 1]),
        ({"allocator_collapse_threshold": 0.9}, [0, 4]),
        ({"allocator_collapse_threshold": 0.0}, [0, 3, 4, 2]),
        ({"recent": 7}, [0, 4]),
        ({"recent": 6}, [0, 3, 4]),
    ],
    ids=str,
)
def test_each_setting_changes_what_it_should(options, first_blocks):
    context = context_of([1, 1, 0, 0, 1], K=4, tail=2)
    scores = [0.875, 0.0625, *[-0.25, 0.125] * 2, *[-0.875, -0.75] * 2, 0.25, 0.875, -0.875]
    edits = plan(torch.tensor(scores), context, 99, configure(**options))
    assert [edit.first_block for edit in edits] == first_blocks


def test_a_full_budget_makes_expansions_pay():
    context = context_of([1, 0, 0], K=4)
    scores = torch.tensor([0.5, *[0.2] * 4, *[0.1] * 4])
    swap = [Edit(0, 2, 1, 1), Edit(0, 0, 1, 0)]
    assert plan(scores, context, 9, configure()) == swap  # the cheapest pays, though it was nobody's wish
    assert plan(scores, context, 11, configure()) == swap  # 2 entries of room are not enough for 3
    assert plan(scores, context, 12, configure()) == swap[1:]
    assert plan(scores, context, 9, configure(most=1)) == []  # both or neither
    assert plan(scores - 0.15, context, 9, configure()) == swap  # 0.35 + 0.05 in all
    weak = configure(allocator_expand_threshold=0.25, allocator_collapse_threshold=0.25)
    assert plan(scores, context, 9, weak) == []  # 0.5 − 0.1 is less than both thresholds


def test_no_node_pays_for_one_that_scores_lower():
    context = context_of([1, 1, 0, 0, 1], K=2)  # blocks 0 and 1 are siblings
    scores = torch.tensor([0.6, -0.9, 0.9, 0.9, 0.9, 0.9, 0.5])
    config = configure(recent=6)
    # 0.6 comes first but nothing can pay for it; 0.5 must not take its siblings
    assert plan(scores, context, 7, config) == []
    scores[6] = 0.9
    assert plan(scores, context, 7, config) == [Edit(0, 0, 2, 2), Edit(0, 4, 1, 0)]


def test_siblings_of_a_node_that_asks_for_detail_do_not_wish_to_collapse():
    context = context_of([1, 1], K=2)
    assert plan(torch.tensor([-0.9, -0.8]), context, 9, configure()) == [Edit(0, 0, 2, 2)]
    assert plan(torch.tensor([-0.9, 0.2]), context, 9, configure()) == [Edit(0, 1, 1, 0)]
    collapsed = changes([0, -1])
    assert plan(torch.tensor([-0.9, 0.2]), context, 9, configure(), collapsed) == []


def test_a_group_of_gists_is_worth_its_best():
    """Over budget, the four siblings of which one is wanted most are not the first to go."""
    context = context_of([1] * 8, K=4)
    scores = torch.tensor([0.9, -0.6, -0.6, -0.6, *[-0.1] * 4])  # means of -0.225 and -0.1
    assert plan(scores, context, 5, configure(**NO_WISHES)) == [Edit(0, 4, 4, 2)]


def test_what_was_expanded_is_not_collapsed_but_expanded_further():
    context = context_of([2, 2, 2, 2, 1], K=4)
    wanted = torch.tensor([0.9, 0.0])
    edits = plan(wanted, context, 99, configure())
    assert edits == [Edit(0, 0, 4, 1)]
    expanded = changes([1, 1, 1, 1, 0])
    after = context.apply(edits)
    assert plan(torch.tensor([-0.9, 0.9, -0.9, -0.9, 0.0]), after, 99, configure(), expanded) == [Edit(0, 1, 1, 0)]
    assert plan(torch.full((5,), -0.9), after, 99, configure(), expanded) == []
    assert plan(torch.full((5,), -0.9), after, 99, configure()) == [Edit(0, 0, 4, 2)]


def test_a_collapse_is_not_undone():
    context = context_of([1, 1, 1, 1, 0], K=4)
    collapsed = changes([-1] * 4 + [0])
    assert plan(torch.tensor([0.9] * 4 + [0.0] * 4), context, 99, configure(), collapsed) == []
    assert plan(torch.tensor([-0.9] * 4 + [0.0] * 4), context, 99, configure(), collapsed) == [Edit(0, 0, 4, 2)]


def test_an_expansion_is_not_undone():
    config, context = configure(), context_of([1, 0, 0], K=4)
    eager = torch.tensor([0.9, *[0.0] * 8])
    edits = plan(eager, context, 99, config)
    assert edits == [Edit(0, 0, 1, 0)]
    bored = torch.tensor([*[-0.9] * 4, *[0.0] * 8])
    expanded = changes([1, 0, 0])
    assert plan(bored, context.apply(edits), 99, config, expanded) == []
    assert plan(bored, context.apply(edits), 99, config) == [Edit(0, 0, 1, 1)]


def test_the_budget_is_above_rest_and_the_number_of_edits():
    context = WorkingContext.finest(1, 64, 4)
    expanded = changes([1] * 15 + [0])
    edits = plan(torch.zeros(64), context, 1, configure(most=1), expanded)
    assert edits[0] == Edit(0, 15, 1, 1)  # what was not expanded just now goes first
    after = context.apply(edits)
    assert entries(after) == [(3, 0, 64)]


def test_a_lens_without_opinions_leaves_a_context_alone_and_gives_up_the_oldest_tokens():
    context = context_of([2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0], K=4)
    zeros = torch.zeros(length(context))
    for allocator in ("greedy", "stochastic_greedy"):
        assert plan(zeros, context, 99, configure(allocator=allocator)) == []
    assert plan(zeros, context, length(context) - 4, configure()) == [Edit(0, 8, 1, 1), Edit(0, 9, 1, 1)]


# ---------------------------------------------------------------------------------------------------------
# stochastic_greedy

THREE_GAINS = [0.7, 0.4, 0.6]


def draw_plans(n, most, top_k, temperature):
    """Counts of the blocks chosen, in order, out of two expansions and (block 1) a collapse."""
    context = context_of([1, 0, 1], K=2)
    scores = torch.tensor([THREE_GAINS[0], *[-THREE_GAINS[1]] * 2, THREE_GAINS[2]])
    config = configure(
        most=most,
        allocator="stochastic_greedy",
        allocator_sample_top_k=top_k,
        allocator_sample_temperature=temperature,
    )
    generator = torch.Generator().manual_seed(0)
    plans = (plan(scores, context, 9, config, generator=generator) for _ in range(n))
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
    with pytest.raises(UserError, match=f"budget of {smallest} entries or more.*last 10 .* got {smallest - 1}"):
        plan(torch.zeros(100), context, smallest - 1, config)
    after = context.apply(plan(torch.zeros(100), context, smallest, config))
    assert length(after) == smallest


@pytest.mark.parametrize("scores", [torch.zeros(7), torch.zeros(1, 8), torch.full((8,), torch.nan)], ids=str)
def test_scores_that_do_not_fit_are_refused(scores):
    with pytest.raises(ValueError, match=r"finite scores \[8\]"):
        plan(scores, WorkingContext.finest(1, 8, 4), 8, configure())


def test_several_rows_are_refused():
    with pytest.raises(ValueError, match="one row .* got 2 rows"):
        plan(torch.zeros(8), WorkingContext.finest(2, 8, 4), 8, configure())
