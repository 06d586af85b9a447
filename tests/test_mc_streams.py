"""Trees on disk against trees in memory; sessions over them, before and after a restart; another model's gists."""

import dataclasses
import gc
import json
import os
import sqlite3
import time
import zlib
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext import streams
from megacontext.arrays import FILE, Arrays
from megacontext.session import MCSession
from megacontext.streams import create_stream, make_gists, missing_gists, open_store
from megacontext.tree import MegaContextTree, RamStore
from megacontext.working_context import WorkingContext
from nanochat.common import UserError
from nanochat.engine import Engine
from tests.helpers import SESSION_GPT, K, disturbed_networks, make_model, session_settings

V = SESSION_GPT.vocab_size
SETTINGS = session_settings(allocator_expand_threshold=0.0, allocator_collapse_threshold=0.0)
GIST_KEY = {"tokenizer": "t", "vocab_size": V, "model": "m", "networks": "n", "n_embd": 32}
GIST_KEY |= {"key_size": 80, "block_size": K}


@pytest.fixture(autouse=True)
def here(base_dir, monkeypatch):
    monkeypatch.setattr(streams, "SPILL_TOKENS", 40)
    monkeypatch.setattr("megacontext.tree.INGEST_TOKENS", 100)


@pytest.fixture(scope="module")
def model():
    return make_model(SESSION_GPT).eval()


@pytest.fixture(scope="module")
def networks():
    return disturbed_networks(SETTINGS)


def gist(children, level):
    return torch.tanh(children.float().mean(1) + 0.1 * level).roll(1, -1)


def embed(ids):
    return torch.sin(ids[..., None] * torch.linspace(0.1, 1, 32))


def ids(n, seed=0):
    return torch.randint(0, V - 9, (1, n), generator=torch.Generator().manual_seed(seed))


def tree_of(store):
    return MegaContextTree(gist, K, store, embed)


def levels_of(store):
    out = []
    while count := store.count(len(out)):
        out.append(store.get(len(out), torch.arange(count)[None]))
    return out


def new_stream(tmp_path, gist_key=GIST_KEY):
    create_stream(tmp_path / "s", gist_key)
    return open_store(tmp_path / "s", gist_key, write=True)


@given(st.lists(st.tuples(st.sampled_from(["add", "cut", "commit", "reopen"]), st.integers(0, 90)), max_size=12))
@settings(max_examples=40, deadline=None)
def test_a_tree_on_disk_equals_one_in_memory(tmp_path_factory, steps):
    tmp_path = tmp_path_factory.mktemp("streams")
    disk, ram = tree_of(new_stream(tmp_path)), tree_of(RamStore(torch.bfloat16))
    for seed, (step, n) in enumerate(steps):
        if step == "add":
            for tree in (disk, ram):
                tree.append(ids(n, seed))
        elif step == "cut":
            n = min(n, disk.num_tokens)
            for tree in (disk, ram):
                tree.truncate(n)
        else:
            disk.store.commit()
        if step == "reopen":
            disk.store.close()
            disk = tree_of(open_store(tmp_path / "s", GIST_KEY, write=True))
        assert all(map(torch.equal, levels_of(disk.store), levels_of(ram.store)))
        assert disk.num_tokens == ram.num_tokens
    disk.store.close()


def test_what_is_in_memory_stays_bounded(tmp_path):
    store = new_stream(tmp_path)
    tree = tree_of(store)
    for seed in range(30):
        tree.append(ids(100, seed))
    assert store.nbytes < 8 * 300 + 64 * 100
    assert store.tokens.rows("tokens") > 2900  # by itself


def test_gists_that_are_behind_are_made_at_the_next_opening(tmp_path, monkeypatch):
    store = new_stream(tmp_path)
    tree = tree_of(store)
    tree.append(ids(500))
    expected = levels_of(store)

    def refuse(*args):
        raise UserError("no space")

    monkeypatch.setattr(store.gists, "commit", refuse)
    with pytest.raises(UserError, match="no space"):
        tree.append(ids(500, 1))
    store.close()
    store = open_store(tmp_path / "s", GIST_KEY, write=True)
    assert store.count(0) > 500
    assert store.count(1) == 125 < store.count(0) // K
    for _ in tree_of(store).complete():
        pass
    for found, before in zip(levels_of(store), expected, strict=False):
        assert torch.equal(found[:, : before.size(1)], before)


