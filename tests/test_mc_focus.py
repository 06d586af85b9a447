"""A refocus of several rounds, and of several in a row: what is wanted opens, and nothing is undone at once."""

import pytest
import torch

from megacontext.config import MCConfig
from megacontext.focus import Focus
from megacontext.working_context import WorkingContext

K, BUDGET = 4, 60


def of_level_2():
    """64 tokens as nodes of level 2, and 16 tokens more."""
    return WorkingContext.from_map(torch.tensor([[2] * 16 + [0] * 4], dtype=torch.int8), 80, K)


def wants(*blocks):
    """A lens that wants the entries in which these blocks lie and is bored by all others."""

    def lens(context):
        entries = context.entries
        scores = torch.full(entries.start.shape, -0.5)
        for block in blocks:
            scores[(entries.start <= block * K) & (block * K < entries.start + entries.span)] = 0.9
        return scores

    return lens


def focus(rounds=1, **options):
    options = {"allocator_recent_tokens": 16, "mc_infer_allocator_iterations": rounds, **options}
    return Focus(MCConfig(block_size=K, **options).resolve(80), rows=1)


@pytest.mark.parametrize(("rounds", "level"), [(1, 1), (2, 0), (4, 0), (8, 0)])
def test_rounds_open_a_block_inside_a_node_of_level_2(rounds, level):
    context = focus(rounds).refocus(of_level_2(), wants(5), BUDGET)
    assert context.lod_map[0, 5] == level


def test_refocuses_go_on_where_the_last_one_ended():
    here, context, levels = focus(), of_level_2(), []
    for _ in range(3):
        context = here.refocus(context, wants(5), BUDGET)
        levels.append(int(context.lod_map[0, 5]))
    assert levels == [1, 0, 0]


def test_nothing_is_undone_in_the_next_refocus():
    """A lens that changes its mind each time: what was expanded is not collapsed in the refocus after, nor expanded."""
    here, context = focus(rounds=2, allocator_max_replacements=2), of_level_2()
    done = {}
    for i in range(12):
        context = here.refocus(context, wants(i % 3, 5 + 3 * (i % 4)), BUDGET)
        now = {}
        for change in here.records[0].changes:
            for block in range(change.first_block, change.first_block + change.num_blocks):
                direction = change.new_lod < change.old_lod
                assert now.get(block, direction) == direction
                assert done.get(block, direction) == direction
                now[block] = direction
        done = now
        context.check()
