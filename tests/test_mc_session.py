"""MCSession against plain decoding and against working contexts read from scratch; its budget, past and memory."""

import dataclasses
import itertools
import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.lensnet import KEY
from megacontext.networks import MCNetworks
from megacontext.session import READ_AGAIN, MCSession
from megacontext.telemetry.events import tell_session
from megacontext.tree import RamStore, build_table
from megacontext.working_context import WorkingContext, smallest_length
from nanochat.common import UserError
from nanochat.decode import Decoder
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig, norm, positioned
from nanochat.kv_cache import CacheSession
from tests.helpers import SESSION_GPT, K, Told, disturbed_networks, make_model, session_settings
from tests.reference_mc import common_prefix

V = SESSION_GPT.vocab_size
CLOSE = {"atol": 5e-5, "rtol": 1e-4}
SETTINGS = session_settings(mc_infer_allocator_max_replacements=3, mc_infer_exact=True, mc_aux_dtype="fp32")
GISTNET = disturbed_networks(SETTINGS).gistnet


@pytest.fixture(scope="module")
def model():
    return make_model(SESSION_GPT).eval()


@pytest.fixture(autouse=True)
def exact_gists(monkeypatch):
    """As in the reference: rounded to bf16, two sums of another order can be a part in 256 apart."""
    monkeypatch.setattr("megacontext.session.GIST_DTYPE", torch.float32)


class Lens:
    """A LensNet for which blocks and tokens have no content: want(n) is what is wanted of n blocks."""

    def __init__(self, want):
        self.want = want

    def keys(self, children, before):
        return torch.zeros(len(children), KEY)

    def asking(self, states, embeds, at):
        return states

    def wanted(self, asking, keys, beside=0.0):
        return self.want(keys.size(1))[None]


def random_lens(seed=0):
    """A lens that wants something else each time, and in every row."""
    generator = torch.Generator().manual_seed(seed)
    return Lens(lambda n: 3 * torch.rand(n, generator=generator) - 2)


NO_WISHES = Lens(torch.zeros)
CLOCK = Lens(lambda n: torch.sin(torch.arange(n) * 12.9898 + n * 7.3))  # as if random, but always the same


class StandIns:
    """Functions in the places of the two networks."""

    def __init__(self, gistnet, lensnet):
        self.gistnet, self.lensnet = gistnet, lensnet


def session_of(model, lens=None, seed=0, on_update=None, **options):
    networks = StandIns(GISTNET, lens or random_lens())
    config = dataclasses.replace(SETTINGS, **options)
    return MCSession(model, networks, config, seed=seed, on_update=on_update)


