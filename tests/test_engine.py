"""Generation against the slow, obvious model: decoder, cache, sessions, sampling, tools, weights that change."""

import gc
import math
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError, autocast
from nanochat.decode import Decoder, Matrix, StaticStep, compute_dtype
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig, rotary_cos_sin
from nanochat.kv_cache import CacheSession, KVCache
from nanochat.tokenizer import stream_parts
from tests.helpers import CLOSE, likeliest, make_model

V = 300  # of the tokenizer; the models' matrices have 320 rows
CONFIGS = {
    "plain": GPTConfig(sequence_len=8, vocab_size=V, n_layer=2, n_head=2, n_kv_head=2, n_embd=32),
    "grouped": GPTConfig(sequence_len=8, vocab_size=V, n_layer=2, n_head=4, n_kv_head=2, n_embd=32),
    "one key head": GPTConfig(sequence_len=8, vocab_size=V, n_layer=3, n_head=3, n_kv_head=1, n_embd=48),
    "odd sizes": GPTConfig(sequence_len=8, vocab_size=V, n_layer=1, n_head=5, n_kv_head=5, n_embd=70),
}
CPU = torch.device("cpu")


def make(name="grouped", seed=0, sharpness=1.0):
    """A model in which every matrix matters, also the padding of the vocabulary: it would win if it were read."""
    model = make_model(CONFIGS[name], seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
        model.lm_head.weight[V:] = 100.0
        model.transformer.wte.weight[V:] = torch.nan
    return model.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def any_model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return Engine(model, tokenizer)


def ends(tokenizer):
    return {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}


@torch.inference_mode()
def naive(model, ids, dtype=torch.float32):
    """Logits [B, V] after ids [B, T], everything computed anew."""
    with autocast(CPU, dtype):
        return model(ids)[:, -1]


def columns(engine, *args, **kwargs):
    return [column for column, _ in engine.generate(*args, **kwargs)]


# ---------------------------------------------------------------------------------------------------------
# The decoder computes what the model computes


@pytest.mark.parametrize("graph", [False, True])
def test_best_tokens_equal_the_naive_way(any_model, tokenizer, graph):
    engine = Engine(any_model, tokenizer, graph=graph)
    for seed in range(3):
        prompt = torch.randint(0, V - 9, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
        expected = []
        for token in likeliest(any_model, prompt, 30):
            expected.append(token)
            if token in ends(tokenizer):
                break
        assert columns(engine, prompt, 2, 30, temperature=0) == [[token] * 2 for token in expected]


def test_logits_of_chunks_and_steps(any_model):
    ids = torch.randint(0, V, (3, 20))
    decoder, cache = Decoder(any_model), KVCache(any_model.config.n_layer, 4)
    at = 0
    for T in (5, 1, 6, 1, 1, 4):
        at += T
        logits = decoder.extend(ids[:, at - T : at], cache)
        assert logits.shape == (3, V)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, naive(any_model, ids[:, :at]), **CLOSE)
    assert torch.equal(decoder.step(ids[:, at], cache), Decoder(any_model).step(ids[:, at], truncated(cache, at)))


def truncated(cache, pos):
    cache.keep(torch.arange(cache.pos) < pos)
    return cache


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_after_every_token_of_a_chunk(any_model, dtype):
    ids = torch.randint(0, V, (2, 20))
    tolerance = CLOSE if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}
    decoder, cache = Decoder(any_model, dtype), KVCache(any_model.config.n_layer, 20)
    with autocast(CPU, dtype):
        expected = any_model(ids)
    for at, T in ((0, 4), (4, 1), (5, 3), (8, 1), (9, 6), (15, 1)):
        logits = decoder.extend(ids[:, at : at + T], cache, last=at % 2)
        assert cache.data.dtype == dtype
        torch.testing.assert_close(logits, expected[at % 2, at : at + T], **tolerance)


