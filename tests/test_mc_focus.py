"""A refocus of several rounds, and of several in a row: what is wanted opens, and nothing is undone at once."""

import json

import pytest
import torch

from megacontext.config import MCConfig
from megacontext.focus_allocator import Focus, focus_state
from megacontext.working_context import Edit, WorkingContext

K, BUDGET = 4, 60


def of_level_2():
    """64 tokens as nodes of level 2, and 16 tokens more."""
    return WorkingContext.from_map(torch.tensor([[2] * 16 + [0] * 4], dtype=torch.int8), 80, K)


def wants(*rows):
    """Scores of a lens that, in each row, wants these blocks and is bored by all others."""
    scores = torch.full((len(rows), 20), -0.5)
    for row, blocks in enumerate(rows):
        scores[row, list(blocks)] = 0.9
    return scores


def focus(rows=1, **options):
    return Focus(MCConfig(block_size=K, allocator_recent_tokens=16, **options).resolve(80), rows)


@pytest.mark.parametrize("block", [0, 5, 15])
def test_a_block_inside_a_node_of_level_2_opens_at_once(block):
    context = focus().refocus(of_level_2(), wants([block]), BUDGET)
    assert context.lod_map[0, block] == 0
    assert (context.lod_map[0, :16] == 0).sum() == 1


def test_a_refocus_in_which_nothing_is_wanted_leaves_the_same_object():
    here, context = focus(), of_level_2()
    assert here.refocus(context, wants([]), BUDGET) is context
    assert here.refocus(context, torch.zeros(1, 0), BUDGET) is context
    assert here.records[0].refocuses == 2
    assert here.records[0].changes == ()


def test_rows_have_a_focus_each():
    context = focus(rows=2).refocus(WorkingContext(of_level_2().tiles.repeat(2, 1), 80, K), wants([5], [9]), BUDGET)
    for row, block in ((0, 5), (1, 9)):
        one = focus().refocus(of_level_2(), wants([block]), BUDGET)
        assert torch.equal(context.select([row]).lod_map, one.lod_map)


def test_rounds_of_one_refocus_add_up():
    """Of one node a round opens one block; the next round goes on from there, and undoes nothing of the first."""
    here = focus()
    context = WorkingContext.from_map(torch.tensor([[3] * 16 + [0] * 4], dtype=torch.int8), 80, K)
    for i, (opened, edits) in enumerate(((1, 3), (3, 3 + 1 + 2), (3, 6))):
        context = here.refocus(context, wants([0, 1, 5]), BUDGET, again=i > 0)
        record = here.records[0]
        assert (context.lod_map[0, :16] == 0).sum() == opened
        assert record.edits == len(record.changes) == edits
        assert (record.refocuses, record.exposed, record.entries) == (1, 16, 17)
    here.refocus(context, wants([12]), BUDGET)
    record = here.records[0]
    assert (record.refocuses, record.edits, len(record.changes)) == (2, 8, 2)


def test_what_is_known_of_a_refocus():
    here, before = focus(), of_level_2()
    context = here.refocus(before, wants([5]), BUDGET)
    record = here.records[0]
    assert record.scores.tolist() == pytest.approx([-0.5, 0.9, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5])
    assert torch.equal(record.scored.lod_map, before.lod_map)
    summary = record.summary()
    assert (summary["expansions"], summary["collapses"], summary["refocuses"]) == (2, 0, 1)
    assert summary["score_max"] == pytest.approx(0.9)
    assert summary["score_mean"] == pytest.approx((-0.5 * 16 + 0.9 * 4) / 20)
    state = focus_state(context, record, BUDGET)
    assert state["expanded"] == [[4, 4, 1], [5, 1, 0]]
    assert state["scores"] == [[0, -0.5], [4, 0.9], [8, -0.5]]
    json.dumps(state)


def test_nothing_is_undone_in_the_next_refocus():
    """A lens that changes its mind each time: what was expanded is not collapsed in the refocus after, nor expanded."""
    here, context = focus(allocator_max_replacements=2), of_level_2()
    done, both = {}, set()
    for i in range(12):
        now = {}
        for again in (False, True):
            context = here.refocus(context, wants([i % 3, 5 + 3 * (i % 4)]), 40, again)
            for change in here.records[0].changes:
                for block in range(change.first_block, change.first_block + change.num_blocks):
                    assert now.setdefault(block, change.expands) == change.expands
                    assert done.get(block, change.expands) == change.expands
                    both.add(change.expands)
            context.check()
            assert context.lengths()[0] <= 40
        done = now
    assert both == {True, False}


def test_a_state_is_resumed():
    here, context = focus(allocator="stochastic_greedy"), of_level_2()
    for i in range(3):
        context = here.refocus(context, wants([i, 5, 9, 14]), 40)
    state = json.loads(json.dumps(here.state(context)))
    other = focus(allocator="stochastic_greedy")
    assert torch.equal(other.resume(state, context).lod_map, context.lod_map)
    one, two = (f.refocus(context, wants([3, 7, 8, 12]), 40) for f in (here, other))
    assert torch.equal(one.lod_map, two.lod_map)
    assert here.records[0].changes == other.records[0].changes
    with pytest.raises(ValueError, match="state of a focus"):
        other.resume({"num_tokens": 3}, context)


def test_edits_that_are_forced_come_first():
    """Above the budget the least wanted collapses, and still what is wanted opens."""
    context = of_level_2().apply([Edit(0, 0, 4, 1), Edit(0, 0, 4, 0)])
    here = focus(allocator_max_replacements=5)
    after = here.refocus(context, wants([5]), 38)
    assert after.lengths()[0] <= 38
    assert after.lod_map[0, 5] == 0
