"""The sampler against a slow reference that does one row at a time, in Python's own numbers."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import sampling
from nanochat.ranges import check
from nanochat.sampling import Sampler, Sampling, logprobs, row_seed

V = 24
MASK = 2**64 - 1


def adjusted(logits, settings, prompt, answer):
    """One row's logits after penalties and biases."""
    result = []
    for id, logit in enumerate(logits):
        if id in prompt or id in answer:
            r = settings.repetition_penalty
            logit = logit / r if logit > 0 else logit * r
        logit -= settings.frequency_penalty * answer.count(id) + settings.presence_penalty * (id in answer)
        result.append(logit + settings.logit_bias.get(id, 0.0))
    return result


def remaining(logits, settings):
    """{id: logit / temperature} of one row's tokens that may be drawn."""
    order = sorted(range(len(logits)), key=lambda id: -logits[id])
    if settings.temperature < 1e-5:
        return {order[0]: 0.0}
    left = {id: logits[id] / settings.temperature for id in order[: settings.top_k or len(logits)]}
    best = max(left.values())
    total = sum(math.exp(value - best) for value in left.values())
    kept, before = {}, 0.0
    for id, value in left.items():
        if before < settings.top_p or settings.top_p == 1:
            kept[id] = value
        before += math.exp(value - best) / total
    return {id: value for id, value in kept.items() if settings.min_p == 0 or math.exp(value - best) >= settings.min_p}


def mix(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def draw(left, seed, step):
    """The token that one row gets, and by how much it beats the next one."""
    key = mix(mix(seed & MASK) + step * sampling.GOLDEN & MASK)

    def noise(id):
        uniform = ((mix(key + id * sampling.GOLDEN & MASK) & MASK >> 1) + 0.5) / 2**63
        return -math.log(-math.log1p(-min(uniform, 1 - 2**-24)))

    scores = sorted(((value + noise(id), id) for id, value in left.items()), reverse=True)
    return scores[0][1], scores[0][0] - scores[1][0] if len(scores) > 1 else math.inf


def test_the_hash_is_splitmix64():
    """The first numbers of Vigna's generator with seed 1234567, as published with it."""
    numbers = [mix(1234567 + i * sampling.GOLDEN & MASK) for i in range(1, 4)]
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def floats(low, high):
    return st.floats(low, high, width=32)


SETTINGS = st.builds(
    Sampling,
    temperature=st.just(0.0) | floats(0.125, 2),
    top_k=st.none() | st.integers(0, V + 2),
    top_p=st.just(1.0) | floats(0.0625, 1),
    min_p=st.just(0.0) | floats(0, 1),
    repetition_penalty=st.just(1.0) | floats(0.5, 2),
    presence_penalty=st.just(0.0) | floats(-2, 2),
    frequency_penalty=st.just(0.0) | floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, V - 1), floats(-100, 100), max_size=2),
    seed=st.integers(-(2**64), 2**64),
)
PROMPTS = st.lists(st.integers(0, V - 1), max_size=3)