def test_bf16_is_as_close_to_the_truth_as_the_autocast_model(any_model):
    ids = torch.randint(0, V, (4, 12))
    exact, rough = naive(any_model, ids), naive(any_model, ids, torch.bfloat16)
    with autocast(CPU, torch.bfloat16):
        decoder = Decoder(any_model)
    assert decoder.dtype == torch.bfloat16
    cache = KVCache(any_model.config.n_layer, 12)
    decoder.extend(ids[:, :10], cache)
    decoder.step(ids[:, 10], cache)
    logits = decoder.step(ids[:, 11], cache)
    error = (rough - exact).square().mean().sqrt()
    assert 0 < error < 0.2
    assert (logits - exact).square().mean().sqrt() < 1.5 * error
    assert (logits - rough).square().mean().sqrt() < 1.5 * error


def test_precision_is_the_surroundings_or_what_was_asked_for(model, tokenizer):
    plain, bf16, fp32 = (Engine(model, tokenizer, dtype=d) for d in (None, torch.bfloat16, torch.float32))
    assert compute_dtype(model) == Decoder(model).dtype == torch.float32
    assert compute_dtype(make("plain").bfloat16()) == torch.bfloat16
    exact, rough = (columns(engine, [7, 8], 64, 20) for engine in (fp32, bf16))
    assert exact != rough
    assert columns(plain, [7, 8], 64, 20) == exact
    with autocast(CPU, torch.bfloat16):
        assert compute_dtype(model) == Decoder(model).dtype == torch.bfloat16
        assert columns(plain, [7, 8], 64, 20) == columns(bf16, [7, 8], 64, 20) == rough
        assert columns(fp32, [7, 8], 64, 20) == exact  # autocast has no say inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_matrix_laid_out_multiplies_as_the_weight_does(dtype):
    """Also a weight that is a view, of sizes that fill no block, and while another thread generates."""
    weight = torch.randn(35, 70, dtype=torch.float64).T  # [out, in] = [70, 35]
    matrix = Matrix(weight, dtype)
    for rows in (1, 2, 7, 65):
        x = torch.randn(rows, 35, dtype=torch.float64).to(dtype)
        exact = x.double() @ weight.to(dtype).double().T
        bound = torch.finfo(dtype).eps * 35 * (x.double().abs() @ weight.abs().T)  # of sums in any order
        y = matrix(x)
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= bound).all()


def test_generating_flips_no_switch_of_the_process(model):
    switches, relu = [], F.relu

    def watched(x):
        switches.append(torch.backends.mkldnn.enabled)
        return relu(x)

    for dtype in (torch.float32, torch.bfloat16):
        decoder, cache = Decoder(model, dtype), KVCache(2, 9)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "relu", watched)
            decoder.extend(torch.ones(1, 3, dtype=torch.long), cache)
            decoder.step(torch.ones(1, dtype=torch.long), cache)
    assert switches == [True] * 8


# ---------------------------------------------------------------------------------------------------------
# Positions and the cache


@torch.inference_mode()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("where", [2, 79, 80, 10_000_000])
def test_explicit_positions(any_model, where, static):
    """80 positions have angles in the table; others are computed."""
    ids = torch.randint(0, V, (2, 7))
    decoder, cache = Decoder(any_model, graph=static), KVCache(any_model.config.n_layer, 9)
    decoder.extend(ids[:, :6], cache)
    logits = decoder.stepper(cache)(ids[:, 6], positions=where)
    at = torch.tensor([0, 1, 2, 3, 4, 5, where])
    cos, sin = rotary_cos_sin(at, any_model.config.n_embd // any_model.config.n_head)
    expected = any_model(ids, cos_sin=(cos[None, :, None, :], sin[None, :, None, :]))[:, -1]
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert cache.pos == 7
    if where != 2:
        assert not torch.allclose(logits, naive(any_model, ids), atol=1e-3)  # positions do matter


@torch.inference_mode()
def test_a_chunk_at_explicit_positions(any_model):
    ids = torch.randint(0, V, (2, 9))
    decoder, cache = Decoder(any_model), KVCache(any_model.config.n_layer, 9)
    decoder.extend(ids[:, :4], cache, positions=100)
    logits = decoder.extend(ids[:, 4:], cache, positions=104)
    cos, sin = rotary_cos_sin(torch.arange(100, 109), any_model.config.n_embd // any_model.config.n_head)
    cos_sin = cos[None, :, None, :], sin[None, :, None, :]
    torch.testing.assert_close(logits, any_model(ids, cos_sin=cos_sin)[:, -1], **CLOSE)


EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("chunk"), st.integers(2, 6)),
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("truncate"), st.integers(-2, 8)),
        st.tuples(st.just("repeat"), st.integers(2, 3)),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(edits=EDITS, name=st.sampled_from(sorted(CONFIGS)), static=st.booleans(), seed=st.integers(0, 9))
