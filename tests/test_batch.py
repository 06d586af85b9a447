"""Streams that share steps, each against itself alone: whoever is beside them, whenever they come and go."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.config import MCConfig
from megacontext.networks import MCNetworks
from megacontext.session import MCSession
from nanochat import engine as batching
from nanochat.common import UserError
from nanochat.decode import Decoder
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.kv_cache import CacheSession, KVCache, RowCaches
from nanochat.sampling import Sampling
from tests.helpers import make_model

V = 300
CONFIG = GPTConfig(sequence_len=16, vocab_size=V, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
EXACT = torch.float64  # so that no two tokens are as likely but for rounding
SETTINGS = MCConfig(
    block_size=4,
    allocator_soft_max=24,
    allocator_recent_tokens=8,
    mc_infer_refocus_interval=3,
    mc_infer_allocator_iterations=2,
    mc_aux_dtype="fp32",
    mc_gist_limit=2,
).resolve(64)


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG, seed=2).eval()


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return Engine(model, tokenizer, dtype=EXACT)


@pytest.fixture(scope="module")
def networks():
    """A LensNet that has wishes."""
    torch.manual_seed(4)
    networks = MCNetworks(32, 2, SETTINGS).eval()
    with torch.no_grad():
        for p in networks.lensnet.parameters():
            p.add_(torch.randn_like(p))
    return networks


@pytest.fixture(autouse=True)
def exact_gists(monkeypatch):
    """Rounded to bf16, two sums of another order can be a part in 256 apart."""
    monkeypatch.setattr("megacontext.session.GIST_DTYPE", torch.float32)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(batching, "PART", 5)


def prompt(n, seed=0):
    return torch.randint(0, V - 9, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(engine, tokens, max_tokens, sampling, session=None):
    columns = engine.generate(tokens, 1, max_tokens, session=session, **vars(sampling))
    return [column[0] for column, _ in columns]


def run(batch, arrivals, leaving=None, steps=500):
    """
    The ids of each stream. arrivals: (step, arguments of `add`) of each; leaving: number of a stream → how many tokens
    it has when it is removed.
    """
    streams, ids, leaving = {}, [[] for _ in arrivals], leaving or {}
    for step in range(steps):
        for number, (at, arguments) in enumerate(arrivals):
            if at == step:
                streams[batch.add(*arguments)] = number
        for stream, id, _ in batch.step():
            number = streams[stream]
            assert stream.ended != "removed"
            assert id is not None or stream.ended is not None
            ids[number] += [id] if id is not None else []
        for stream, number in streams.items():
            if number in leaving and len(ids[number]) >= leaving[number] and stream.ended is None:
                batch.remove(stream)
                batch.remove(stream)  # a second time changes nothing
                stream.ended = "removed"
        assert len(batch) == sum(stream.ended is None for stream in streams)
        if step > max(at for at, _ in arrivals) and not len(batch):
            return ids, list(streams)
    raise AssertionError("the batch does not end")


SAMPLING = st.one_of(
    st.just(Sampling(temperature=0)),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.5, 1.0, 1.5]),
        top_k=st.sampled_from([0, 5, 50]),
        top_p=st.sampled_from([1.0, 0.8]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        logit_bias=st.sampled_from([{}, {65: 3.0}]),
        seed=st.integers(0, 5),
    ),
)
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 25), st.integers(1, 40), st.integers(0, 9), st.integers(1, 25), SAMPLING),
    min_size=1,
    max_size=7,
)


LEAVING = st.dictionaries(st.integers(0, 6), st.integers(0, 6), max_size=2)


@settings(max_examples=40, deadline=None)
@given(arrivals=ARRIVALS, leaving=LEAVING, graph=st.booleans())
def test_each_stream_gets_what_it_gets_alone(model, tokenizer, arrivals, leaving, graph):
    """Its own tokens in its own order, at whatever step others come and go; of one that left, those up to then."""
    engine = Engine(model, tokenizer, dtype=EXACT, graph=graph)
    arguments = [(prompt(n, seed), max_tokens, sampling) for _, n, seed, max_tokens, sampling in arrivals]
    ids, streams = run(engine.batch(), [(a[0], b) for a, b in zip(arrivals, arguments, strict=True)], leaving)
    for number, (got, one) in enumerate(zip(ids, arguments, strict=True)):
        expected = alone(engine, *one)
        assert got == (expected[: len(got)] if number in leaving else expected)
    assert {stream.ended for stream in streams} <= {"stop", "length", "removed"}


@settings(max_examples=15, deadline=None)
@given(arrivals=ARRIVALS, leaving=LEAVING, graph=st.booleans())
def test_sessions_of_megacontext_share_steps(model, tokenizer, networks, arrivals, leaving, graph):
    """Beside plain streams. Each goes on alone afterwards with what it holds."""
    engine = Engine(model, tokenizer, dtype=EXACT, graph=graph)

    def session(number):
        return MCSession(model, networks, SETTINGS, decoder=engine.decoder) if number % 3 else None

    arguments, kept = [], [session(number) for number in range(len(arrivals))]
    for number, (_, n, seed, max_tokens, sampling) in enumerate(arrivals):
        arguments.append((prompt(3 * n if number % 3 else n, seed), max_tokens, sampling, kept[number]))
    ids, _ = run(engine.batch(), [(a[0], b) for a, b in zip(arrivals, arguments, strict=True)], leaving)
    for number, (got, (tokens, max_tokens, sampling, kept_one)) in enumerate(zip(ids, arguments, strict=True)):
        reference = session(number)
        expected = alone(engine, tokens, max_tokens, sampling, reference)
        assert got == (expected[: len(got)] if number in leaving else expected)
        if kept_one and number not in leaving:
            assert kept_one.num_tokens == reference.num_tokens
            assert kept_one.cache.shared is None
            more = [*tokens, *got, 7, 8, 9]
            assert alone(engine, more, 5, sampling, kept_one) == alone(engine, more, 5, sampling, reference)


class Scripted(CacheSession):
    """A session that 'says' what it is told, one token after another; `fault` is raised at step number `at`."""

    def __init__(self, decoder, says, fault=None, at=None):
        super().__init__(decoder)
        self.says, self.fault, self.at, self.step_number = says, fault, at, 0

    def _next(self):
        if self.step_number == self.at:
            raise self.fault
        logits = torch.zeros(1, V)
        logits[0, self.says[min(self.step_number, len(self.says) - 1)]] = 1000.0
        self.step_number += 1
        return logits

    def reading(self, tokens, part):
        for n, logits in super().reading(tokens, part):
            yield n, None if logits is None else self._next()

    def enter(self, ids):
        return None if super().enter(ids) is None else self._next()


def test_tools_and_ends_of_each_row(engine, tokenizer):
    """A tool's answer is forced into the row that called it, at its own pace, and into no other."""
    special, encode = tokenizer.encode_special, tokenizer.encode
    call = lambda text: [special("<|python_start|>"), *encode(text), special("<|python_end|>")]  # noqa: E731
    answer = lambda text: [special("<|output_start|>"), *encode(text), special("<|output_end|>")]  # noqa: E731
    [x] = encode("x")
    texts = [("12*12", "144"), ("1+2", "3"), ("4+5", "9")]
    arrivals, expected = [], []
    for number, (question, result) in enumerate(texts):
        forced = answer(result)
        says = [x] * number + call(question) + [x] * len(forced) + [special("<|assistant_end|>")]
        arrivals.append((2 * number, (prompt(3 + 4 * number), 99, Sampling(), Scripted(engine.decoder, says))))
        expected.append([x] * number + call(question) + forced + [special("<|assistant_end|>")])
    plain = prompt(9, seed=7), 12, Sampling(temperature=0)
    ids, streams = run(engine.batch(), [*arrivals, (1, plain)])
    assert ids == [*expected, alone(engine, *plain)]
    assert [stream.ended for stream in streams if isinstance(stream.session, Scripted)] == ["stop"] * 3


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_stream_that_fails_ends_alone(engine, at):
    fault = RuntimeError("on purpose")
    failing = Scripted(engine.decoder, prompt(9), fault, at)
    others = [(prompt(6, seed), 15, Sampling(seed=seed)) for seed in (1, 2)]
    ids, streams = run(engine.batch(), [(0, others[0]), (1, (prompt(4), 99, Sampling(), failing)), (2, others[1])])
    assert ids == [alone(engine, *others[0]), prompt(9)[:at], alone(engine, *others[1])]
    assert [stream.ended for stream in streams if stream.session is failing] == [fault]


