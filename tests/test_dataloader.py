"""TokenLoader against a slow loader in plain Python; its position, its shares, its thread."""

import gc
import itertools
import json
import math
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.dataloader import TokenLoader
from tests.helpers import ROOT

BOS = 256


class ByteTokenizer:
    """One token a byte, by a real tiktoken.Encoding; remembers the texts of each call."""

    def __init__(self):
        ranks = {bytes([byte]): byte for byte in range(256)}
        self.enc = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|bos|>": BOS})
        self.calls = []

    def get_bos_token_id(self):
        return BOS

    def encode_to_numpy(self, texts, num_threads):
        self.calls.append(texts)
        return [self.enc.encode_to_numpy(text, disallowed_special=()) for text in texts]


def write_split(folder, files):
    """Shards of a split: files -> row groups -> texts. The other split gets a text of its own."""
    for index, groups in enumerate([*files, [["validation"]]]):
        with pq.ParquetWriter(folder / f"shard_{index:05d}.parquet", pa.schema([("text", pa.string())])) as writer:
            for group in groups:
                writer.write_table(pa.table({"text": pa.array(group, pa.string())}))


def reference(groups, B, T, rank=0, world_size=1):
    """Yield (x, y) as lists of rows, from a list of row groups: the same by the simplest means."""

    def stream():
        while True:
            for group in groups[rank::world_size]:
                for text in group:
                    yield BOS
                    yield from text.encode()

    tokens = stream()
    window = [next(tokens)]
    while True:
        window += itertools.islice(tokens, B * T)
        x, y = window[:-1], window[1:]
        yield [x[i * T : (i + 1) * T] for i in range(B)], [y[i * T : (i + 1) * T] for i in range(B)]
        window = window[-1:]


def make_groups(lengths, seed=0):
    """Row groups of random text, given as lists of lengths of texts."""
    letters = np.random.default_rng(seed)
    return [["".join(map(chr, letters.integers(97, 123, n))) for n in group] for group in lengths]


FILES = [
    make_groups([[5, 0, 9], [1, 2], [30]], 1),
    make_groups([[7], [3, 3, 3]], 2),
    make_groups([[], [11]], 3),
]
GROUPS = [[text for text in group if text] for file in FILES for group in file if group]


@pytest.fixture
def data_dir(tmp_path):
    write_split(tmp_path, FILES)
    return tmp_path


def take(loader, count):
    return [(x.tolist(), y.tolist()) for x, y in itertools.islice(loader, count)]


def live_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("TokenLoader")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert not live_threads()


# ---------------------------------------------------------------------------------------------------------
# What comes out


def test_batches_by_hand(tmp_path):
    write_split(tmp_path, [[["ab", "c"]]])
    with TokenLoader(ByteTokenizer(), 1, 3, "train", data_dir=tmp_path) as loader:
        (x, y), (x2, y2) = next(loader), next(loader)
    a, b, c = b"abc"
    assert x.tolist() == [[BOS, a, b]]
    assert y.tolist() == [[a, b, BOS]]
    assert x2.tolist() == [[BOS, c, BOS]]  # the second document, then the next epoch
    assert y2.tolist() == [[c, BOS, a]]
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=4), min_size=1, max_size=5),
    B=st.integers(1, 4),
    T=st.integers(1, 9),
    world_size=st.integers(1, 3),
    threads=st.integers(1, 3),
    prefetch=st.integers(1, 5),
)
def test_equals_the_reference(lengths, B, T, world_size, threads, prefetch):
    lengths = lengths + [[1]] * world_size  # enough row groups, and none of the shares empty
    lengths += lengths[:1] * (-len(lengths) % world_size)
    groups = make_groups(lengths)
    groups = [group if any(group) else ["x"] for group in groups]
    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder), [groups[:2], groups[2:]])
        kept = [[text for text in group if text] for group in groups]
        for rank in range(world_size):
            with TokenLoader(
                ByteTokenizer(), B, T, "train", data_dir=folder, ranks=[rank], world_size=world_size,
                tokenizer_threads=threads, prefetch=prefetch,
            ) as loader:  # fmt: skip
                count = math.ceil(2.5 * sum(map(len, itertools.chain(*kept))) / (B * T)) + 1
                assert take(loader, count) == [
                    (x, y) for x, y in itertools.islice(reference(kept, B, T, rank, world_size), count)
                ]