def test_another_models_gists_are_made_beside_the_old_ones(tmp_path):
    store = new_stream(tmp_path)
    tree_of(store).append(ids(1000))
    store.commit()
    old = levels_of(store)
    newer = GIST_KEY | {"model": "m2"}

    def other(children, level):
        return gist(children, level).roll(1, -1)

    assert missing_gists(tmp_path / "s", newer) == 250
    work = make_gists(tmp_path / "s", newer, other, embed)  # while the first store is open for writing
    assert 0 < next(work) < 250
    work.close()
    reader = open_store(tmp_path / "s", newer)  # is served by the old ones meanwhile
    assert all(map(torch.equal, levels_of(reader), old))
    reader.close()
    left = missing_gists(tmp_path / "s", newer)
    for _ in make_gists(tmp_path / "s", newer, other, embed):
        pass
    assert missing_gists(tmp_path / "s", newer) == 0 < left
    store.close()
    reader = open_store(tmp_path / "s", newer)
    tree = MegaContextTree(other, K, RamStore(torch.bfloat16), embed)
    tree.append(ids(1000))
    assert all(map(torch.equal, levels_of(reader), levels_of(tree.store)))
    streams.compact(tmp_path / "s", newer)
    assert len(streams.gist_sets(tmp_path / "s")) == 1
    with pytest.raises(UserError, match="another tokenizer"):
        open_store(tmp_path / "s", GIST_KEY | {"tokenizer": "other"})
    wider = GIST_KEY | {"key_size": 64}  # which the old ones do not fit
    assert open_store(tmp_path / "s", wider).count(1) == 0


def test_damaged_and_half_made_gists_cost_no_more_than_their_making(tmp_path):
    store = new_stream(tmp_path)
    tree_of(store).append(ids(200))
    store.commit()
    expected = levels_of(store)
    store.close()
    [own] = streams.gist_sets(tmp_path / "s")
    (tmp_path / "s" / "gists-0").mkdir()  # of a kill
    (tmp_path / "s" / "gists-1").mkdir()
    (tmp_path / "s" / "gists-1" / FILE).write_bytes(b"\0" * 100)
    assert list(streams.gist_sets(tmp_path / "s")) == [own]
    for damage in (lambda: (own / FILE).unlink(), lambda: (own / FILE).write_bytes(b"x")):
        damage()
        assert streams.gist_sets(tmp_path / "s") == {}
        assert missing_gists(tmp_path / "s", GIST_KEY) == 50
        reader = open_store(tmp_path / "s", GIST_KEY)
        assert (reader.count(0), reader.count(1)) == (200, 0)
        reader.close()
        store = open_store(tmp_path / "s", GIST_KEY, write=True)
        for _ in tree_of(store).complete():
            pass
        store.commit()
        assert all(map(torch.equal, levels_of(store), expected))
        store.close()
        assert missing_gists(tmp_path / "s", GIST_KEY) == 0
    streams.compact(tmp_path / "s", GIST_KEY)
    assert {path.name for path in (tmp_path / "s").iterdir() if path.is_dir()} == {own.name}


def test_a_stream_that_is_only_read_is_not_written_to_where_no_gists_fit(tmp_path):
    store = new_stream(tmp_path)
    tree_of(store).append(ids(1000))
    store.commit()
    before = sorted((tmp_path / "s").iterdir())
    wider = GIST_KEY | {"n_embd": 64}
    reader = open_store(tmp_path / "s", wider)
    tree = MegaContextTree(gist, K, reader, lambda ids: embed(ids).repeat(1, 1, 2))
    tree.append(ids(1000, 1))
    assert reader.count(1) == 500
    assert reader.get(1, torch.arange(500)[None]).shape == (1, 500, 64)
    tree.truncate(900)
    reader.close()
    assert sorted((tmp_path / "s").iterdir()) == before