def test_any_history_equals_reading_what_is_left_of_it(edits, name, static, seed):
    model, generator = make(name), torch.Generator().manual_seed(seed)
    decoder, cache = Decoder(model, graph=static), KVCache(model.config.n_layer, 3)
    new = lambda T: torch.randint(0, V, (len(ids), T), generator=generator)  # noqa: E731
    ids = torch.zeros(1, 0, dtype=torch.long)
    ids = new(2)
    decoder.extend(ids, cache)
    step = decoder.stepper(cache)
    for edit, n in edits:
        if edit == "truncate":
            truncated(cache, max(1, cache.pos - n))  # n < 0: nothing to forget
            ids = ids[:, : cache.pos]
        elif edit == "repeat" and len(ids) == 1:
            cache.repeat(n)
            ids = ids.expand(n, -1)
        elif edit == "chunk":
            ids = torch.cat((ids, new(n)), dim=1)
            logits = decoder.extend(ids[:, -n:], cache)
            torch.testing.assert_close(logits, naive(model, ids), **CLOSE)
        elif edit == "step":
            for _ in range(n):
                ids = torch.cat((ids, new(1)), dim=1)
                torch.testing.assert_close(step(ids[:, -1]), naive(model, ids), **CLOSE)
    assert cache.pos == ids.size(1) <= cache.capacity


@torch.inference_mode()
def test_static_step_is_recorded_again_only_when_the_cache_has_moved(model, monkeypatch):
    recorded = []
    record = StaticStep._record
    monkeypatch.setattr(StaticStep, "_record", lambda self: (recorded.append(self.cache.pos), record(self)))
    cache, ids = KVCache(2, 8), torch.randint(0, V, (3, 40))
    decoder = Decoder(model, graph=True)
    decoder.extend(ids[:, :5], cache)
    cache.data[..., 5:, :] = torch.nan  # memory that nobody has written to yet
    step = decoder.stepper(cache)
    for t in range(5, 40):
        logits = step(ids[:, t])
        assert not logits.isnan().any()
    torch.testing.assert_close(logits, naive(model, ids), **CLOSE)
    assert recorded == [5, 8, 16, 32]
    kept = logits.clone()
    truncated(cache, 20)
    step(ids[:, 0])
    assert torch.equal(logits, kept)  # what a step returned stays
    assert recorded == [5, 8, 16, 32]


@pytest.mark.parametrize("static", [False, True])
def test_positions_run_out(model, tokenizer, static):
    assert model.max_seq_len == 80
    engine = Engine(model, tokenizer, graph=static)
    ids = columns(engine, [5] * 77, 1, None, temperature=0)
    expected = list(likeliest(model, [5] * 77, 4))
    assert not set(expected) & ends(tokenizer)  # or this test would test nothing
    assert [token for (token,) in ids] == expected  # after 77, 78, 79 and 80 tokens, and no more
    assert len(columns(engine, [5] * 80, 2, 9, temperature=0)) == 1
    assert engine.generate_batch([5] * 77, max_tokens=10**12, temperature=0)[0] == [[5] * 77 + expected]
    with pytest.raises(UserError, match="81 tokens, more than the 80 positions of this model: shorten it"):
        columns(engine, [5] * 81)
    session = CacheSession(Decoder(model, graph=static))
    session.prefill([5] * 80)
    assert session.step(torch.tensor([1])) is None
    with pytest.raises(ValueError, match="81 tokens are more than the 80 positions"):
        session.decoder.stepper(session.cache)(torch.tensor([1]))