def test_shuffled_pieces(tmp_path):
    """Each epoch has every piece of a row group once, in another order; and it can be resumed at any place."""
    groups = make_groups([[40, 25], [31]])
    write_split(tmp_path, [groups])

    def pieces(group):
        tokens = [token for text in group for token in (BOS, *text.encode())]
        return [tokens[i : i + 8] for i in range(0, len(tokens), 8)]

    options = {"data_dir": tmp_path, "piece": 8}
    with TokenLoader(ByteTokenizer(), 1, 1, "train", **options) as loader:
        stream = [next(loader)[0].item() for _ in range(2 * (67 + 32))]
    orders = []
    for _ in range(2):
        for group in groups:
            left = pieces(group)
            orders.append([])
            while left:
                piece = next(piece for piece in left if stream[: len(piece)] == piece)
                left.remove(piece)
                orders[-1].append(piece)
                stream = stream[len(piece) :]
    assert orders[0] != orders[2] != pieces(groups[0]) != orders[0]
    with TokenLoader(ByteTokenizer(), 2, 3, "train", **options) as loader:
        take(loader, 13)
        state = loader.state_dict()
        with TokenLoader(ByteTokenizer(), 2, 3, "train", state=state, **options) as resumed:
            assert take(resumed, 20) == take(loader, 20)


def test_validation_split_repeats_for_ever(data_dir):
    with TokenLoader(ByteTokenizer(), 2, 4, "val", data_dir=data_dir) as loader:
        assert take(loader, 50) == list(itertools.islice(reference([["validation"]], 2, 4), 50))


def test_ranks_share_the_data_completely(data_dir):
    """Over one epoch each token is predicted by exactly one rank."""
    seen = []
    for rank in range(3):
        size = sum(1 + len(text) for group in GROUPS[rank::3] for text in group)
        with TokenLoader(ByteTokenizer(), 1, size, "train", data_dir=data_dir, ranks=[rank], world_size=3) as loader:
            (x, y) = next(loader)
            assert loader.state_dict()[0]["epoch"] == 1
        documents = bytes(token if token < 256 else 0 for token in x[0].tolist()).split(b"\0")[1:]
        seen += [document.decode() for document in documents]
        assert y[0, -1] == BOS  # of the first document again
    assert sorted(seen) == sorted(text for group in GROUPS for text in group)


def test_rank_comes_from_the_environment(data_dir, monkeypatch):
    for key, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    with TokenLoader(ByteTokenizer(), 1, 4, "train", data_dir=data_dir) as loader:
        assert take(loader, 5) == list(itertools.islice(reference(GROUPS, 1, 4, 1, 2), 5))


def test_special_token_text_stays_text(tmp_path):
    write_split(tmp_path, [[["<|bos|>"]]])
    with TokenLoader(ByteTokenizer(), 1, 8, "train", data_dir=tmp_path) as loader:
        assert next(loader)[0].tolist() == [[BOS, *b"<|bos|>"]]


# ---------------------------------------------------------------------------------------------------------
# Position


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_restores_exactly_anywhere(data_dir, world_size, seed):
    random = np.random.default_rng(seed)
    B, T = int(random.integers(1, 4)), int(random.integers(1, 8))
    for rank in range(world_size):
        options = {"data_dir": data_dir, "ranks": [rank], "world_size": world_size}
        with TokenLoader(ByteTokenizer(), B, T, "train", **options) as unbroken:
            batches, states = [], []
            for _ in range(60):
                states.append(json.loads(json.dumps(unbroken.state_dict())))
                batches += take(unbroken, 1)
        assert states[-1][0]["epoch"] >= 1
        for cut in random.integers(0, 58, 12):
            with TokenLoader(ByteTokenizer(), B, T, "train", state=states[cut], **options) as restored:
                assert restored.state_dict() == states[cut]
                assert take(restored, 2) == batches[cut : cut + 2]
                assert restored.state_dict() == states[cut + 2]