def ids(n, seed=0):
    return torch.randint(0, V - 9, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def held(session):
    return session.tree.store.get(0, torch.arange(session.num_tokens)[None])[0]


@torch.inference_mode()
def from_scratch(model, session):
    """Logits after a session's working context: all of it put through the model, which has no cache."""
    context = session._context_now()
    gistnet = session.reader.networks.gistnet
    table = build_table(gistnet, model.embed(held(session)[None]), gistnet.block_size)
    cos_sin, bias = session.reader.positions(context), session.reader.key_bias(context.entries)
    return model(inputs_embeds=table.materialize(context), cos_sin=cos_sin, key_bias=bias)[0, -1]


def assert_fresh(model, session, logits):
    """That logits are what a session would give that had just read the same working contexts."""
    torch.testing.assert_close(logits[0], from_scratch(model, session), **CLOSE)


def assert_in_budget(session):
    context = session._context_now()
    context.check()
    assert context.num_tokens == session.num_tokens
    assert int(context.lengths().max()) <= session.budget
    recent = context.old_blocks(session.recent)
    assert not context.lod_map[:, recent:].any()
    assert session.cache.pos == int(context.lengths())


# ---------------------------------------------------------------------------------------------------------
# Without focus it is plain decoding


@pytest.mark.parametrize("graph", [False, True])
def test_logits_equal_plain_ones_until_the_budget_is_reached(model, graph):
    session = session_of(model, NO_WISHES, allocator_soft_max=200)
    plain = CacheSession(Decoder(model), 1, 64)
    session.decoder.graph = graph
    same = torch.equal if not graph else lambda a, b: torch.allclose(a, b, **CLOSE)
    assert same(session.prefill(ids(30)), plain.prefill(ids(30)))
    for i in range(100):
        column = torch.tensor(ids(1, seed=i))
        assert same(session.step(column), plain.step(column)), i
    assert session.focus_state()["lod"] == [[0, -(-130 // K)]]
    assert session.focus_state()["refocuses"] == 100 // 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_equal_plain_ones_with_tools(model, tokenizer, temperature):
    engine = Engine(model, tokenizer)
    prompt = [*ids(9), tokenizer.encode_special("<|python_start|>"), *tokenizer.encode("12*3")]

    def run(session):
        return list(engine.generate(prompt, max_tokens=90, temperature=temperature, seed=5, session=session))

    expected = run(None)
    session = session_of(model, NO_WISHES, allocator_soft_max=200)
    assert run(session) == expected
    assert run(session) == expected  # its prompt is known already


def test_several_samples_have_a_session_each_and_equal_plain_ones(model, tokenizer):
    engine, sessions = Engine(model, tokenizer), []

    def make_session(seed):
        sessions.append(session_of(model, NO_WISHES, seed, allocator_soft_max=200))
        return sessions[-1]

    expected = engine.generate_batch(ids(9), 4, max_tokens=90, seed=5)
    assert engine.generate_batch(ids(9), 4, make_session=make_session, max_tokens=90, seed=5) == expected
    assert len(sessions) == len({session.seed for session in sessions}) == 4


class Forcing:
    """A session that makes the model close its tool call: what sampling alone would hardly do."""

    def __init__(self, session, token, at):
        self.session, self.token, self.at = session, token, at

    def __getattr__(self, name):
        return getattr(self.session, name)

    def prefill(self, tokens):
        self.count = 0
        return self._forced(self.session.prefill(tokens))

    def read(self, column):
        self.count += 1
        return self._forced(self.session.read(column))

    def _forced(self, logits):
        if self.count in self.at:
            logits = logits.clone()
            logits[:, self.at[self.count]] = 1000.0
        return logits


def test_forced_tool_answers_equal_plain_ones(model, tokenizer):
    engine, special = Engine(model, tokenizer), tokenizer.encode_special
    call = [special("<|python_start|>"), *tokenizer.encode("12*3"), special("<|python_end|>")]
    at = dict(enumerate(call, start=2))
    mc = Forcing(session_of(model, NO_WISHES, allocator_soft_max=200), None, at)
    plain = Forcing(CacheSession(Decoder(model), 1, 64), None, at)
    runs = [list(engine.generate(ids(9), 1, 40, 1.0, session=session)) for session in (mc, plain)]
    assert runs[0] == runs[1]
    assert any(not all(mask) for _, mask in runs[0])


# ---------------------------------------------------------------------------------------------------------
# Whatever the focus did, the cache holds what the working context says


@pytest.mark.parametrize("policy", ["greedy", "stochastic_greedy"])
@pytest.mark.parametrize(("positional", "limit"), [("gaussian", 0), ("simple", 2), ("rank", 2), ("near", 0)])
def test_cache_equals_reading_from_scratch(model, positional, limit, policy):
    options = {"allocator": policy, "mc_positional": positional, "mc_gist_limit": limit, "allocator_sample_top_k": 3}
    session = session_of(model, **options)
    assert_fresh(model, session, session.prefill(ids(150)))
    levels = set()
    for i in range(60):
        logits = session.step(torch.tensor(ids(1, seed=i)))
        assert_in_budget(session)
        if i % 6 in (0, 4, 5):  # a refocus, and before and after one
            assert_fresh(model, session, logits)
        levels |= set(session._context_now().lod_map.flatten().tolist())
    assert levels >= {0, 1, 2}


def test_only_what_changed_is_read_again(model):
    reads = []
    session = session_of(model, on_update=lambda session, entries_read, watch: reads.append(entries_read))
    session.prefill(ids(150))
    for i in range(120):
        before = session._context_now()
        reads.clear()
        session.step(torch.tensor([i]))
        for entries_read in filter(None, reads):
            same = common_prefix(_names(before), _names(session._context_now()))
            assert entries_read == session.cache.pos - same


class Spliced:
    """
    The slow reference of a spliced cache: of each entry (level, first token) the keys and values of each layer, as they
    were when it was last read, with all that stood before it then; the keys without positions, which may change. How
    many positions it takes may not: then it is read again.
    """

    def __init__(self, model, session):
        self.model, self.session, self.entries, self.taken = model, session, {}, {}
        self.adopted, self.listened = session._adopt, session.demand.listen
        session._adopt, session.demand.listen = self.adopt, self.listen

    def adopt(self, context, again=0, fresh=False):
        assert not (fresh and self.entries)
        names, taken = _names(context), self.session.reader.placed(context.entries).span[0].tolist()
        taken, before = dict(zip(names, taken, strict=True)), self.taken
        gone = {name for name in self.entries if taken.get(name) != before.get(name, 1)}
        newest = context.num_tokens - again if gone else context.num_tokens
        kept = [name for name in names if name in self.entries.keys() - gone and name[1] < newest]
        self.entries = {name: self.entries[name] for name in kept}
        self.taken = taken
        self.adopted(context, again, fresh)

    @torch.inference_mode()
    def listen(self, states, num_tokens):
        """Called when all entries have been read: those that are not known are read here, too."""
        context, model = self.session._context_now(), self.model
        table = build_table(GISTNET, model.embed(held(self.session)[None]), K)
        x, angles, names = table.materialize(context)[0], self.session.reader.positions(context), _names(context)
        new = [i for i, name in enumerate(names) if name not in self.entries]
        h = dict(zip(new, x[new], strict=True))
        for name in (names[i] for i in new):
            self.entries[name] = []
        for layer, block in enumerate(model.transformer.h):
            attn, queries = block.attn, {}
            for i in new:
                row, at = norm(h[i])[None, None], [t[:, i : i + 1] for t in angles]
                queries[i] = positioned(attn.c_q(row).view(1, 1, attn.n_head, -1), *at)[0, 0]
                key = attn.c_k(row).view(1, 1, attn.n_kv_head, -1)
                self.entries[names[i]].append((key, attn.c_v(row).view(attn.n_kv_head, -1)))
            for i in new:
                pairs = [self.entries[name][layer] for name in names[: i + 1]]
                keys, values = zip(*pairs, strict=True)
                keys = [positioned(key, *(t[:, j : j + 1] for t in angles))[0, 0] for j, key in enumerate(keys)]
                keys, values = (torch.stack(part, 1).repeat_interleave(2, 0) for part in (keys, values))
                weights = (keys @ queries[i][..., None] / attn.head_dim**0.5).softmax(1)
                h[i] = h[i] + attn.c_proj((weights * values).sum(1).flatten())
                h[i] = h[i] + block.mlp(norm(h[i]))
        self.logits, self.read = 15 * torch.tanh(model.lm_head(norm(h[len(names) - 1]))[:V] / 15), len(new)
        self.listened(states, num_tokens)


def _names(context):
    return list(zip(*(t[0].tolist() for t in context.entries[:2]), strict=True))


@pytest.mark.parametrize("positional", ["rank", "near", "gaussian", "simple"])
def test_a_refocus_is_spliced_into_the_cache(model, positional):
    """What comes in and the newest tokens are read, and see what stands before them; all others stay as they were."""
    session = session_of(model, mc_infer_exact=False, mc_positional=positional)
    reference, spliced = Spliced(model, session), 0
    torch.testing.assert_close(session.prefill(ids(90))[0], reference.logits, **CLOSE)
    for i in range(60):
        logits = session.step(torch.tensor([i]))
        torch.testing.assert_close(logits[0], reference.logits, **CLOSE)
        assert_in_budget(session)
        spliced += 1 < reference.read < session.cache.pos // 2 + READ_AGAIN
    assert spliced > 5
    session._adopt, session.demand.listen = reference.adopted, reference.listened
    session.demand.lensnet = NO_WISHES  # then a prompt only reads what was read before an edit
    assert_fresh(model, session, session.prefill(held(session).tolist() + ids(5)))


def test_a_prompt_is_read_anew_by_a_model_that_did_not_learn_with_gists(model):
    """Once focus has found what it asks for; else what stands between is read before that."""
    session, other = (session_of(model, mc_infer_exact=False, mc_gist_limit=limit) for limit in (2, 0))
    for prompt in (ids(150), ids(150) + ids(90, seed=1)):
        before = session.focus.records[0].edits
        assert_fresh(model, session, session.prefill(prompt))
        assert session.focus.records[0].edits > before
    logits = other.prefill(ids(150))
    with pytest.raises(AssertionError):
        assert_fresh(model, other, logits)


def test_what_is_read_anew_is_read_once(model):
    """By a first prompt in which focus finds nothing to do, and by a next one even if it does."""
    session = session_of(model, NO_WISHES, mc_infer_exact=False, mc_gist_limit=2)
    other = session_of(model, mc_infer_exact=False, mc_gist_limit=2, mc_infer_allocator_iterations=1)
    read = []
    session.on_update = other.on_update = lambda session, entries_read, watch: read.append(entries_read)
    session.prefill(ids(150))
    assert read == [session.cache.pos]
    other.prefill(ids(150))
    before = other.focus.records[0].edits
    assert_fresh(model, other, other.prefill(ids(150) + ids(5, seed=1)))
    assert other.focus.records[0].edits > before
    assert read[2] < 2 * other.cache.pos + 5  # all, the new ones, and what a refocus reads


def test_what_a_refocus_brings_in_is_read_in_pieces(model, monkeypatch):
    session = session_of(model)
    session.prefill(ids(150))
    monkeypatch.setattr("megacontext.session.READ_ENTRIES", 9)
    passes, read = [], []
    network = session.decoder.network
    session.decoder.network = lambda x, *rest: passes.append(x.shape[1]) or network(x, *rest)
    session.on_update = lambda session, entries_read, watch: read.append(entries_read)
    for i in range(40):
        passes.clear()
        logits = session.step(torch.tensor([i]))
        assert_fresh(model, session, logits)
        assert max(passes) <= 9
    assert sum(entries > 9 for entries in read) > 3


def test_positions_far_beyond_the_models_table(model):
    session = session_of(model)
    logits = session.prefill(ids(5000))
    assert session.num_tokens > model.max_seq_len
    assert_fresh(model, session, logits)
    for i in range(10):
        logits = session.step(torch.tensor([i]))
    assert_fresh(model, session, logits)


def test_long_contexts_are_read_in_pieces(model, monkeypatch):
    whole = session_of(model).prefill(ids(200))
    monkeypatch.setattr("megacontext.session.READ_ENTRIES", 7)
    monkeypatch.setattr("megacontext.tree.INGEST_TOKENS", 11)
    torch.testing.assert_close(session_of(model).prefill(ids(200)), whole, **CLOSE)


# ---------------------------------------------------------------------------------------------------------
# A prompt in parts, as a shared batch takes it


@pytest.mark.parametrize("part", [1, 7, 40])
def test_parts_equal_the_whole(model, part):
    """Prompts that begin, go on and part ways: the same logits, tree and focus, and no part above its share."""
    whole, parted = (session_of(model, CLOCK, allocator_soft_max=60) for _ in range(2))
    for text in (ids(300), ids(300) + ids(90, seed=1), ids(250) + ids(9, seed=2)):
        expected, parts = whole.prefill(text), list(parted.reading(text, part))
        assert [logits is None for _, logits in parts] == [True] * (len(parts) - 1) + [False]
        assert sum(cost > part for cost, _ in parts) <= 1  # the refocus, which is one
        assert all(cost <= max(part, 60 // 4) for cost, _ in parts)
        torch.testing.assert_close(parts[-1][1], expected, **CLOSE)
        assert parted.focus_state() == whole.focus_state()
        for level in range(4):
            index = torch.arange(whole.tree.store.count(level))[None]
            assert parted.tree.store.count(level) == len(index[0])
            values = [session.tree.store.get(level, index) for session in (parted, whole)]
            torch.testing.assert_close(*values, **CLOSE)


@pytest.mark.parametrize("before", [0, 100])
def test_a_prompt_that_is_given_up_leaves_a_session_to_go_on_with(model, before):
    """After each of its parts; what it shared with what was held stays until it is all in the tree."""
    text, parts, last = ids(before)[:70] + ids(150, seed=1), 0, None
    while last is None:
        session = session_of(model)
        if before:
            session.prefill(ids(before))
        reading = session.reading(text, 5)
        for _ in range(parts):
            _, last = next(reading)
        reading.close()
        shared = min(before, 70) if parts else before
        assert session.num_tokens in (shared, len(text))
        assert session.num_tokens == shared or parts > 7
        if session.num_tokens:
            session.context.check()
            assert int(session.context.lengths()) <= session.budget
            assert session.focus_state()["num_tokens"] == session.num_tokens
        logits = session.prefill([text, ids(before) + ids(9), ids(30, seed=2)][parts % 3])
        assert_in_budget(session)
        assert_fresh(model, session, logits)
        assert_fresh(model, session, session.step(torch.tensor([3])))
        parts += 1
    assert parts > 10


def test_a_graph_changes_nothing(model):
    sessions = [session_of(model, mc_gist_limit=2) for _ in range(2)]
    sessions[1].decoder.graph = True
    for one, two in zip(*(iter_logits(session, 100, 30) for session in sessions), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


def iter_logits(session, prompt, steps):
    yield session.prefill(ids(prompt))
    for i in range(steps):
        yield session.step(torch.tensor(ids(1, seed=i)))


# ---------------------------------------------------------------------------------------------------------
# The budget


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    recent=st.integers(0, 13),
    interval=st.integers(1, 9),
    spare=st.integers(0, 12),
    policy=st.sampled_from(["greedy", "stochastic_greedy"]),
    prompts=st.lists(st.tuples(st.integers(1, 260), st.integers(0, 25)), min_size=1, max_size=3),
)
def test_the_budget_is_hard(seed, recent, interval, spare, policy, prompts):
    """Prompts that go on, part ways or come from nowhere, some far above the budget, and answers between them."""
    model = make_model(GPTConfig(sequence_len=64, vocab_size=V, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)).eval()
    rng = random.Random(seed)
    session = session_of(
        model,
        random_lens(seed),
        allocator=policy,
        allocator_recent_tokens=recent,
        mc_infer_refocus_interval=interval,
        allocator_soft_max=recent + 4 * (K - 1) + interval + spare,
    )
    text = []
    for n, answer in prompts:
        text = text[: rng.randint(0, len(text))] + ids(n, rng.randrange(99))
        try:
            logits = session.prefill(text)
        except UserError:
            assert smallest_length(len(text), K, recent) > session.room
            text = held(session).tolist() if session.num_tokens else []
            continue
        assert_in_budget(session)
        for _ in range(answer):
            token = rng.randrange(V - 9)
            after = session.step(torch.tensor([token]))
            assert_in_budget(session)
            if after is None:
                assert smallest_length(session.num_tokens + 1, K, recent) > session.room
                break
            logits = after
            text.append(token)
        assert held(session).tolist() == text
        assert_fresh(model, session, logits)


def test_a_stream_that_outgrows_the_smallest_context_ends(model):
    least = 8 + 4 * (K - 1) + 1  # enough for 64 tokens; gists of gists of gists need more
    session = session_of(model, allocator_soft_max=least, mc_infer_refocus_interval=1)
    session.prefill(ids(500))
    while session.step(torch.tensor([1])) is not None:
        assert session.num_tokens < 600
    n = session.num_tokens
    assert n == 518  # one more would be 1 + 3 + 3 + 3 gists, 3 tokens of an unfinished block and 8 recent ones
    assert session.step(torch.tensor([1])) is None
    assert session.num_tokens == n
    with pytest.raises(UserError, match="expected room for .* raise --allocator_soft_max"):
        session.prefill(ids(16_391))
    assert session.num_tokens == n  # as it was


@pytest.mark.parametrize("steps", range(6))
def test_tokens_that_are_noted_count(model, steps):
    """Whenever they come between two refocuses: the next one is so much earlier."""
    session, prompt = session_of(model, NO_WISHES), ids(200)
    session.prefill(prompt)
    for i in range(steps):
        session.step(torch.tensor([i]))
    session.note([*prompt, *range(steps), 7, 8, 9])
    for i in range(9):
        session.step(torch.tensor([i]))
        assert_in_budget(session)


@pytest.mark.parametrize("block_size", [4, 32])
def test_the_newest_tokens_may_be_a_gist(model, block_size):
    """With no recent tokens: then nobody asks, until the next token."""
    asked = []

    class Asked(Lens):
        def asking(self, states, embeds, at):
            asked.append(len(states))
            return states

    def oldest(n):
        assert asked[-1] > 0
        return torch.where(torch.arange(n) < 2, 4.0, -4.0)

    options = {"allocator_expand_threshold": 0.0, "allocator_collapse_threshold": 0.0, "mc_infer_refocus_interval": 8}
    options |= {"block_size": block_size, "allocator_recent_tokens": 0, "allocator_soft_max": 42 + 2 * block_size}
    settings = dataclasses.replace(SETTINGS, mc_infer_allocator_iterations=8, **options)
    networks = StandIns(disturbed_networks(settings).gistnet, Asked(oldest))
    session = MCSession(model, networks, settings)
    session.prefill(ids(640))
    assert session.context.tiles[0, -1] > 0
    for i in range(20):
        assert session.step(torch.tensor([i])).isfinite().all()
    assert int(session.context.lengths()) <= session.budget


def test_a_budget_that_is_too_small_is_refused(model):
    with pytest.raises(UserError, match="--allocator_soft_max: expected at least 26 .* got 25"):
        session_of(model, allocator_soft_max=25)
    with pytest.raises(UserError, match="lower --allocator_recent_tokens, --mc_infer_refocus_interval or --block_size"):
        session_of(model, mc_infer_refocus_interval=64)


# ---------------------------------------------------------------------------------------------------------
# A prompt that goes on where the session is


def test_a_prompt_that_goes_on_equals_one_from_the_start(model):
    """No wishes and room enough: then the past leaves no trace, wherever the prompts part."""
    session, text, rng = session_of(model, NO_WISHES, allocator_soft_max=400), [], random.Random(0)
    for turn in range(12):
        text = text[: rng.randint(0, len(text))] + ids(rng.randint(1, 30), turn)
        logits = session.prefill(text)
        torch.testing.assert_close(logits, CacheSession(Decoder(model)).prefill(text), **CLOSE)
        for i in range(rng.randint(0, 9)):
            session.step(torch.tensor([i]))
            text.append(i)


def focused_session(model, on_update=None):
    """
    A session with a history in a random focus, for which there is more room now; and no more wishes. Positions are
    ranks, so that no entry is read again merely because it has become far.
    """
    session = session_of(model, allocator_soft_max=100, mc_positional="rank", on_update=on_update)
    session.prefill(ids(200))
    for i in range(6 * 12):
        session.step(torch.tensor([i]))
    session.demand.lensnet = NO_WISHES
    session.budget, session.room, session.cache.limit = 180, 174, 180
    assert set(session.focus_state()["lod_counts"]) > {0, 1}
    return session


def test_the_next_turn_reads_what_is_new_and_keeps_its_focus(model):
    read = []
    session = focused_session(model, lambda session, entries_read, watch: read.append(entries_read))
    old, text = session._context_now(), held(session).tolist()
    read.clear()
    session.prefill(text + ids(7, seed=1))
    blocks = old.old_blocks(session.recent)
    assert torch.equal(session._context_now().lod_map[:, :blocks], old.lod_map[:, :blocks])
    assert read[-1] == 7
    session.prefill(text + ids(7, seed=1))  # the same again: only the last token is read, for its logits
    assert read[-1] == 1


def test_a_big_paste_is_collapsed_itself_and_the_past_only_if_it_must(model):
    session = focused_session(model)
    old, text = session._context_now(), held(session).tolist()
    blocks = old.old_blocks(session.recent)
    logits = session.prefill(text + ids(100, seed=1))
    new = session._context_now()
    assert torch.equal(new.lod_map[:, :blocks], old.lod_map[:, :blocks])
    assert new.lod_map[:, blocks:].any()
    assert_in_budget(session)
    assert_fresh(model, session, logits)
    logits = session.prefill(text + ids(6000, seed=2))  # more than can be kept beside the past as it is
    assert_in_budget(session)
    assert_fresh(model, session, logits)


def test_an_earlier_message_can_be_changed(model):
    """What was collapsed and is recent again comes back at full detail; nodes that were cut are taken apart."""
    session = session_of(model)
    session.prefill(ids(230))
    for n in (190, 70, 9, 1):
        logits = session.prefill(ids(n) + ids(3, seed=n))
        assert session.num_tokens == n + 3
        assert_in_budget(session)
        assert_fresh(model, session, logits)


# ---------------------------------------------------------------------------------------------------------
# Back and forth


@pytest.mark.parametrize("policy", ["greedy", "stochastic_greedy"])
def test_restored_equals_never_having_gone_on(model, policy):
    options = {"lens": CLOCK, "allocator": policy, "allocator_soft_max": 60}
    session, straight = session_of(model, **options), session_of(model, **options)
    for both in (session, straight):
        both.prefill(ids(140))
        for i in range(10):
            both.step(torch.tensor(ids(1, seed=i)))
    snapshot, state = session.snapshot(), session.focus_state()
    for detour in (1, 5, 40):
        for i in range(detour):
            session.step(torch.tensor(ids(1, seed=100 + i)))
        session.restore(snapshot)
        assert session.focus_state() == state
    text = held(session).tolist()
    session.prefill(text + ids(100, seed=8))
    session.restore(snapshot)
    assert session.focus_state() == state
    for i in range(40):
        column = torch.tensor(ids(1, seed=i))
        torch.testing.assert_close(session.step(column), straight.step(column), **CLOSE)
        assert session.focus_state() == straight.focus_state()
        assert_in_budget(session)


def test_restored_at_once_keeps_the_cache(model):
    session = session_of(model, NO_WISHES, allocator_soft_max=100)
    session.prefill(ids(40))
    snapshot = session.snapshot()
    for i in range(20):
        session.step(torch.tensor([i]))
    session.restore(snapshot)
    assert session.cache.pos == 40


def test_a_session_goes_on_from_a_store_and_a_state(model):
    """Also without a prompt before the next token, whose wishes are those of a prompt's last."""
    store, networks = RamStore(torch.float32), StandIns(GISTNET, CLOCK)
    session = MCSession(model, networks, SETTINGS, store=store)
    session.prefill(ids(200))
    resumed = MCSession(model, networks, SETTINGS, store=store, state=session.state())
    assert torch.equal(resumed.context.tiles, session.context.tiles)
    assert resumed.step(torch.tensor([5])).isfinite().all()
    assert_in_budget(resumed)


def test_a_state_of_blocks_of_another_size_says_nothing(model):
    """As of a conversation that was kept before the model was trained anew."""
    session = session_of(model)
    session.prefill(ids(200))
    state, store = session.state(), RamStore(torch.float32)
    store.append(0, session.tree.store.get(0, torch.arange(200)[None]))
    settings = dataclasses.replace(SETTINGS, block_size=2 * K)
    networks = StandIns(disturbed_networks(settings).gistnet, CLOCK)
    resumed = MCSession(model, networks, settings, store=store, state=state)
    assert torch.equal(resumed.context.tiles, WorkingContext.initial(200, 2 * K, resumed.room, resumed.recent).tiles)
    assert_fresh(model, resumed, resumed.prefill([*ids(200), 3]))


def test_snapshots_that_are_void(model):
    session, other = (session_of(model, CLOCK) for _ in range(2))
    empty = session.snapshot()
    session.prefill(ids(50))
    snapshot = session.snapshot()
    with pytest.raises(ValueError, match="snapshot of this session"):
        other.restore(snapshot)
    session.prefill(ids(50)[:30] + ids(30, seed=1))
    with pytest.raises(ValueError, match="has forgotten some of the 50 tokens"):
        session.restore(snapshot)
    session.restore(empty)
    assert session.num_tokens == 0
    for use in (session.focus_state, lambda: session.step(torch.tensor([1]))):
        with pytest.raises(ValueError, match="call prefill first"):
            use()
    torch.testing.assert_close(session.prefill(ids(20)), other.prefill(ids(20)), **CLOSE)


def test_closing(model):
    session = session_of(model)
    session.prefill(ids(50))
    assert min(session.memory().values()) > 0
    session.close()
    assert session.spliced is None
    assert session.tree is None
    for use in (lambda: session.prefill([1]), lambda: session.step(torch.tensor([1])), session.snapshot):
        with pytest.raises(ValueError, match="this session was closed"):
            use()
    session.close()


# ---------------------------------------------------------------------------------------------------------
# Rest, and what can be seen


def test_what_was_edited_is_not_undone_at_once(model):
    """A lens that changes its mind each time: no block goes the other way in the refocus after, unless it must."""
    seen = []
    session = session_of(
        model,
        allocator_soft_max=70,
        on_update=lambda session, entries_read, watch: seen.append(session.focus.records.copy()),
    )
    session.prefill(ids(200))
    seen.clear()
    for i in range(150):
        session.step(torch.tensor([i]))
    edited = 0
    for before, after in itertools.pairwise(seen):
        for old, new in zip(map(_blocks, before), map(_blocks, after), strict=True):
            forced = sum(not expands for expands in new.values()) > sum(new.values())
            assert forced or all(new[block] == old[block] for block in new.keys() & old.keys())
            edited += len(new)
    assert edited > 20


def _blocks(record):
    return {c.first_block + i: c.new_lod < c.old_lod for c in record.changes for i in range(c.num_blocks)}


def test_focus_state(model):
    told = Told()
    session = session_of(model, on_update=partial(tell_session, told))
    session.prefill(ids(300))
    seen, events = [], told.events
    for i in range(60):
        session.step(torch.tensor([i]))
        state, context = session.focus_state(), session._context_now()
        lods = [lod for lod, n in state["lod"] for _ in range(n)]
        assert lods == context.lod_map[0].tolist()
        assert state["entries"] == sum(state["lod_counts"].values()) == int(context.lengths()[0])
        if state["refocuses"] != len(seen):
            seen.append(state)
            for first, n, lod in state["expanded"] + state["collapsed"]:
                assert 0 <= first < first + n <= len(lods)
                assert lod >= 0
            assert all(-1 <= score <= 1 for _, score in state["scores"])
    last = seen[-1]
    assert last["num_tokens"] > 360 - 6
    assert (last["block_size"], last["budget"]) == (4, 48)
    assert any(state["expanded"] for state in seen)
    assert any(state["collapsed"] for state in seen)
    edits = sum(len(state["expanded"]) + len(state["collapsed"]) for state in seen)
    assert 0 < edits <= last["edits"]
    assert 0 < last["swap_rate"] < 1
    assert last["residency"] > 1
    names = {name for name, _ in events}
    assert names == {"mc_tree_snapshot", "working_context_snapshot", "focus_allocator", "inference_update"}
    assert all(isinstance(value, (int, float)) for _, values in events for value in values.values())
    assert len([name for name, _ in events if name == "focus_allocator"]) == last["refocuses"]


def test_state_of_a_long_stream_is_small(model):
    session = session_of(model, allocator_soft_max=100)
    session.prefill(ids(40_000))
    assert len(str(session.focus_state())) < 3000
    assert session.memory()["cache"] == session.cache.data.nbytes
    assert session.cache.capacity <= 100


def test_scores_of_the_networks_are_used(model):
    """The real LensNet, on the device and in the shapes that a session gives it."""
    torch.manual_seed(0)
    networks = MCNetworks(32, 2, SETTINGS).eval()
    with torch.no_grad():
        for p in networks.lensnet.parameters():
            p.add_(torch.randn_like(p))
    session = MCSession(model, networks, SETTINGS)
    session.prefill(ids(100))
    for i in range(30):
        session.step(torch.tensor([i]))
    assert session.focus.records[0].edits > 0
    assert len(session.focus_state()["scores"]) > 1