@pytest.fixture(autouse=True, scope="module")
def small():
    """So that a vocabulary of 24 goes every way that one of 65,536 can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "NARROW", 6)
        patch.setattr(sampling, "NUCLEUS", 8)
        yield


@given(st.lists(st.tuples(SETTINGS, PROMPTS), min_size=1, max_size=5), st.integers(0, 2**32), st.booleans())
def test_equal_to_the_reference(rows, seed, forced):
    """Each row of a batch whose settings differ gets what it gets alone, and what the reference says."""
    generator = torch.Generator().manual_seed(seed)
    batch, answers = Sampler(V), [[] for _ in rows]
    alone = [Sampler(V) for _ in rows]
    for sampler, (settings, prompt) in zip(alone, rows, strict=True):
        batch.add(settings, prompt)
        sampler.add(settings, prompt)
    for step in range(3):
        logits = 4 * torch.randn(len(rows), V, generator=generator)
        before = logits.clone()
        ids = batch(logits)
        assert torch.equal(logits, before)
        assert torch.equal(ids, torch.cat([one(logits[[i]]) for i, one in enumerate(alone)]))
        for i, (settings, prompt) in enumerate(rows):
            values = adjusted(logits[i].tolist(), settings, prompt, answers[i])
            left = remaining(values, settings)
            if on_the_edge(values, settings):
                continue
            if settings.temperature:
                scores, candidates = alone[i].groups[0].remaining(alone[i].adjusted(logits[[i]]))
                kept = scores > -torch.inf
                found = dict(zip(candidates.expand_as(scores)[kept].tolist(), scores[kept].tolist(), strict=True))
                assert found == pytest.approx(left, rel=1e-4, abs=1e-4)
            expected, margin = draw(left, settings.seed, step)
            assert ids[i] == expected or margin < 1e-3
        if forced:
            ids = torch.randint(V, (len(rows),), generator=generator)
        batch.observe(ids)
        for i, one in enumerate(alone):
            one.observe(ids[[i]])
            answers[i].append(int(ids[i]))


def on_the_edge(values, settings):
    """Whether float32 may keep other tokens than float64: because of ties, or by a hair of top_p or min_p."""
    near = [
        replace(settings, top_p=min(1.0, settings.top_p * p), min_p=min(1.0, settings.min_p * m))
        for p in (1 - 1e-5, 1 + 1e-5)
        for m in (1 - 1e-5, 1 + 1e-5)
    ]
    ordered = sorted(values)
    tied = any(high - low < 1e-4 for low, high in pairwise(ordered))
    return tied or len({frozenset(remaining(values, s)) for s in near}) > 1


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(),
        Sampling(0.5),
        Sampling(1.5, top_k=3),
        Sampling(top_k=10),
        Sampling(top_p=0.7),
        Sampling(top_k=5, top_p=0.5, min_p=0.1),
        Sampling(min_p=0.2),
    ],
)
def test_frequencies(settings):
    """Tokens come as often as their probabilities say, whether drawn by many rows or in many steps."""
    logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(1))
    left = remaining(logits.tolist(), settings)
    expected = torch.full((V,), -torch.inf)
    expected[list(left)] = torch.tensor(list(left.values()))
    sampler = Sampler(V, rows=[replace(settings, seed=row_seed(7, row)) for row in range(200)])
    counts = torch.zeros(V)
    for _ in range(100):
        ids = sampler(logits.expand(200, -1))
        sampler.observe(ids)
        counts += torch.bincount(ids, minlength=V)
    torch.testing.assert_close(counts / 20_000, expected.softmax(0), atol=0.015, rtol=0)
    assert set(counts.nonzero()[:, 0].tolist()) <= set(left)


def test_rare_tokens_are_as_rare_as_they_should_be():
    """One token of probability 1e-4 among 65,536 of 1e-4 / 65,535: the noise is fine enough for a large vocabulary."""
    logits = torch.full((65_536,), math.log(1e-4 / 65_535))
    logits[:2] = torch.tensor([math.log(1 - 2e-4), math.log(1e-4)])
    sampler = Sampler(65_536, rows=[Sampling(seed=row) for row in range(4)])
    ids = []
    for _ in range(500):
        ids.append(sampler(logits.expand(4, -1)))
        sampler.observe(ids[-1])
    assert (torch.cat(ids) > 0).sum() <= 5  # 0.4 expected


def test_a_nucleus_of_any_size():
    """Rows of which some have theirs among the best few tokens and others need all."""
    rows = [Sampling(temperature=0.1 + row / 4, top_p=0.95, seed=row) for row in range(12)]
    logits = 2 * torch.randn(12, V, generator=torch.Generator().manual_seed(0))
    sizes = [len(remaining(row.tolist(), settings)) for row, settings in zip(logits, rows, strict=True)]
    assert min(sizes) < sampling.NUCLEUS < max(sizes)
    scores, _ = _prepared(Sampler(V, rows=rows)).groups[0].remaining(logits)
    assert (scores > -torch.inf).sum(-1).tolist() == sizes


def _prepared(sampler):
    sampler.adjusted(torch.zeros(len(sampler.rows), V))
    return sampler


def test_rows_come_and_go():
    """What stays, goes on as if the others had never been there."""
    rows = [Sampling(seed=row, frequency_penalty=row % 2 * 1.5, top_k=row % 3) for row in range(6)]
    logits = torch.randn(8, 6, V, generator=torch.Generator().manual_seed(0))
    alone = []
    for i, settings in enumerate(rows):
        sampler, ids = Sampler(V), []
        sampler.add(settings, [1, 2])
        for step in logits:
            ids.append(sampler(step[[i]]))
            sampler.observe(ids[-1])
        alone.append(torch.cat(ids))
    sampler = Sampler(V)
    for settings in rows[:4]:
        sampler.add(settings, [1, 2])
    present, begun = [0, 1, 2, 3], [0] * 6
    for change in ([0, 1, 2, 3], [3, 1], [3, 1, 4, 5], [5, 3], [3]):
        sampler.keep([present.index(row) for row in change if row in present])
        for row in change:
            if row not in present:
                sampler.add(rows[row], [1, 2])
        present = change
        ids = sampler(torch.stack([logits[begun[row], row] for row in present]))
        assert ids.tolist() == [alone[row][begun[row]] for row in present]
        sampler.observe(ids)
        for row in present:
            begun[row] += 1


def test_seeds():
    assert row_seed(5, 0) == 5
    assert len({row_seed(seed, row) for seed in range(30) for row in range(30)}) == 900
    logits = torch.zeros(1, V)
    first, again, other = (Sampler(V, rows=[Sampling(seed=seed)]) for seed in (1, 1 + 2**64, 2))
    drawn = []
    for sampler in (first, again, other):
        drawn.append([])
        for _ in range(20):
            drawn[-1].append(int(sampler(logits)))
            sampler.observe(torch.tensor(drawn[-1][-1:]))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len(set(drawn[0])) > 5


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"temperature": math.nan}, "temperature: expected 0 or more, got nan"),
        ({"top_k": -1}, "top_k: expected 0 or more, got -1"),
        ({"top_p": 0.0}, "top_p: expected from 1e-09 to 1, got 0.0"),
        ({"min_p": 1.5}, "min_p: expected from 0 to 1, got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected 1e-09 or more"),
        ({"presence_penalty": math.inf}, "presence_penalty: expected"),
        ({"frequency_penalty": math.nan}, "frequency_penalty: expected"),
    ],
)
def test_settings_without_meaning(setting, rule):
    with pytest.raises(ValueError, match=rule):
        check(Sampling(**setting))


def test_as_many_logits_as_rows():
    with pytest.raises(ValueError, match="expected logits of 2 rows, got 1"):
        Sampler(V, rows=[Sampling()] * 2)(torch.zeros(1, V))


def test_logprobs():
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(3))
    chosen, (values, ids) = logprobs(logits, torch.tensor([0, 5, 9]), top=4)
    for row, id in enumerate((0, 5, 9)):
        total = math.log(sum(math.exp(value) for value in logits[row].tolist()))
        expected = sorted(((value - total, i) for i, value in enumerate(logits[row].tolist())), reverse=True)[:4]
        assert chosen[row].item() == pytest.approx(logits[row, id].item() - total, abs=1e-5)
        assert values[row].tolist() == pytest.approx([value for value, _ in expected], abs=1e-5)
        assert ids[row].tolist() == [i for _, i in expected]