@pytest.mark.parametrize("seed", range(8))
def test_fresh_rows_against_lists(tmp_path, seed):
    """Rows in which a text begins, in pieces or not; a restored loader knows it, and the batches stay the same."""
    random = np.random.default_rng(seed)
    groups = make_groups([[17, 9], [40], [3], [25, 8]], seed)
    write_split(tmp_path, [groups])
    B, T = int(random.integers(1, 4)), int(random.integers(1, 8))
    piece = int(random.integers(3, 14)) if seed % 2 else 0
    stream, begins = [], set()
    for epoch in range(3):
        for number, group in enumerate(groups):
            tokens = [token for text in group for token in (BOS, *text.encode())]
            starts = range(0, len(tokens), piece or len(tokens))
            order = np.random.default_rng((epoch, number)).permutation(starts).tolist() if piece else starts
            for start in order:
                begins.add(len(stream))
                stream += tokens[start : start + (piece or len(tokens))]
    begins |= {i for i, token in enumerate(stream) if token == BOS}

    def expected(row):
        return any(token in begins for token in range(row * T, (row + 1) * T))

    options = {"data_dir": tmp_path, "piece": piece}
    count = len(stream) // (B * T) - 1
    with TokenLoader(ByteTokenizer(), B, T, "train", **options) as loader:
        states = []
        for batch in range(count):
            states.append(loader.state_dict())
            x, _ = next(loader)
            assert x.flatten().tolist() == stream[batch * B * T : (batch + 1) * B * T]
            assert loader.fresh.tolist() == [expected(batch * B + row) for row in range(B)]
    for batch in range(count):
        with TokenLoader(ByteTokenizer(), B, T, "train", state=states[batch], **options) as restored:
            next(restored)
            assert restored.fresh.tolist() == [expected(batch * B + row) for row in range(B)]


def test_batches_read_ahead_do_not_count(data_dir):
    with TokenLoader(ByteTokenizer(), 1, 4, "train", data_dir=data_dir, prefetch=8) as loader:
        next(loader)
        wait(loader._ahead)
        assert loader.state_dict() == [{"epoch": 0, "row_group": 0, "token": 4, "rank": 0, "world_size": 1}]


def test_restoring_tokenizes_nothing_that_was_consumed(data_dir):
    state = {"epoch": 5, "row_group": 3, "token": 2, "rank": 0, "world_size": 1}
    tokenizer = ByteTokenizer()
    with TokenLoader(tokenizer, 1, 2, "train", state=[state], data_dir=data_dir) as loader:
        assert take(loader, 1)[0][0] == [[*GROUPS[3][0].encode()[1:3]]]
    assert tokenizer.calls[0] == GROUPS[3]


def test_the_shape_of_batches_may_change_between(data_dir):
    with TokenLoader(ByteTokenizer(), 2, 6, "train", data_dir=data_dir) as loader:
        take(loader, 3)
        state, (x, _) = loader.state_dict(), next(loader)
    with TokenLoader(ByteTokenizer(), 4, 3, "train", state=state, data_dir=data_dir) as loader:
        assert next(loader)[0].flatten().tolist() == x.flatten().tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 2}, "rank 0 of 2, this is rank 0 of 1: resume with as many processes"),
        ({"row_group": 99}, "row group 99 of 6"),
        ({"token": 999}, "token 999 of a row group that has 16"),
    ],
)
def test_a_state_of_other_data_is_refused(data_dir, change, message):
    state = {"epoch": 0, "row_group": 0, "token": 0, "rank": 0, "world_size": 1} | change
    with pytest.raises(UserError, match=message):
        next(TokenLoader(ByteTokenizer(), 1, 4, "train", state=[state], data_dir=data_dir))


def test_streams_take_turns_on_one_thread(data_dir):
    """As if each had a loader of its own, without its threads; and they are resumed together."""
    at_work, most = [], []

    class Watched(ByteTokenizer):
        def encode_to_numpy(self, texts, num_threads):
            at_work.append(num_threads)
            most.append(sum(at_work))
            time.sleep(0.001)
            ids = super().encode_to_numpy(texts, num_threads)
            at_work.remove(num_threads)
            return ids

    options = {"data_dir": data_dir, "world_size": 6}
    alone = []
    for rank in range(6):
        with TokenLoader(ByteTokenizer(), 1, 4, "train", ranks=[rank], **options) as loader:
            alone.append(take(loader, 20))
    with TokenLoader(Watched(), 1, 4, "train", ranks=range(6), **options) as loader:
        assert take(loader, 60) == [batch for turn in list(zip(*alone, strict=True))[:10] for batch in turn]
        assert len(live_threads()) == 1
        state = loader.state_dict()
    assert max(most) <= 4
    with TokenLoader(ByteTokenizer(), 1, 4, "train", state=state, ranks=range(6), **options) as loader:
        assert take(loader, 60) == [batch for turn in list(zip(*alone, strict=True))[10:] for batch in turn]