class Wishful(CacheSession):
    """A session that wants to look again at each token; step number `at` then says `id`, or raises it."""

    def __init__(self, decoder, at, id):
        super().__init__(decoder)
        self.at, self.id, self.steps = at, id, 0

    def saw(self, states):
        assert states.shape[0] == 1
        self.wish = torch.tensor([self.steps / 4])

    def follow(self, wish):
        assert wish == self.steps / 4
        self.wish, self.steps = None, self.steps + 1
        if self.steps != self.at:
            return None
        if isinstance(self.id, Exception):
            raise self.id
        return torch.zeros(1, V).index_fill(1, torch.tensor([self.id]), 1000.0)


def test_what_a_stream_looks_at_again_is_its_own(engine):
    """Its token is chosen anew, or it ends with its fault; the streams beside it have the tokens they would have."""
    others = [(prompt(6, seed), 15, Sampling(seed=seed)) for seed in (1, 2)]
    one = prompt(4), 9, Sampling(temperature=0)
    usual, fault = alone(engine, *one), RuntimeError("on purpose")
    other = (usual[3] + 1) % V
    for id, expected in ((other, [*usual[:3], other]), (fault, usual[:3])):
        wishful = Wishful(engine.decoder, 3, id)
        ids, streams = run(engine.batch(), [(0, others[0]), (1, (*one, wishful)), (2, others[1])])
        assert ids.pop(1)[:4] == expected
        assert ids == [alone(engine, *arguments) for arguments in others]
        [ended] = [stream.ended for stream in streams if stream.session is wishful]
        assert ended is fault if id is fault else ended in ("length", "stop")