# ---------------------------------------------------------------------------------------------------------
# Sampling


def surprise(counts, probabilities):
    """χ² of the counts {id: n} in standard deviations above what is expected; rare ids are taken as one."""
    n = sum(counts.values())
    cells, rare = [], [0, 0.0]
    for i, p in enumerate(probabilities.double().tolist()):
        if n * p >= 8:
            cells.append((counts.get(i, 0), n * p))
        else:
            rare = [rare[0] + counts.get(i, 0), rare[1] + n * p]
    if rare[1] >= 8:
        cells.append(tuple(rare))
    elif rare[0] > rare[1] + 6 * math.sqrt(rare[1] + 1):
        return math.inf
    assert len(cells) > 4  # or there would be nothing to compare
    chi2 = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    return (chi2 - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


def probabilities(logits, temperature, top_k):
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return (logits / temperature).softmax(-1)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, None), (1.0, 7), (1.5, 12)])
def test_rows_are_drawn_independently_from_the_naive_distribution(tokenizer, temperature, top_k):
    model, rows = make("grouped", seed=4, sharpness=3.0), 3000
    first, second, third = columns(Engine(model, tokenizer), [11, 12, 13], rows, 3, temperature, top_k, seed=1)
    exact = lambda *ids: probabilities(naive(model, torch.tensor([[11, 12, 13, *ids]]))[0], temperature, top_k)  # noqa: E731
    assert surprise(Counter(first), exact()) < 5
    (a, n), *_ = Counter(first).most_common()
    assert n > 100
    assert surprise(Counter(y for x, y in zip(first, second, strict=True) if x == a), exact(a)) < 5
    pairs = list(zip(first, second, third, strict=True))
    (a, b), n = Counter((x, y) for x, y, _ in pairs).most_common()[0]
    if n > 100:
        assert surprise(Counter(z for x, y, z in pairs if (x, y) == (a, b)), exact(a, b)) < 5
    wrong = probabilities(naive(model, torch.tensor([[11, 12, 14]]))[0], temperature, top_k)
    assert surprise(Counter(first), wrong.clamp_min(1e-9)) > 5  # the measure can tell distributions apart
    if top_k:
        assert len(set(first)) <= top_k


def test_seeds(engine):
    draw = lambda seed: columns(engine, [1, 2], 8, 6, seed=seed)  # noqa: E731
    assert draw(3) == draw(3) != draw(4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(torch.get_rng_state(), state)  # the program's own random numbers stay as they were


def test_all_settings_of_sampling_count(engine):
    """What the sampler does is held in test_sampling.py; here, that it is told of prompt, answer and settings."""
    options = {"temperature": 0, "logit_bias": {7: 40.0, 8: 39.0}}
    drawn = [column for column, _ in engine.generate([1, 7], 2, 6, frequency_penalty=10.0, **options)]
    assert drawn == [[7, 7], [8, 8], [7, 7], [8, 8], [7, 7], [8, 8]]
    drawn = [column for column, _ in engine.generate([1, 7], 1, 1, repetition_penalty=4.0, **options)]
    assert drawn == [[8]]  # 7 was in the prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": []}, "at least one token"),
        ({"num_samples": 0}, "num_samples must be 1 or more, got 0"),
        ({"max_tokens": -1}, "max_tokens must be 0 or more, or None for no limit, got -1"),
        ({"temperature": -0.5}, "temperature: expected 0 or more"),
        ({"temperature": math.nan}, "temperature: expected 0 or more"),
        ({"top_k": -1}, "top_k: expected 0 or more"),
    ],
)
def test_arguments_that_make_no_sense(engine, arguments, message):
    with pytest.raises(ValueError, match=message):
        next(engine.generate(**{"tokens": [1]} | arguments))