# ---------------------------------------------------------------------------------------------------------
# Faults, and the end of the thread


def test_missing_or_little_data_is_said_at_once(tmp_path, data_dir):
    with pytest.raises(UserError, match=r"python -m nanochat\.dataset"):
        TokenLoader(ByteTokenizer(), 1, 4, "train", data_dir=tmp_path / "nowhere")
    with pytest.raises(UserError, match="6 row groups, too few for 7 streams or processes"):
        TokenLoader(ByteTokenizer(), 1, 4, "train", data_dir=data_dir, ranks=[0], world_size=7)


def test_a_split_without_text_does_not_hang(tmp_path):
    write_split(tmp_path, [[[None, ""], [""]]])
    with pytest.raises(UserError, match="no text in row groups 0, 1"):
        next(TokenLoader(ByteTokenizer(), 1, 4, "train", data_dir=tmp_path))


def test_an_error_in_the_thread_reaches_the_consumer(data_dir):
    class Breaks(ByteTokenizer):
        def encode_to_numpy(self, texts, num_threads):
            if len(self.calls) == 2:
                raise RuntimeError("tokenizer broke")
            return super().encode_to_numpy(texts, num_threads)

    loader = TokenLoader(Breaks(), 1, 4, "train", data_dir=data_dir)
    good = sum(1 + len(text) for group in GROUPS[:2] for text in group)
    assert take(loader, (good - 1) // 4) == list(itertools.islice(reference(GROUPS, 1, 4), (good - 1) // 4))
    for _ in range(2):  # again and again, not a wait for ever
        with pytest.raises(RuntimeError, match="tokenizer broke"):
            next(loader)


def test_a_shard_that_breaks_meanwhile_is_named(data_dir):
    with TokenLoader(ByteTokenizer(), 1, 4, "train", data_dir=data_dir, prefetch=1) as loader:
        next(loader)
        (data_dir / "shard_00001.parquet").write_bytes(b"")
        with pytest.raises(UserError, match=r"shard_00001\.parquet.*delete it"):
            take(loader, 100)


def test_close_ends_the_thread_promptly(data_dir):
    loader = TokenLoader(ByteTokenizer(), 1, 4, "train", data_dir=data_dir, prefetch=1)
    next(loader)
    assert live_threads()
    start = time.monotonic()
    loader.close()
    assert not live_threads()
    assert time.monotonic() - start < 2
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_a_dropped_loader_takes_its_thread_along(data_dir):
    loader = TokenLoader(ByteTokenizer(), 1, 4, "train", data_dir=data_dir, prefetch=1)
    next(loader)
    assert live_threads()
    del loader
    gc.collect()
    deadline = time.monotonic() + 2
    while live_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not live_threads()


def test_a_program_ends_with_a_loader_open(data_dir):
    code = f"""
        from tests.test_dataloader import ByteTokenizer, TokenLoader
        loader = TokenLoader(ByteTokenizer(), 1, 4, "train", data_dir={str(data_dir)!r})
        print(next(loader)[0].shape)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "torch.Size([1, 4])\n"
    assert not result.stderr


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True), ("cuda:0", True)])
def test_memory_is_pinned_for_any_cuda_device(data_dir, monkeypatch, device, pinned):
    asked, empty = [], torch.empty

    def recording_empty(*size, pin_memory=False, **options):
        asked.append(pin_memory)
        return empty(*size, **options)

    monkeypatch.setattr(dataloader.torch, "empty", recording_empty)
    loader = TokenLoader(ByteTokenizer(), 1, 4, "train", device=device, data_dir=data_dir)
    wait(loader._ahead, timeout=10)
    loader.close()
    assert any(asked) == pinned