def test_a_session_that_cannot_take_up_a_step_ends_alone(engine):
    """As one on a disk that fails: what it looked up comes after the step that it shared."""
    fault = OSError("on purpose")

    class Deaf(CacheSession):
        def saw(self, states):
            if self.cache.pos == 7:
                raise fault

    deaf, others = Deaf(engine.decoder), [(prompt(6, seed), 15, Sampling(seed=seed)) for seed in (1, 2)]
    one = prompt(4), 9, Sampling(temperature=0)
    ids, streams = run(engine.batch(), [(0, others[0]), (0, (*one, deaf)), (1, others[1])])
    assert ids.pop(1) == alone(engine, *one)[:3]
    assert ids == [alone(engine, *arguments) for arguments in others]
    assert [stream.ended for stream in streams if stream.session is deaf] == [fault]


def test_a_step_that_fails_ends_those_that_shared_it(engine):
    batch, fault = engine.batch(), MemoryError("on purpose")
    shared = [batch.add(prompt(3, seed), 20, Sampling()) for seed in (1, 2)]
    lone = batch.add(prompt(4), 6, Sampling(), Scripted(engine.decoder, prompt(9)))
    for _ in range(4):
        batch.step()
    real, batch.stepper = batch.stepper, None
    batch.stepper = lambda *_: (_ for _ in ()).throw(fault)
    news = {stream: id for stream, id, _ in batch.step()}
    assert [stream.ended for stream in shared] == [fault] * 2
    assert [news[stream] for stream in [*shared, lone]] == [None, None, prompt(9)[3]]
    batch.stepper = real
    later = prompt(5), 7, Sampling(temperature=0)
    got = []
    stream = batch.add(*later)
    while len(batch):
        got += [id for who, id, _ in batch.step() if who is stream]
    assert got == alone(engine, *later)
    assert lone.ended == "length"


def test_what_does_not_fit_ends_alone(engine):
    """A prompt beyond the positions of the model, and one that reaches their end."""
    limit = engine.model.max_seq_len
    arguments = [(prompt(n), 9, Sampling(temperature=0)) for n in (limit + 1, limit - 2, 3)]
    ids, streams = run(engine.batch(), [(0, one) for one in arguments])
    assert isinstance(streams[0].ended, UserError)
    assert ids == [[], alone(engine, *arguments[1]), alone(engine, *arguments[2])]
    assert len(ids[1]) == 3
    assert streams[1].ended == "length"
    for tokens, max_tokens in (([], 1), ([1], 0)):
        with pytest.raises(ValueError, match="expected at least one token"):
            engine.batch().add(tokens, max_tokens, Sampling())


def test_nobody_waits_for_a_long_prompt(engine):
    """Each step reads a part of one prompt, in turn, and every stream that has read its own gets a token in each."""
    batch = engine.batch()
    running = batch.add(prompt(5), 99, Sampling(temperature=0, logit_bias={65: 1000.0}))
    long, short = batch.add(prompt(100), 9, Sampling()), batch.add(prompt(7), 9, Sampling())
    first = {}
    for step in range(30):
        news = [stream for stream, _, _ in batch.step()]
        assert running in news
        for stream in news:
            first.setdefault(stream, step)
    # 1, 2 and 20 parts of 5 tokens, by turns; the short one's last part has two, so that a long one's goes with it
    assert first == {running: 0, short: 4, long: 21}