def test_arguments_at_their_limits(engine):
    assert columns(engine, [1], 2, 0) == []
    assert len(columns(engine, [1], 2, 1)) == 1
    assert columns(engine, [1], 2, 5, top_k=0) == columns(engine, [1], 2, 5, top_k=None)
    assert columns(engine, [1], 2, 5, top_k=1) == columns(engine, [1], 2, 5, temperature=0)
    columns(engine, [1], 2, 5, top_k=10**6)


# ---------------------------------------------------------------------------------------------------------
# Sessions, tools, the end


class Script:
    """A session in which row i 'says' the tokens of rows[i] one after another (the last for ever), n steps long."""

    wish = None

    def __init__(self, rows, steps=1000):
        self.rows, self.steps, self.seen = rows, steps, []

    def prefill(self, tokens):
        self.seen.append(tokens)
        return self._logits(0)

    def read(self, ids):
        self.seen.append(ids.tolist())
        t = len(self.seen) - 1
        return self._logits(t) if t < self.steps else None

    def _logits(self, t):
        logits = torch.zeros(len(self.rows), V)
        for i, row in enumerate(self.rows):
            logits[i, row[min(t, len(row) - 1)]] = 1000.0
        return logits


def test_tool_answers_are_forced_row_by_row(engine, tokenizer):
    special, encode = tokenizer.encode_special, tokenizer.encode
    start, end = special("<|python_start|>"), special("<|python_end|>")
    stop, [x] = special("<|assistant_end|>"), encode("x")
    answer = lambda text: [special("<|output_start|>"), *encode(text), special("<|output_end|>")]  # noqa: E731
    call = lambda text: [start, *encode(text), end]  # noqa: E731
    first, late, nine = answer("144"), answer("3"), answer("9")
    scripts = [
        # what the row samples; x where something else will be forced
        [*call("12*12"), *[x] * len(first), *call("4+5"), *[x] * len(nine), stop],
        [*[x] * 6, *call("1+2"), *[x] * len(late), stop],
        [*call("import os"), *[x] * 3, end, x, stop],  # not for the calculator; an end without a start
        [start, start, *encode("4+5"), end, *[x] * len(nine), stop],
    ]
    expected = [
        [(call("12*12"), 1), (first, 0), (call("4+5"), 1), (nine, 0)],
        [([x] * 6, 1), (call("1+2"), 1), (late, 0)],
        [(scripts[2][:-1], 1)],
        [([start, start, *encode("4+5"), end], 1), (nine, 0)],
    ]
    session = Script(scripts)
    ids, masks = engine.generate_batch([5, 6], 4, temperature=0, session=session)
    assert ids == [[5, 6, *(i for part, _ in row for i in part)] for row in expected]
    assert masks == [[0, 0, *(m for part, m in row for _ in part)] for row in expected]
    width = max(map(len, ids)) - 2
    assert session.seen[0] == [5, 6]
    assert [row[0] for row in session.seen[1:]] == (ids[0] + [stop] * width)[2 : 2 + len(session.seen) - 1]
    sampled = engine.generate_batch([5, 6], 4, temperature=1.0, top_k=3, session=Script(scripts))
    assert sampled == (ids, masks)  # forced tokens do not depend on how the rest is chosen


def test_generation_ends_with_the_last_row(engine, tokenizer):
    stop, bos = tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()
    rows = [[1, stop, 2, 2, 2], [3, 3, 3, bos, 4], [bos]]
    assert columns(engine, [9], 3, session=Script(rows)) == [[1, 3, bos], [stop, 3, bos], [2, 3, bos], [2, bos, bos]]
    ids, masks = engine.generate_batch([9], 3, session=Script(rows))
    assert ids == [[9, 1], [9, 3, 3, 3], [9]]
    assert masks == [[0, 1], [0, 1, 1, 1], [0]]
    assert len(columns(engine, [9], 3, max_tokens=2, session=Script(rows))) == 2