def test_compact_waits_for_who_makes_other_gists(tmp_path):
    store = new_stream(tmp_path)
    tree_of(store).append(ids(1000))
    store.commit()
    store.close()
    work = make_gists(tmp_path / "s", GIST_KEY | {"model": "m2"}, gist, embed)
    next(work)
    with pytest.raises(UserError, match="is being written to"):
        streams.compact(tmp_path / "s", GIST_KEY)
    for _ in work:
        pass
    streams.compact(tmp_path / "s", GIST_KEY)
    assert len(streams.gist_sets(tmp_path / "s")) == 1


def test_gists_of_another_width_are_not_read(tmp_path):
    store = new_stream(tmp_path)
    tree_of(store).append(ids(1000))
    store.commit()
    store.close()
    for deep, found in (({}, 1000 // K), ({"deep": 3}, 0)):
        other = open_store(tmp_path / "s", GIST_KEY | {"networks": "n2"} | deep)
        assert other.count(1) == found
        other.close()


def test_gists_are_made_without_gradients_and_their_maker_may_have_them(tmp_path):
    store, weight = new_stream(tmp_path), torch.ones(32, requires_grad=True)
    store.append(0, ids(600))
    for _ in MegaContextTree(lambda children, level: gist(children, level) * weight, K, store, embed).complete():
        assert torch.is_grad_enabled()
        assert not store.get(1, torch.arange(1)[None]).requires_grad
    store.commit()
    for _ in make_gists(tmp_path / "s", GIST_KEY | {"model": "m2"}, gist, lambda ids: embed(ids) * weight):
        assert torch.is_grad_enabled()


def test_nothing_to_ingest_leaves_the_last_ingestion_as_it_was(tmp_path, tokenizer):
    def documents():
        yield "one"
        yield "two"
        raise KeyboardInterrupt

    store = new_stream(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "INGEST_CHARS", 1)
        with pytest.raises(KeyboardInterrupt):
            list(streams.ingest(tree_of(store), documents(), tokenizer, "a", commit_seconds=0.0))
    facts = store.tokens.facts["ingested"]
    assert facts["progress"]["documents"] == 2
    [done] = streams.ingest(tree_of(store), (), tokenizer)
    assert done.tokens == facts["progress"]["tokens"]
    assert store.tokens.facts["ingested"] == facts
    list(streams.ingest(tree_of(store), ["one", "two", "three"], tokenizer, "a"))
    assert list(streams.export_documents(store.tokens, tokenizer)) == ["one", "two", "three"]
    list(streams.ingest(tree_of(store), ["four"], tokenizer))
    assert store.tokens.facts["ingested"]["source"] == ""


def test_deleting_needs_that_nobody_writes(tmp_path):
    store = new_stream(tmp_path)
    with pytest.raises(UserError, match="is being written to"):
        streams.delete_stream(tmp_path / "s")
    store.close()
    (tmp_path / "s" / FILE).write_bytes(b"")
    streams.delete_stream(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    (tmp_path / "s").mkdir()
    streams.delete_stream(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_what_killed_sessions_left_is_swept_by_the_next_process(base_dir, monkeypatch):
    root = streams.private_folder(base_dir / "scratch")
    for name, age in (("old", 100), ("half", 100), ("new", 0), ("used", 100), ("gone", 100)):
        folder = root / name
        folder.mkdir() if name == "half" else create_stream(folder, GIST_KEY)
        os.utime(folder, (time.time() - age,) * 2)
    used, delete = Arrays(root / "used", write=True), streams.delete_stream

    def two_at_once(folder):
        delete(folder)
        if folder.name == "gone":
            delete(folder)

    monkeypatch.setattr(streams, "delete_stream", two_at_once)
    store = streams.scratch_store(K)
    assert {"new", "used"} == {path.name for path in root.iterdir()} - {store.tokens.folder.name}
    used.close()
    other = streams.scratch_store(K)  # looks no more
    assert (root / "used").exists()
    store.close()
    other.close()


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_sessions_keep_gists_in_two_bytes_per_number(kind, model, networks, base_dir):
    """Wherever they are, and in whatever precision they were made."""
    session = MCSession(model, networks, dataclasses.replace(SETTINGS, mc_tree=kind))
    session.prefill(PROMPTS[0])
    assert session.tree.store.get(1, torch.arange(1)[None]).dtype == torch.bfloat16
    session.close()


def read_as_the_page_says(folder):
    """A reader written from the page on the format: name → rows, and the facts."""
    with closing(sqlite3.connect(folder / "arrays.sqlite")) as database:
        [(content, crc)] = database.execute("SELECT content, crc FROM manifest")
        chunks = database.execute("SELECT array, data, crc FROM chunks ORDER BY array, number").fetchall()
    assert zlib.crc32(content) == crc
    content, rows = json.loads(content), {}
    for name, array in content["arrays"].items():
        own = [data for owner, data, crc in chunks if owner == name and zlib.crc32(data) == crc]
        size = {"uint16": 2, "bfloat16": 2, "uint32": 4, "float32": 4}[array["dtype"]]
        assert all(len(data) == array["chunk_rows"] * array["width"] * size for data in own[:-1])
        numbers = np.frombuffer(b"".join(own), {2: "<u2", 4: "<u4"}[size]).reshape(-1, array["width"])
        if array["dtype"] == "bfloat16":
            numbers = (numbers.astype("<u4") << 16).view("<f4")
        rows[name] = numbers[: array["rows"]]
    return rows, content["facts"]


def test_the_format_is_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.setattr("megacontext.arrays.CHUNK_BYTES", 1000)
    store = new_stream(tmp_path)
    tree_of(store).append(ids(1003))
    store.commit(noted="x")
    tokens, facts = read_as_the_page_says(tmp_path / "s")
    assert facts == {"tokenizer": "t", "noted": "x"}
    [folder] = (tmp_path / "s").glob("gists-*")
    gists, facts = read_as_the_page_says(folder)
    assert facts == GIST_KEY
    for name, level in zip(["tokens", "level_1", "level_2", "level_3", "level_4"], levels_of(store), strict=True):
        assert np.array_equal((tokens | gists)[name], level[0].float().view(level.size(1), -1).numpy())


# ---------------------------------------------------------------------------------------------------------
# Sessions


def turns(model, tokenizer, session, prompts, after=lambda session: session, past=()):
    """Greedy answers to prompts that each continue the conversation; the session may be another one at each turn."""
    history, answers = [], []
    for prompt in prompts:
        history += prompt
        tokens = Engine(model, tokenizer).generate(history, max_tokens=30, temperature=0.0, session=session)
        answers.append([column[0] for column, _ in tokens])
        history += answers[-1]
        session = after(session)
    return answers, session


PROMPTS = [ids(150, 7)[0].tolist(), ids(40, 8)[0].tolist(), ids(400, 9)[0].tolist(), ids(3, 10)[0].tolist()]


@pytest.mark.parametrize(("allocator", "deep"), [("greedy", 0), ("stochastic_greedy", 0), ("greedy", 3)])
def test_greedy_tokens_are_those_of_a_tree_in_memory_before_and_after_restarts(
    model, networks, tokenizer, tmp_path, allocator, deep
):
    config = dataclasses.replace(SETTINGS, allocator=allocator, gistnet_deep=deep)
    networks = disturbed_networks(config, model) if deep else networks
    config = dataclasses.replace(config, mc_infer_exact=True)  # a restart reads all again
    expected, _ = turns(model, tokenizer, MCSession(model, networks, config), PROMPTS)

    scratch = MCSession(model, networks, dataclasses.replace(config, mc_tree="disk"))
    assert turns(model, tokenizer, scratch, PROMPTS)[0] == expected
    scratch.close()

    def restart(session):
        session.tree.store.commit()
        state = json.loads(json.dumps(session.state()))
        session.close()
        store = open_store(tmp_path / "s", GIST_KEY, write=True)
        return MCSession(model, networks, config, store=store, state=state)

    first = MCSession(model, networks, config, store=new_stream(tmp_path))
    found, last = turns(model, tokenizer, first, PROMPTS, restart)
    assert found == expected
    assert last.tree.store.tokens.rows("tokens") == last.num_tokens


def test_a_session_on_a_scratch_disk(model, networks, tokenizer, base_dir):
    def run(mc_tree):
        session = MCSession(model, networks, dataclasses.replace(SETTINGS, mc_tree=mc_tree))
        found = list(Engine(model, tokenizer).generate(PROMPTS[2], max_tokens=40, seed=4, session=session))
        return found, session

    found, session = run("disk")
    assert found == run("ram")[0]
    [folder] = (base_dir / "scratch").iterdir()
    session.close()
    assert not folder.exists()
    found, session = run("disk")
    del session
    gc.collect()
    assert not list((base_dir / "scratch").iterdir())


def test_a_conversation_has_one_folder_of_its_own_and_the_next_another(model, networks, base_dir, monkeypatch):
    made, make = [], streams.scratch_store
    monkeypatch.setattr("megacontext.session.scratch_store", lambda K: made.append(make(K)) or made[-1])
    session = MCSession(model, networks, dataclasses.replace(SETTINGS, mc_tree="disk"))
    session.prefill(PROMPTS[0])
    assert len(made) == 1
    session.prefill(PROMPTS[1])
    [folder] = (base_dir / "scratch").iterdir()
    assert folder == session.tree.store.tokens.folder
    session.close()


def test_a_stream_is_the_past_of_many_chats_and_not_changed_by_them(model, networks, tokenizer, tmp_path):
    past = ids(700, 3)
    store = new_stream(tmp_path)
    MegaContextTree(MCSession(model, networks, SETTINGS).reader.node, K, store, model.embed).append(past)
    store.commit()
    size = store.tokens.rows("tokens")

    in_memory = RamStore(torch.bfloat16)
    MegaContextTree(MCSession(model, networks, SETTINGS).reader.node, K, in_memory, model.embed).append(past)
    expected, _ = turns(model, tokenizer, MCSession(model, networks, SETTINGS, store=in_memory, past=700), PROMPTS)
    for _ in range(2):
        chat = MCSession(model, networks, SETTINGS, store=open_store(tmp_path / "s", GIST_KEY), past=700)
        answers, chat = turns(model, tokenizer, chat, PROMPTS)
        assert answers == expected
        assert chat.num_tokens > 700
        chat.prefill(PROMPTS[1])  # another conversation over the same past
        held = chat.tree.store.get(0, torch.arange(chat.num_tokens)[None])[0].tolist()
        assert held == past[0].tolist() + PROMPTS[1]
        chat.close()
    store.tokens.refresh()
    assert store.tokens.rows("tokens") == size


def test_the_first_prompt_about_a_stream_looks_where_it_asks(model, networks, tmp_path):
    """It refocuses as any prompt does, and its logits are those of the context after that refocus."""
    store = new_stream(tmp_path)
    session = MCSession(model, networks, SETTINGS, store=store)
    session.prefill(ids(700, 3)[0].tolist())
    store.commit()
    store.close()
    chat = MCSession(model, networks, SETTINGS, store=open_store(tmp_path / "s", GIST_KEY), past=700)
    assert chat.focus.records[0].refocuses == 0
    logits = chat.prefill(PROMPTS[0])
    assert chat.focus.records[0].refocuses == 1
    unfocused = WorkingContext.initial(chat.num_tokens, K, chat.room, chat.recent)
    assert not torch.equal(chat.context.lod_map, unfocused.lod_map)
    x, positions = chat.tree.materialize(chat.context), chat.reader.positions(chat.context)
    expected = model(inputs_embeds=x, cos_sin=positions)[:, -1]
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)


def test_a_state_that_is_none_is_refused(model, networks, tmp_path):
    store = new_stream(tmp_path)
    session = MCSession(model, networks, SETTINGS, store=store)
    session.prefill(PROMPTS[0])
    good = session.state()
    for bad in ({}, {**good, "lod": [[5, 38]]}, {**good, "lod": "x"}, {**good, "record": {"changes": [[1]]}}):
        with pytest.raises(ValueError, match="expected"):
            session.focus.resume(bad, session.context)