def test_nobody_waits_for_a_prompt_of_100_000_tokens(model, tokenizer, networks, monkeypatch):
    """Beside a session that takes it up, a stream gets a token at each step; both networks do a part's work at most."""
    monkeypatch.setattr(batching, "PART", 256)
    engine = Engine(model, tokenizer)
    batch, settings = engine.batch(), SETTINGS.resolve(64)
    session = MCSession(model, networks, settings, decoder=engine.decoder)
    taken, append = [], session.tree.append
    monkeypatch.setattr(session.tree, "append", lambda tokens: (taken.append(tokens.size(1)), append(tokens))[1])
    long = batch.add(torch.randint(0, V - 9, (100_000,)).tolist(), 2, Sampling(), session)
    running = batch.add(prompt(5), 150, Sampling(temperature=0, logit_bias={65: 1000.0}))
    got = []
    while long.ended is None:
        news = {stream: id for stream, id, _ in batch.step()}
        got.append(news.get(running))
        assert sum(taken) <= 1024
        taken.clear()
    assert got[1:] == [65] * (len(got) - 1)
    assert len(got) > 97


def test_a_prompt_that_is_given_up_is_closed_at_once(engine, model, networks):
    """Its session holds what it held, and the others' tokens are as if it had not been there."""
    batch, session = engine.batch(), MCSession(model, networks, SETTINGS, decoder=engine.decoder)
    session.prefill(prompt(200)[:30])
    stays = prompt(6), 20, Sampling(temperature=0)
    stream = batch.add(*stays)
    left = batch.add(prompt(200), 9, Sampling(), session)
    got = [id for _ in range(4) for who, id, _ in batch.step() if who is stream]
    assert 30 < session.num_tokens < 200
    batch.remove(left)
    assert session.num_tokens == 30
    while len(batch):
        got += [id for who, id, _ in batch.step() if who is stream]
    assert got == alone(engine, *stays)


def test_logits_are_told_where_they_are_asked_for(engine):
    batch, got = engine.batch(), []
    batch.add(prompt(4, 1), 5, Sampling())
    asking = batch.add(prompt(6, 2), 5, Sampling(temperature=0), None, True)
    while len(batch):
        for stream, id, logits in batch.step():
            assert (logits is not None) == (stream is asking)
            if stream is asking:
                got.append((id, logits))
    ids = prompt(6, 2)
    assert len(got) == 5
    for id, logits in got:
        with torch.no_grad():
            exact = engine.model(torch.tensor([ids]))[:, -1]
        torch.testing.assert_close(logits, exact, atol=1e-5, rtol=0)
        assert id == logits.argmax().item()
        ids = [*ids, id]


def test_long_rows_beside_short_ones_are_not_padded(model, tokenizer, monkeypatch):
    """The same tokens whether a step reads rows one by one or all as far as the longest."""
    engine = Engine(model, tokenizer, dtype=EXACT)
    ways, real = [], Decoder._attend_one_by_one
    monkeypatch.setattr(Decoder, "_attend_one_by_one", lambda self, *args: (ways.append(args[2]), real(self, *args))[1])
    arguments = [(prompt(n, n), most, Sampling(temperature=0)) for n, most in ((120, 9), (2, 60), (3, 60), (4, 60))]
    ids, _ = run(engine.batch(), [(0, one) for one in arguments])
    assert ids == [alone(engine, *one) for one in arguments]
    assert ways
    assert all(4 * max(lengths) > 2 * sum(lengths) for lengths in ways if len(lengths) == 4)


# ---------------------------------------------------------------------------------------------------------
# Caches side by side

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["join", "leave", "keep", "step", "step", "step some", "cut", "read"]), st.integers(0, 9)
    ),
    min_size=3,
    max_size=25,
)


def truncate(cache, pos):
    cache.keep(torch.arange(cache.pos) < pos)


