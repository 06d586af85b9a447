"""The focus view in a real browser: with a tiny model behind it, and with focus events of any size fed to it."""

import os
import random
import re
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import expect

from megacontext.session import MCSession
from nanochat.serving.worker_pool import ServedModel
from tests.helpers import until
from tests.helpers_browser import ask, finished
from tests.helpers_server import CONTEXT, K, serving_mc

SHORT = "localStorage['nanochat.settings'] ??= '{\"max_tokens\": 40}';"
CELLS = "[...document.querySelectorAll('#focus-picture rect[x]')].map((rect) => rect.getAttribute('class'))"
PHONE = {"viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def mc(tokenizer):
    with serving_mc(tokenizer, model=ServedModel("sft", "d4", 600)) as running:
        yield running


@pytest.fixture
def visit(mc, open_page):
    return partial(open_page, mc.url, script=SHORT)


@pytest.fixture
def shot(tmp_path):
    """shot(page, name): a picture, kept in MC_UI_SHOTS if that is given."""
    folder = Path(os.environ.get("MC_UI_SHOTS", tmp_path))
    return lambda page, name: page.screenshot(path=folder / f"{name}.png")


def cells_of(state, width):
    """Level of each cell, as a reader would work it out: at least 4 pixels each, the finest level of its blocks."""
    lods = [lod for lod, blocks in state["lod"] for _ in range(blocks)]
    group = next(g for g in range(1, len(lods) + 1) if -(-len(lods) // g) <= width // 4)
    return [f"lod-{min(3, *lods[i : i + group])}" for i in range(0, len(lods), group)], group


def made_up(num_tokens, block_size, budget, recent, seed=0):
    """A focus event as a session of so many tokens would tell it: old blocks coarse, a few of them opened."""
    rng = random.Random(seed)
    blocks = -(-num_tokens // block_size)
    lods, level, end = [0] * blocks, 0, blocks - recent
    while (excess := length(lods, num_tokens, block_size) - (budget - 80)) > 0:
        level += 1
        size = block_size ** (level - 1)  # blocks of a node, each of which saves block_size - 1 entries
        nodes = min(end // size, -(-excess // (block_size - 1)))
        lods[: nodes * size] = [level] * (nodes * size)
    expanded, collapsed = [], []
    for _ in range(2 if level else 0):
        first = rng.randrange(max(1, end // block_size - 1)) * block_size
        if lods[first] == 2:
            lods[first : first + block_size] = [1] * block_size
            expanded.append([first, block_size, 1])
        elif lods[first] == 1:
            lods[first] = 0
            expanded.append([first, 1, 0])
    if level:
        collapsed = [[max(0, end - 2 * block_size) // block_size * block_size, block_size, lods[end - 2]]]
    runs, scores = [], []
    for block, lod in enumerate(lods):
        if runs and runs[-1][0] == lod:
            runs[-1][1] += 1
        else:
            runs.append([lod, 1])
            scores.append([block, round(rng.uniform(-1, 1), 2)])
    counts = {}
    for lod, n in runs:
        counts[lod] = counts.get(lod, 0) + (n * block_size if lod == 0 else n // block_size ** (lod - 1))
    if num_tokens % block_size:
        counts[0] -= block_size - num_tokens % block_size
    return {
        "num_tokens": num_tokens,
        "block_size": block_size,
        "budget": budget,
        "entries": min(budget, length(lods, num_tokens, block_size)),
        "lod": runs,
        "lod_counts": dict(sorted(counts.items())),
        "scores": scores,
        "expanded": expanded,
        "collapsed": collapsed,
        "refocuses": 9,
        "edits": 12,
        "swap_rate": 0.031,
        "residency": 14.0,
    }


def length(lods, num_tokens, block_size):
    tail = num_tokens % block_size
    whole = sum(block_size if lod == 0 else block_size ** (1 - lod) for lod in lods)
    return round(whole - (block_size - tail if tail else 0))


def opened(page, what):
    """A value of the conversation that is open."""
    return page.evaluate(f"import('./ui/page.js').then(({{ state }}) => state.current.{what})")


def feed(page, state):
    page.evaluate(
        """async (focus) => {
            const [{ state }, { showFocus }] = await Promise.all([import("./ui/page.js"), import("./ui/focus.js")]);
            state.current.focus = focus;
            showFocus(state.current);
        }""",
        state,
    )


def words(page, turn):
    ask(page, f"In turn {turn} the secret number is {turn * 7919}. " + "Tell me more about the point. " * 3)
    finished(page)


def width_of(page):
    return page.evaluate("document.getElementById('focus-picture').clientWidth")


def test_ten_times_the_context(visit, mc, shot):
    """The page stays responsive and the view moves; what it shows is what the last event says; hovering shows text."""
    page = visit()
    expect(page.locator("#focus")).to_be_hidden()
    page.evaluate(
        """() => {
            window.gap = 0; window.seen = new Set(); let last = performance.now();
            setInterval(() => { const now = performance.now(); gap = Math.max(gap, now - last); last = now; }, 20);
            new MutationObserver(() => seen.add(document.getElementById('focus-picture').innerHTML))
                .observe(document.getElementById('focus-picture'), {subtree: true, childList: true, attributes: true});
        }"""
    )
    for turn in range(12):
        words(page, turn)
        if turn == 0:
            shot(page, "real-short")
    state = opened(page, "focus")
    assert state["num_tokens"] > 10 * CONTEXT
    assert page.evaluate("gap") < 2000
    assert page.evaluate("seen.size") > 24, "at least twice an answer"
    expected, _ = cells_of(state, width_of(page))
    assert page.evaluate(CELLS) == expected
    colours = page.evaluate(
        "[...document.querySelectorAll('#focus-picture rect[x]')].map((rect) => getComputedStyle(rect).fill)"
    )
    assert len(set(zip(expected, colours, strict=True))) == len(set(expected)) == len(set(colours))
    expect(page.locator("#focus-tokens")).to_have_text(f"{state['num_tokens']:,}")
    expect(page.locator("#focus-entries")).to_have_text(str(state["entries"]))
    legend = page.locator("#focus-legend").inner_text()
    assert re.findall(r"LOD (\d) ([\d,]+)", legend) == [(k, str(v)) for k, v in state["lod_counts"].items()]
    page.locator("#focus-picture").hover(position={"x": 2, "y": 30})
    card = page.locator("#focus-card")
    expect(card).to_be_visible()
    expect(card).to_contain_text(re.compile(r"Block 0|Blocks 0 –"))
    expect(card).to_contain_text("LensNet")
    expect(card.locator("blockquote")).to_contain_text("You: In")
    shot(page, "real-long")
    page.mouse.move(500, 600)
    expect(card).to_be_hidden()
    page.reload()  # the server still knows where the focus was
    expect(page.locator("#focus-tokens")).to_have_text(f"{state['num_tokens']:,}")
    assert page.evaluate(CELLS) == expected
    page.get_by_role("button", name="New chat").first.click()
    expect(page.locator("#focus")).to_be_hidden()
    page.go_back()
    expect(page.locator("#focus")).to_be_visible()


def test_two_chats_have_a_view_each(visit, mc):
    page = visit()
    names = set()
    for text in ("First of all", "Second " * 20):
        page.get_by_role("button", name="New chat").first.click()
        ask(page, text)
        finished(page)
        names.add(opened(page, "conversation"))
        expect(page.locator("#focus-tokens")).to_have_text(f"{opened(page, 'focus.num_tokens'):,}")
    assert len(names) == 2
    assert all(re.fullmatch(r"[0-9a-f]{32}", name) for name in names)
    long = page.locator("#focus-tokens").inner_text()
    page.locator("#history .open", has_text="First").click()
    expect(page.locator("#focus-tokens")).not_to_have_text(long)


SIZES = {
    "100-tokens": (100, 32, 512, 1),
    "3000-tokens": (3_010, 32, 512, 2),
    "million-tokens": (1_000_000, 32, 512, 2),
    "million-tokens-of-small-blocks": (1_000_000, 4, 512, 8),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_any_size(visit, shot, size, look):
    """Few cells or thousands of blocks a cell: it fits its width, in little time, and says what the event says."""
    page = visit(**({"color_scheme": "dark"} if look == "dark" else PHONE if look == "phone" else {}))
    ask(page, "Where are you looking?")
    finished(page)
    state = made_up(*SIZES[size])
    page.evaluate("window.started = performance.now()")
    feed(page, state)
    assert page.evaluate("performance.now() - started") < 1500
    width = width_of(page)
    expected, group = cells_of(state, width)
    assert page.evaluate(CELLS) == expected
    edges = page.evaluate(
        """[...document.querySelectorAll('#focus-picture rect[x]')].map((rect) => rect.getBoundingClientRect())
        .map((box) => [box.left, box.right])"""
    )
    left, right = page.evaluate(
        "(({left, right}) => [left, right])(document.getElementById('focus-picture').getBoundingClientRect())"
    )
    assert left - 1 <= edges[0][0]
    assert edges[-1][1] <= right + 1
    assert all(a[1] <= b[0] + 0.5 for a, b in pairwise(edges))
    assert all(b - a >= 2.9 for a, b in edges), "wide enough to be seen"
    assert page.locator("#focus-picture .mark.expanded").count() == len(state["expanded"])
    assert page.locator("#focus-picture .mark.collapsed").count() == len(state["collapsed"])
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    shot(page, f"{size}-{look}")
    if state["expanded"]:
        x = (state["expanded"][0][0] // group + 0.5) * (edges[1][0] - edges[0][0])
        picture = page.locator("#focus-picture")
        (picture.tap if look == "phone" else picture.hover)(position={"x": x, "y": 36})
        expect(page.locator("#focus-card h3")).to_be_visible()
        page.wait_for_timeout(300)
        shot(page, f"{size}-{look}-hover")


def test_what_is_read_can_be_pointed_at_too(visit):
    """Below, every entry of the working context has its place: pointing at it finds the block that it stands for."""
    page = visit()
    ask(page, "Hello")
    finished(page)
    state = {
        **made_up(3_010, 32, 512, 2),
        "lod": [[1, 64], [0, 1], [1, 20], [0, 10]],
        "entries": 64 + 32 + 20 + 10 * 32,
    }
    feed(page, {**state, "num_tokens": 95 * 32, "scores": [[0, -0.5], [64, 0.75], [65, 0.0]]})
    picture, each = page.locator("#focus-picture"), width_of(page) / 512
    for entry, block in [(0.5, 0), (63.5, 63), (64.5, 64), (95.5, 64), (96.5, 65), (116.5, 85), (435.5, 94)]:
        picture.hover(position={"x": entry * each, "y": 70})
        expect(page.locator("#focus-card h3")).to_have_text(f"Block {block}")
    picture.hover(position={"x": 450 * each, "y": 70})
    expect(page.locator("#focus-card")).to_be_hidden()
    picture.hover(position={"x": 64.5 * each, "y": 70})
    expect(page.locator("#focus-card")).to_contain_text("tokens 2,048 – 2,079 · LOD 0, every token")
    expect(page.locator("#focus-card")).to_contain_text("LensNet +0.75")
    picture.hover(position={"x": 3 * each, "y": 70})
    expect(page.locator("#focus-card")).to_contain_text("LOD 1, gists of 32 tokens")
    expect(page.locator("#focus-card")).to_contain_text("LensNet −0.50")


def test_by_keyboard_and_in_words(visit, shot, monkeypatch):
    page = visit()
    words(page, 1)
    words(page, 2)
    state = opened(page, "focus")
    summary = page.get_by_role("img", name="tokens in the conversation the model reads")
    expect(summary).to_have_count(1)
    name = page.locator("#focus-summary").inner_text()
    assert f"Of {state['num_tokens']} tokens" in name
    assert f"{state['entries']} of at most {state['budget']} entries" in name
    cursor = page.get_by_role("slider", name="A part of the conversation")
    cursor.focus()
    cursor.press("Home")
    expect(page.locator("#focus-card h3")).to_have_text("Block 0")
    expect(page.locator("#focus-card blockquote")).to_have_text("You: In")
    cursor.press("ArrowRight")
    expect(page.locator("#focus-card h3")).to_have_text("Block 1")
    assert re.match(rf"Block 1, tokens {K} – {2 * K - 1}, LOD \d.*, LensNet", cursor.get_attribute("aria-valuetext"))
    shot(page, "keyboard")
    page.evaluate("localStorage.setItem('nanochat.settings', '{\"max_tokens\": 4000}')")
    enter = MCSession.enter  # so small a model would be at its end before a busy browser has taken the keys
    monkeypatch.setattr(MCSession, "enter", lambda session, ids: [time.sleep(0.01), enter(session, ids)][1])
    page.locator("#input").fill("Go on for a long while")
    page.locator("#input").press("Enter")
    expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
    cursor.focus()
    cursor.press("Escape")
    expect(page.locator("#focus-card")).to_be_hidden()
    expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
    page.keyboard.press("Tab")
    page.locator("#scroller").press("Escape")
    finished(page)


@pytest.fixture
def keeping(tokenizer, tmp_path):
    with serving_mc(tokenizer, keep_in=tmp_path) as running:
        yield running


def test_a_chat_that_is_deleted_is_gone_from_the_disk(keeping, open_page, tmp_path):
    """The page says that the server keeps it; only its own folder goes."""
    page = open_page(keeping.url, script=SHORT)
    expect(page.locator("#kept")).to_contain_text("also on the server")
    before, folders = set(), lambda: set(tmp_path.iterdir())
    for text in ("The first chat", "The second chat"):
        page.get_by_role("button", name="New chat").first.click()
        ask(page, text)
        finished(page)
        until(keeping.pool.is_idle)
        [own] = folders() - before
        before.add(own)
    page.get_by_role("button", name="More for “The second chat”").click()
    page.get_by_role("menuitem", name="Delete").click()
    until(lambda: folders() == before - {own})
    expect(page.locator("#history .open")).to_have_text(["The first chat"])
    page.get_by_role("button", name="Undo").click()
    ask(page, "And on")
    finished(page)
    until(lambda: folders() == before)  # it is read again and kept again


def test_it_folds_away(visit):
    page = visit()
    ask(page, "Hello")
    finished(page)
    page.get_by_role("button", name="Hide the focus").click()
    expect(page.locator("#focus-picture")).to_be_hidden()
    expect(page.locator("#focus-tokens")).to_be_visible()
    page.reload()
    button = page.get_by_role("button", name="Show the focus")
    expect(button).to_have_attribute("aria-expanded", "false")
    button.click()
    expect(page.locator("#focus-picture")).to_be_visible()
    assert page.evaluate(CELLS)


def test_text_that_is_no_longer_at_hand(visit, mc):
    """After eviction the picture stays, the card has no text, and the next answer brings all of it back."""
    page = visit()
    words(page, 1)
    mc.sessions[0].held.clear()
    page.locator("#focus-picture").hover(position={"x": 2, "y": 30})
    expect(page.locator("#focus-card")).to_contain_text("LensNet")
    page.wait_for_timeout(400)
    expect(page.locator("#focus-card blockquote")).to_be_empty()
    page.mouse.move(500, 600)
    words(page, 2)
    page.locator("#focus-picture").hover(position={"x": 2, "y": 30})
    expect(page.locator("#focus-card blockquote")).to_contain_text("You: In")