def test_what_ends_a_turn_is_said_in_one_place(model, tokenizer, monkeypatch):
    """Generation, what is shown of it and the columns of all rows follow the tokenizer."""
    [x, y] = tokenizer.encode("xy")
    assert tokenizer.turn_ends == {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
    monkeypatch.setattr(type(tokenizer), "turn_ends", frozenset([y]))
    engine, rows = Engine(model, tokenizer), [[x, x, y, x], [x, y, x, x]]
    assert columns(engine, [9], 2, session=Script(rows)) == [[x, x], [x, y], [y, x]]
    assert engine.generate_batch([9], 2, session=Script(rows))[0] == [[9, x, x], [9, x]]
    shown = stream_parts(tokenizer, engine.generate([9], session=Script(rows[:1])))
    assert list(shown) == [("text", "x")] * 2


def test_a_session_without_room_ends_generation(engine):
    assert columns(engine, [9], 2, session=Script([[1], [2]], steps=3)) == [[1, 2]] * 3


def test_a_session_of_another_size_is_refused(engine):
    with pytest.raises(ValueError, match="the session has 3 rows, num_samples is 2"):
        columns(engine, [9], 2, session=Script([[1], [2], [3]]))


def test_a_session_is_handed_in(model, engine):
    session = CacheSession(Decoder(model), rows=3)
    assert columns(engine, [1, 2, 3], 3, 9, session=session) == columns(engine, [1, 2, 3], 3, 9)
    assert session.cache.pos == 3 + 8  # the last token was not read
    assert columns(engine, [4], 3, 2, session=session) == columns(engine, [4], 3, 2)  # a new prompt starts afresh


@pytest.mark.parametrize("graph", [False, True])
def test_closing_frees_the_cache(model, tokenizer, monkeypatch, graph):
    caches = []

    class Watched(KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(weakref.ref(self))

    def alive():
        return [cache() is not None for cache in caches]

    monkeypatch.setattr("nanochat.kv_cache.KVCache", Watched)
    engine = Engine(model, tokenizer, graph=graph)
    gc.disable()  # at once, not when the collector comes by
    try:
        running = engine.generate([1, 2], 4, 30)
        next(running)
        next(running)
        assert alive() == [True]
        running.close()
        assert alive() == [False]
        columns(engine, [1, 2], 4, 3)
        assert alive() == [False, False]
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------------------
# Weights that change


def optimize(which):
    """One step of optimizers of training: AdamW's fused step does not count as a change of its parameters' versions."""

    def change(model):
        optimizers = model.setup_optimizers(unembedding_lr=1.0, matrix_lr=0.3)
        ids = torch.randint(0, V, (4, 8))
        model(ids[:, :-1], ids[:, 1:]).backward()
        for optimizer in optimizers[which]:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return change


def load(model, **kwargs):
    model.load_state_dict(make("plain", seed=5).state_dict(), **kwargs)


def flip(model):
    model.transformer.h[0].mlp.c_fc.weight.mul_(-1)


def use(data):
    def change(model):
        model.lm_head.weight.data = data(model.lm_head.weight.data)

    return change


CHANGES = {
    "AdamW": optimize(slice(0, 1)),
    "Muon": optimize(slice(1, 2)),
    "load_state_dict": load,
    "load_state_dict, assign": lambda model: load(model, assign=True),
    "in place": torch.no_grad()(flip),
    "in inference mode": torch.inference_mode()(flip),
    "other data": use(lambda data: -data),
    "other data of the same storage": use(lambda data: data.as_strided(data.shape, data.stride(), data.numel())),
    "other precision": lambda model: model.bfloat16(),
    "to another precision and back": lambda model: model.bfloat16().float(),
}


@pytest.fixture
def laid_out(monkeypatch):
    """A list that grows with each Decoder that is made."""
    made, real = [], Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *args: (made.append(weakref.ref(self)), real(self, *args))[1])
    return made


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_used(tokenizer, laid_out, change):
    """Weights are laid out once, and again as soon as they have changed; those before are gone by then."""
    model = make("plain")
    use(lambda data: torch.stack((data, 2 * data))[0])(model)
    engine = Engine(model, tokenizer)
    before, logits = columns(engine, [1, 2], 8, 10), CacheSession(engine.decoder).prefill([1, 2])
    assert columns(engine, [1, 2], 8, 10) == before
    assert len(laid_out) == 1
    change(model)
    after = columns(engine, [1, 2], 8, 10)
    assert [decoder() is not None for decoder in laid_out] == [False, True]
    assert not torch.equal(CacheSession(engine.decoder).prefill([1, 2]), logits)  # rounding alone may change no sample
    assert after == columns(Engine(model, tokenizer), [1, 2], 8, 10)
    if model.lm_head.weight.dtype == torch.float32:
        best = columns(engine, [1, 2], 1, 10, temperature=0)
        assert best == [[token] for token in likeliest(model, [1, 2], len(best))]


def test_tensors_of_inference_mode_have_no_versions_and_are_laid_out_each_time(tokenizer):
    with torch.inference_mode():
        model = make("plain")
    engine = Engine(model, tokenizer)
    before = CacheSession(engine.decoder).prefill([1, 2])
    CHANGES["in inference mode"](model)
    assert not torch.equal(CacheSession(engine.decoder).prefill([1, 2]), before)


def test_the_version_of_weights_is_one_while_nothing_changes(model, tokenizer, laid_out):
    """Reading, generating, training something else in part: nothing is laid out anew; a step of an optimizer may be."""
    engine = Engine(model, tokenizer)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        with autocast(CPU, dtype):
            columns(engine, [1, 2], 2, 3)
            columns(engine, [1, 2], 2, 3)
    assert len(laid_out) == 3  # once for each precision
    model(torch.ones(1, 3, dtype=torch.long)).sum().backward()
    model.zero_grad()
    model.state_dict()
    columns(engine, [1, 2], 2, 3)
    assert len(laid_out) == 3


def test_a_decoder_can_be_shared_by_sessions(model, engine):
    decoder = Decoder(model)
    for prompt in ([1, 2, 3], [4]):
        session = CacheSession(decoder, 2, 9)
        assert columns(engine, prompt, 2, 9, session=session) == columns(engine, prompt, 2, 9)


def test_two_engines_in_one_process(tokenizer):
    one, two = (Engine(make("plain", seed=seed), tokenizer) for seed in (1, 2))
    alone = [columns(engine, [1], 2, 12) for engine in (one, two)]
    together = list(zip(one.generate([1], 2, 12), two.generate([1], 2, 12), strict=True))
    assert [[a for (a, _), _ in together], [b for _, (b, _) in together]] == alone


def test_the_end_can_be_kept(tokenizer):
    """The same rows, each with the token that ended it behind."""
    engine = Engine(make("plain"), tokenizer)
    options = {"max_tokens": 40, "temperature": 1.5, "seed": 3}
    rows, masks = engine.generate_batch([1, 2], 16, **options)
    kept, kept_masks = engine.generate_batch([1, 2], 16, keep_end=True, **options)
    ended = 0
    for row, mask, whole, whole_mask in zip(rows, masks, kept, kept_masks, strict=True):
        assert whole[: len(row)] == row
        assert whole_mask[: len(mask)] == mask
        if len(whole) > len(row):
            ended += 1
            assert whole[len(row) :][0] in ends(tokenizer)
            assert whole_mask[len(row) :] == [1]
        else:
            assert len(row) == 42
    assert ended > 0