@settings(max_examples=60, deadline=None)
@given(edits=EDITS, graph=st.booleans())
@torch.inference_mode()
def test_rows_hold_what_they_would_alone(model, edits, graph):
    """After any history, each row goes on as if it had been read from scratch; what left can be read on, too."""
    decoder, caches = Decoder(model, EXACT, graph), RowCaches()
    step, pick = decoder.stepper(caches), torch.Generator().manual_seed(0)
    new = lambda n: torch.randint(0, V, (n,), generator=pick).tolist()  # noqa: E731
    texts, gone = [], []

    def read(tokens, cache):
        return decoder.extend(torch.tensor([tokens]), cache)

    def expected(tokens):
        return read(tokens, KVCache(2, len(tokens)))

    for edit, n in [("join", 2), *edits]:
        row = n % len(texts) if texts else None
        if edit == "join" or row is None:
            cache, text = KVCache(2, 2 + n, limit=80), new(1 + n)
            read(text, cache)
            caches.join(cache)
            texts.append(text)
        elif edit in ("leave", "keep"):
            cache, text = caches.rows[row], texts[row]
            caches.leave(row, keep=edit == "keep")
            texts[row] = texts[-1]
            texts.pop()
            gone += [(cache, text)] if edit == "keep" else []
        elif edit == "cut":
            truncate(caches.rows[row], max(1, len(texts[row]) - n))
            texts[row] = texts[row][: caches.rows[row].pos]
        elif edit == "read":
            texts[row] += (more := new(1 + n))
            torch.testing.assert_close(read(more, caches.rows[row]), expected(texts[row]))
        else:
            ids, rows = new(len(texts)), [i for i in range(len(texts)) if edit == "step" or (i + n) % 2]
            logits = step(torch.tensor(ids), [len(text) for text in texts], rows)
            for i in rows:
                texts[i].append(ids[i])
                torch.testing.assert_close(logits[i : i + 1], expected(texts[i]))
        assert [cache.pos for cache in caches.rows] == list(map(len, texts))
        assert all(cache.capacity == caches.capacity for cache in caches.rows)
    for cache, text in gone:
        assert cache.shared is None
        torch.testing.assert_close(read([5], cache), expected([*text, 5]))


@pytest.mark.parametrize("graph", [False, True])
@torch.inference_mode()
def test_memory_follows_the_rows(model, graph):
    """After a burst it is given back, in few moves, and those that stay go on as if they were alone."""
    decoder, caches = Decoder(model, EXACT, graph), RowCaches()
    step = decoder.stepper(caches)
    texts = [prompt(90 if i == 7 else 3, i) for i in range(32)]
    for text in texts:
        cache = KVCache(2, 4)
        decoder.extend(torch.tensor([text]), cache)
        caches.join(cache)
    full, moved = caches.nbytes, []
    while len(texts) > 1:
        caches.leave(1, keep=False)
        texts[1] = texts[-1]
        texts.pop()
        moved += [caches.data] if not moved or caches.data is not moved[-1] else []
        if len(texts) % 5 == 1:
            logits = step(torch.tensor([5] * len(texts)), [len(text) for text in texts])
            texts = [[*text, 5] for text in texts]
            for row, text in enumerate(texts):
                torch.testing.assert_close(logits[row], decoder.extend(torch.tensor([text]), KVCache(2, 9))[0])
    assert caches.nbytes < full / 8
    assert len(moved) <= 4
    caches.leave(0, keep=False)
    assert caches.data.size(2) <= 4


@torch.inference_mode()
def test_a_row_leaves_nothing_behind(model):
    """What is hidden counts 0 times, which is NaN if it is infinite: a row that went wrong must not reach the next."""
    decoder, caches = Decoder(model), RowCaches()
    first, second = KVCache(2, 9), KVCache(2, 9)
    decoder.extend(torch.ones(1, 5, dtype=torch.long), first)
    caches.join(first)
    first.data[:] = torch.nan
    caches.leave(0, keep=False)
    decoder.extend(torch.ones(1, 2, dtype=torch.long), second)
    expected = decoder.step(torch.tensor([3]), second)
    truncate(second, 2)
    caches.join(second)
    for graph in (False, True):
        decoder.graph = graph
        truncate(second, 2)
        torch.testing.assert_close(decoder.stepper(caches)(torch.tensor([3]), [2]), expected)


@pytest.mark.parametrize("graph", [False, True])
@torch.inference_mode()
def test_a_row_leaves_no_bias_behind(model, graph):
    """That of a row's keys goes with it, also if the next step has none and the row after that is another's."""
    decoder, caches = Decoder(model, EXACT, graph), RowCaches()
    step = decoder.stepper(caches)

    def join(text):
        cache = KVCache(2, 9)
        decoder.extend(torch.tensor([text]), cache)
        caches.join(cache)
        return cache

    join([1, 2, 3])
    join([4, 5, 6]).bias = torch.full((3,), -2.0, dtype=EXACT)
    step(torch.tensor([7, 8]), [3, 3])
    caches.leave(1, keep=False)
    step(torch.tensor([9]), [4])
    join([4, 5, 6])
    logits = step(torch.tensor([10, 8]), [5, 3])
    torch.testing.assert_close(logits[1], decoder.extend(torch.tensor([[4, 5, 6, 8]]), KVCache(2, 9))[0])
