"""Shards: read, made from local text, downloaded; and what happens when any of it is broken."""

import bz2
import contextlib
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from nanochat import dataset, download, sources
from nanochat.common import UserError, locked
from nanochat.dataset import Config, iter_documents, list_parquet_files, list_row_groups, main, shard_name
from tests.helpers import ROOT

VAL = shard_name(dataset.VAL_SHARD)


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    """An empty base folder of our own."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    folder = dataset.get_data_dir()
    folder.mkdir(parents=True)
    return folder


def write_groups(path, groups, name="text", compression="zstd"):
    """A parquet file with one row group per list of texts."""
    schema = pa.schema([(name, pa.string())])
    with pq.ParquetWriter(path, schema, compression=compression, write_page_checksum=True) as writer:
        for group in groups:
            writer.write_table(pa.table({name: pa.array(group, pa.string())}, schema=schema))


def texts(split, folder=None):
    return [text for group in iter_documents(split, data_dir=folder) for text in group]


# ---------------------------------------------------------------------------------------------------------
# Reading


def test_row_groups_in_order_last_file_is_validation(data_dir):
    write_groups(data_dir / shard_name(0), [["a", "b"], ["c"]])
    write_groups(data_dir / shard_name(1), [["d"], ["e"]])
    write_groups(data_dir / shard_name(7), [["v"]])
    (data_dir / "shard_00009.parquet.part").write_bytes(b"half")
    (data_dir / "._shard_00000.parquet").write_bytes(b"macOS leaves these")
    write_groups(data_dir / "mine.parquet", [["own"]], name="content")  # as in nanochat, any name will do
    assert [path.name for path in list_parquet_files()] == ["mine.parquet", shard_name(0), shard_name(1), shard_name(7)]
    assert list(iter_documents("train")) == [["own"], ["a", "b"], ["c"], ["d"], ["e"]]
    (data_dir / "mine.parquet").unlink()
    assert list(iter_documents("val")) == [["v"]]
    with pytest.raises(UserError, match="'train' or 'val'"):
        list_row_groups("test")


def test_too_few_shards(data_dir):
    with pytest.raises(UserError, match=r"found none: run `python -m nanochat\.dataset"):
        list_parquet_files()
    write_groups(data_dir / shard_name(0), [["a"]])
    with pytest.raises(UserError, match=r"only shard_00000\.parquet"):
        list_parquet_files()


def test_nulls_are_dropped_and_empty_shards_skipped(data_dir):
    write_groups(data_dir / shard_name(0), [["a", None, ""], [], [None]])
    write_groups(data_dir / shard_name(1), [])
    write_groups(data_dir / shard_name(2), [["b"]])
    write_groups(data_dir / shard_name(3), [])
    assert list(iter_documents("train")) == [["a"], [], ["b"]]
    with pytest.raises(UserError, match=r"no rows in the val split.*shard_00003"):
        list_row_groups("val")


def test_other_string_types_are_text_too(data_dir):
    pq.write_table(pa.table({"text": pa.array(["a"], pa.large_string())}), data_dir / shard_name(0))
    pq.write_table(pa.table({"text": pa.array(["b"]).dictionary_encode()}), data_dir / shard_name(1))
    write_groups(data_dir / shard_name(2), [["v"]])
    assert texts("train") == ["a", "b"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def wrong_type(path):
    pq.write_table(pa.table({"text": [1, 2]}), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "cannot read"),
        (lambda path: path.write_bytes(b""), "cannot read"),
        (lambda path: path.write_bytes(b"<html>sign in</html>"), "cannot read"),
        (lambda path: write_groups(path, [["a"]], name="body"), "column 'text' or 'content', got .body: string"),
        (wrong_type, "column 'text' or 'content', got .text: int64"),
    ],
    ids=["truncated", "zero bytes", "not parquet", "no text column", "not strings"],
)
def test_a_broken_shard_is_named(data_dir, spoil, message):
    write_groups(data_dir / shard_name(0), [["a" * 1000]])
    write_groups(data_dir / VAL, [["v"]])
    assert texts("train")
    spoil(data_dir / shard_name(0))
    with pytest.raises(UserError, match=message) as error:
        texts("train")
    assert str(data_dir / shard_name(0)) in str(error.value)
    assert "delete it" in str(error.value) or "replace" in str(error.value)
    assert texts("val") == ["v"]  # the other split does not suffer


def test_flipped_bits_are_noticed(data_dir):
    path = data_dir / shard_name(0)
    write_groups(path, [["abcdefgh" * 100]], compression="none")  # no decompressor that would stumble
    write_groups(data_dir / VAL, [["v"]])
    content = bytearray(path.read_bytes())
    content[content.index(b"abcdefgh")] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard_00000\.parquet"):
        texts("train")


# ---------------------------------------------------------------------------------------------------------
# Shards from local text


@pytest.fixture
def notes(tmp_path):
    """A folder with every kind of file: 120 documents of text, and things that are none."""
    folder = tmp_path / "notes"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / ".env").write_text("SECRET=1")
    for number in range(60):
        (folder / "deep" / f"{number}.md").write_text(f"# note {number}\n" * 20)
    records = [json.dumps({"text" if n % 2 else "content": f"record {n}"}) for n in range(40)]
    (folder / "deep" / "er" / "records.jsonl").write_text("\n".join(records) + "\n\n")
    write_groups(folder / "rows.parquet", [[f"row {n}" for n in range(20)], [None, ""]])
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin1.txt").write_bytes("é".encode("latin-1"))
    (folder / "half.gz").write_bytes(gzip.compress(os.urandom(1000))[:-10])
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "dangling").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    return folder


def make(source, num_files=-1, base=None):
    return dataset.make_local(str(source), num_files, base or dataset.get_data_dir())


def test_folder(notes, data_dir, capsys):
    main(Config(source=str(notes)))
    out = capsys.readouterr().out
    for reason in ("2 hidden", "2 no files", "1 binary", "1 not in UTF-8 (convert them: iconv", "1 damaged .gz"):
        assert reason in out
    train, val = texts("train"), texts("val")
    expected = [f"# note {n}\n" * 20 for n in range(60)]
    expected += [f"record {n}" for n in range(40)] + [f"row {n}" for n in range(20)]
    assert sorted(train + val) == sorted(expected)
    assert val
    assert train
    assert all(sources.content_hash(a) < sources.content_hash(b) for a in val for b in train)
    assert len(list_row_groups("train")) >= 8
    assert not (data_dir / ".building").exists()


def test_a_folder_mixed_with_recall_documents(notes, data_dir, capsys):
    wanted = {"recall_part": 0.75, "recall_chars": 1000, "recall_tables": 0, "recall_min_distance": 32}
    main(Config(source=str(notes), **wanted))
    documents = texts("train") + texts("val")
    generated = [text for text in documents if "What did they" in text]
    others = [text for text in documents if "What did they" not in text]
    assert sorted(others)[0] == "# note 0\n" * 20
    assert len(others) == 120
    assert sum(map(len, generated)) / sum(map(len, documents)) == pytest.approx(0.75, abs=0.03)
    assert len(set(generated)) == len(generated)
    main(Config(source=str(notes), **wanted))
    assert "reusing" in capsys.readouterr().out
    for other in ({}, wanted | {"recall_chars": 2000}):
        with pytest.raises(UserError, match="made with other options already"):
            main(Config(source=str(notes), **other))
    with pytest.raises(UserError, match="recall_part from 0 to below 1, got 1.0"):
        main(Config(source=str(notes), recall_part=1.0))


def test_short_recall_documents_come_first(notes, data_dir):
    main(Config(source=str(notes), recall_primer=30_000))
    told = [text.count("They ") > 10 for text in texts("train")]
    count = sum(told)
    assert told == [True] * count + [False] * (len(told) - count)
    assert 0.85 * 30_000 < sum(map(len, texts("train")[:count])) < 31_100


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_others_stand_between_the_texts(part):
    others = (f"o{n}" * 20 for n in itertools.count())
    mixed = list(sources.mixed(["x" * 300] * 50, others, part))
    own = [i for i, text in enumerate(mixed) if text[0] == "x"]
    assert len(own) == 50
    for last in own:  # whatever is read of it, both parts are right
        so_far = mixed[: last + 1]
        assert abs(sum(len(t) for t in so_far if t[0] == "o") - part / (1 - part) * 300 * (own.index(last))) < 100


def test_text_as_people_have_it(tmp_path):
    """Byte order marks, compression, linked folders, a column named content: read, each document once."""
    folder, other = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    other.mkdir()
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (folder / f"{encoding}.txt").write_bytes(f"näh {encoding}".encode(encoding))
    (folder / "a.txt.gz").write_bytes(gzip.compress("packed näh".encode()))
    (folder / "b.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "row 1"}\n{"content": "row 2"}\n'))
    with pa.output_stream(folder / "c.ndjson.zst") as file:
        file.write(json.dumps({"text": "row 3"}).encode("utf-8-sig"))
    write_groups(folder / "d.parquet", [["column content"]], name="content")
    (other / "linked.txt").write_text("linked")
    (other / "back").symlink_to(folder)
    for name in ("link", "link again"):
        (folder / name).symlink_to(other)
    make(folder)
    expected = ["näh utf-8-sig", "näh utf-16", "näh utf-32", "packed näh", "row 1", "row 2", "row 3"]
    assert sorted(texts("train") + texts("val")) == sorted([*expected, "column content", "linked"])


def test_a_folder_that_comes_out_empty_says_why(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(f"déjà vu {number}".encode("latin-1"))
    with pytest.raises(UserError, match=r"found none.*skipped: 3 not in UTF-8 \(convert them: iconv"):
        make(tmp_path)


def test_small_splits_have_enough_row_groups():
    """For 16 streams of two processes, say, in a Python of few files as Debian ships it."""
    for count in (1, 31, 32, 33, 63, 64, 65, 636, 2047, 2048, 2049, 5000):
        groups = list(sources.row_groups(str(n) for n in range(count)))
        assert [text for group in groups for text in group] == [str(n) for n in range(count)]
        assert len(groups) >= min(count, 32)
        assert max(map(len, groups)) <= 64


def test_row_groups_are_bounded_in_characters(monkeypatch):
    monkeypatch.setattr(sources, "GROUP_CHARS", 100)
    groups = list(sources.row_groups(["x" * 60] * 1000))
    assert sum(map(len, groups)) == 1000
    assert max(map(len, groups)) == 2


def test_long_texts_are_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARS", 100)
    text = "".join(f"line {n} äöü\n" for n in range(100))
    (tmp_path / "book.txt").write_text(text)
    pieces = list(sources.folder_documents([tmp_path / "book.txt"], {}))
    assert "".join(pieces) == text
    assert len(pieces) > 8
    assert all(piece.endswith("\n") and len(piece) < 120 for piece in pieces)


def test_validation_does_not_change_with_the_number_of_shards(notes, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_CHARS", 3000)
    monkeypatch.setattr(sources, "GROUP_CHARS", 500)
    seen = {}
    for count in (1, 3, -1):
        base = tmp_path / f"base{count}"
        record, _ = make(notes, count, base)
        names = [path.name for path in list_parquet_files(base)]
        assert names[-1] == VAL
        assert names[:-1] == [shard_name(n) for n in range(record["train"]["shards"])]
        assert count in (-1, len(names) - 1)
        seen[count] = {path.name: path.read_bytes() for path in list_parquet_files(base)}
    assert len(seen[-1]) > 4
    assert seen[1].items() < seen[3].items() < seen[-1].items()


def test_shards_grow_and_are_reused(notes, data_dir, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_CHARS", 3000)
    monkeypatch.setattr(sources, "GROUP_CHARS", 500)
    assert not make(notes, 2)[1]
    before = {path: path.stat().st_mtime_ns for path in list_parquet_files()}
    assert make(notes, 2)[1]
    assert make(notes, 1)[1]
    assert {path: path.stat().st_mtime_ns for path in list_parquet_files()} == before
    assert not make(notes, 3)[1]
    assert len(list_parquet_files()) == 4
    assert not make(notes, -1)[1]
    assert make(notes, -1)[1]
    assert make(notes, 1000)[1]  # there is no more text than this
    list_parquet_files()[1].unlink()  # what the message about a broken shard tells to do
    assert not make(notes, -1)[1]
    assert len(texts("train") + texts("val")) == 120


def test_what_a_killed_build_left_is_replaced(notes, data_dir):
    (data_dir / ".building").mkdir()
    (data_dir / ".building" / shard_name(5)).write_bytes(b"half")
    make(notes)
    assert [path.name for path in list_parquet_files()] == [shard_name(0), VAL]
    assert len(texts("train") + texts("val")) == 120


def test_two_makers_at_once(notes, data_dir):
    with ThreadPoolExecutor(2) as pool:
        reused = [job.result()[1] for job in [pool.submit(make, notes), pool.submit(make, notes)]]
    assert sorted(reused) == [False, True]
    assert len(texts("train") + texts("val")) == 120


def test_copies_of_a_text_stay_on_one_side(tmp_path):
    lines = [json.dumps({"text": f"text {n % 50}"}) for n in range(500)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "copies.jsonl").write_text("\n".join(lines))
    make(tmp_path / "in")
    assert set(texts("train")).isdisjoint(texts("val"))
    assert len(texts("train") + texts("val")) == 500


def test_every_split_gets_a_document(tmp_path):
    for number in range(20):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        (folder / "a.txt").write_text(f"a {number}")
        (folder / "b.txt").write_text(f"b {number}")
        make(folder, base=tmp_path / f"out{number}")
        assert len(texts("train", tmp_path / f"out{number}")) == 1
        assert len(texts("val", tmp_path / f"out{number}")) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "fine"', "broken JSON"),
        ('{"body": "x"}', "'text' or 'content'.*body"),
        ('{"text": 3}', "'text' or 'content'"),
        ('["text"]', "'text' or 'content'"),
        ("[" * 100_000, "broken JSON"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"x\.jsonl:3: .*{message}"):
        make(tmp_path / "in")
    assert not list(dataset.get_data_dir().glob("*.parquet"))


def test_half_a_surrogate_pair_becomes_text(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "c"}\n')
    make(tmp_path / "in")
    assert sorted(texts("train") + texts("val")) == ["a?b", "c"]


def test_sources_that_cannot_be(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="expected text, found none"):
        make(tmp_path / "in")
    (tmp_path / "in" / "a.txt").write_text("the only one")
    (tmp_path / "in" / "b.txt").write_text("the only one")
    with pytest.raises(UserError, match="two different documents"):
        make(tmp_path / "in")
    with pytest.raises(UserError, match="not a folder"):
        make(tmp_path / "nowhere")
    write_groups(tmp_path / "in" / "c.parquet", [["a"]], name="body")
    with pytest.raises(UserError, match=r"c\.parquet: .*got .body: string"):
        make(tmp_path / "in")
    (tmp_path / "in" / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"c\.parquet as parquet"):
        make(tmp_path / "in")


def test_two_sources_are_not_mixed(notes, tmp_path, data_dir):
    make(notes)
    before = {path: path.read_bytes() for path in data_dir.iterdir()}
    for other in ("stdlib", "hub", str(tmp_path)):
        with pytest.raises(UserError, match="set NANOCHAT_BASE_DIR to another folder, or remove") as error:
            main(Config(source=other, num_files=1))
        assert str(notes) in str(error.value)
    assert {path: path.read_bytes() for path in data_dir.iterdir()} == before
    (data_dir / "source.json").write_text("{")
    with pytest.raises(UserError, match=r"source\.json"):
        make(notes)
    (data_dir / "source.json").unlink()  # as in a cache folder of nanochat, whose shards came from the hub
    with pytest.raises(UserError, match="from source 'hub'"):
        make(notes)


def test_the_base_folder_is_not_its_own_source(tmp_path, data_dir):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    write_groups(data_dir.parent / "elsewhere.parquet", [["not this"]])
    make(tmp_path)
    assert sorted(texts("train") + texts("val")) == ["a", "b"]


def test_stdlib_is_real_and_deterministic(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    record, _ = make("stdlib", base=first)
    make("stdlib", base=again)
    assert record["train"]["characters"] + record["val"]["characters"] > 5_000_000
    assert 0.02 < record["val"]["documents"] / record["train"]["documents"] < 0.1
    assert [p.read_bytes() for p in list_parquet_files(first)] == [p.read_bytes() for p in list_parquet_files(again)]
    assert Path(contextlib.__file__).read_text() in texts("train", first) + texts("val", first)
    assert len(list_row_groups("val", first)) >= 8
    assert not any("site-packages" in path.parts for path in sources.stdlib_files())


# ---------------------------------------------------------------------------------------------------------
# Downloads


class Hub(http.server.ThreadingHTTPServer):
    """Imitates the hub: `…/resolve/main/<name>` states size and hash and redirects to `/cdn/<name>`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files = {}
        self.requests = []  # (name, first byte) of each transfer
        self.answer = lambda name, attempt: {}  # faults of a transfer: status, headers, cut, size, ranges, wait

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        content = self.server.files.get(self.path.rpartition("/")[2])
        if content is None:
            return self.reply(404)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": len(content), "X-Repo-Commit": "0" * 40}
        # Another host, since huggingface_hub follows redirects within its own.
        cdn = self.server.url.replace("127.0.0.1", "localhost")
        self.reply(302, Location=f"{cdn}/cdn/{self.path.rpartition('/')[2]}", **linked)

    def do_GET(self):
        hub, name = self.server, self.path.rpartition("/")[2]
        content = hub.files[name]
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").rstrip("-") or 0)
        attempt = len([1 for other, _ in hub.requests if other == name])
        hub.requests.append((name, start))
        fault = hub.answer(name, attempt)
        if "status" in fault:
            return self.reply(fault["status"], **fault.get("headers", {}))
        if not fault.get("ranges", True):
            asked, start = "", 0
        body = content[start : fault.get("size")]
        if "flip" in fault:
            body = body[: fault["flip"]] + bytes([body[fault["flip"]] ^ 1]) + body[fault["flip"] + 1 :]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if "cut" in fault:
            self.wfile.write(body[: fault["cut"]])
            self.wfile.flush()
            fault.get("wait", lambda: None)()
            if not fault.get("go_on"):
                return self.connection.close()
            body = body[fault["cut"] :]
        self.wfile.write(body)

    def reply(self, status, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Clock:
    """The module `time`, with waits that are noted instead of waited for."""

    def __init__(self):
        self.waits = []

    def sleep(self, seconds):
        self.waits.append(seconds)

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.fixture
def waits(monkeypatch):
    """What is waited for, in seconds, by us and by huggingface_hub."""
    clock = Clock()
    for module in (download, file_download, _http):
        monkeypatch.setattr(module, "time", clock)
    return clock.waits


def point_to(monkeypatch, url):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)


@pytest.fixture
def hub(monkeypatch, waits):
    """A running Hub with four training shards and the validation shard, in place of the real one."""
    server = Hub()
    for index in (0, 1, 2, 3, dataset.VAL_SHARD):
        buffer = io.BytesIO()
        write_groups(buffer, [[os.urandom(20_000).hex(), f"text {index}"]])
        server.files[shard_name(index)] = buffer.getvalue()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    point_to(monkeypatch, server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def sha(hub, index):
    return hashlib.sha256(hub.files[shard_name(index)]).hexdigest()


def fetched(hub, data_dir):
    """Names of the shards in the folder, after checking that they are whole."""
    for path in dataset.list_shards(data_dir):
        assert path.read_bytes() == hub.files[path.name]
    return [path.name for path in dataset.list_shards(data_dir)]


def test_a_flipped_bit_is_noticed_and_fetched_again(hub, data_dir, waits):
    hub.answer = lambda name, attempt: {"flip": 5000} if name == shard_name(0) and attempt < 2 else {}
    main(Config(num_files=1))
    assert fetched(hub, data_dir) == [shard_name(0), VAL]
    assert len(hub.requests) == 4
    hub.answer = lambda name, attempt: {"flip": 5000}
    with pytest.raises(UserError, match=rf"{shard_name(1)}: expected a file with the SHA-256 {sha(hub, 1)}, got"):
        main(Config(num_files=2))
    assert fetched(hub, data_dir) == [shard_name(0), VAL]


def test_download(hub, data_dir, capsys):
    main(Config(num_files=2))
    assert fetched(hub, data_dir) == [shard_name(0), shard_name(1), VAL]
    assert sorted(hub.requests) == [(shard_name(0), 0), (shard_name(1), 0), (VAL, 0)]
    assert "text 1822" in texts("val")
    main(Config(num_files=4))  # what is there is not fetched again, the validation split stays
    assert fetched(hub, data_dir) == [shard_name(index) for index in range(4)] + [VAL]
    assert len(hub.requests) == 5
    assert {path.suffix for path in data_dir.iterdir()} == {".parquet", ".json"}  # nothing is left over
    assert json.loads((data_dir / "source.json").read_text())["source"] == "hub"
    assert "5 shards" in capsys.readouterr().out


def test_what_is_there_is_no_reason_to_wait(hub, data_dir):
    """A recipe that is started again, while its first attempt still fetches the shards of pretraining."""
    main(Config(num_files=1))
    with locked(data_dir):
        main(Config(num_files=1))


def test_a_cut_connection_is_resumed_by_range(hub, data_dir):
    hub.answer = lambda name, attempt: {"cut": 1000} if attempt < 12 else {}  # far more cuts than retries
    main(Config(num_files=1))
    assert fetched(hub, data_dir) == [shard_name(0), VAL]
    starts = [start for name, start in hub.requests if name == VAL]
    assert starts == [1000 * n for n in range(13)]


def test_a_server_without_ranges(hub, data_dir):
    hub.answer = lambda name, attempt: {"ranges": False} | ({"cut": 1000} if attempt == 0 else {})
    main(Config(num_files=1))
    assert len(fetched(hub, data_dir)) == 2
    assert len(hub.requests) == 4  # from the start again, once


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(hub, data_dir, status):
    hub.answer = lambda name, attempt: {"status": status} if attempt < download.RETRIES else {}
    main(Config(num_files=1))
    assert len(fetched(hub, data_dir)) == 2


def test_waits_grow_and_retry_after_is_obeyed(hub, data_dir, waits):
    hub.answer = lambda name, attempt: {"status": 503} if name == VAL else {}
    with pytest.raises(UserError, match="503"):
        main(Config(num_files=1, num_workers=1))
    assert waits == [1, 2, 4, 8, 16]
    waits.clear()
    hub.answer = lambda name, attempt: {"status": 429, "headers": {"Retry-After": "17"}} if attempt == 6 else {}
    main(Config(num_files=1))
    assert waits == [18]  # and one more, for clocks that differ


def test_failures_are_listed_and_the_rest_is_kept(hub, data_dir):
    del hub.files[shard_name(1)]
    hub.answer = lambda name, attempt: {"status": 503} if name == shard_name(2) else {}
    with pytest.raises(UserError, match=r"(?s)2 could not.*run the same command again") as error:
        main(Config(num_files=4, num_workers=2))
    assert re.search(rf"{shard_name(1)}: .*404", str(error.value))
    assert re.search(rf"{shard_name(2)}: .*503", str(error.value))
    assert fetched(hub, data_dir) == [shard_name(0), shard_name(3), VAL]
    assert hub.requests.count((shard_name(2), 0)) == download.RETRIES + 1


def test_a_wrong_size_never_becomes_a_shard(hub, data_dir):
    hub.answer = lambda name, attempt: {"size": 1000} if name == shard_name(0) else {}
    with pytest.raises(UserError, match=rf"{shard_name(0)}: .*should be of size"):
        main(Config(num_files=1))
    assert fetched(hub, data_dir) == [VAL]
    hub.answer = lambda name, attempt: {}
    main(Config(num_files=1))
    assert fetched(hub, data_dir) == [shard_name(0), VAL]


def test_a_server_out_of_reach_is_given_up_soon(hub, data_dir):
    hub.answer = lambda name, attempt: {"status": 503}
    with pytest.raises(UserError, match=r"(?s)1823 could not be downloaded.*and 1803 more.*--source stdlib"):
        main(Config(num_workers=2))
    assert len(hub.requests) < 30


@pytest.mark.usefixtures("data_dir", "waits")
def test_no_connection_at_all(monkeypatch):
    point_to(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"Connection refused"):
        main(Config(num_files=1))


def test_a_full_disk_is_reported(hub, data_dir, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", no_space)
    with pytest.raises(UserError, match="No space left on device"):
        main(Config(num_files=1))
    assert not dataset.list_shards(data_dir)


@pytest.mark.parametrize("first_is_killed", [False, True], ids=["finishes", "killed"])
def test_two_processes_race_for_one_shard(hub, data_dir, first_is_killed):
    """One transfers, the other waits for it; then it finds the shard, or fetches it if the first was killed."""
    half, release = threading.Event(), threading.Event()

    def hold():
        half.set()
        release.wait(30)

    def answer(name, attempt):
        held = name == shard_name(0) and attempt == 0
        return {"cut": 1000, "wait": hold, "go_on": True} if held else {}

    hub.answer = answer
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "nanochat.dataset", "-n", "1"]

    def start():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

    def has_the_folder_open(pid):
        links = [file for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
        return data_dir.resolve() in [Path(os.readlink(link)) for link in links if link.exists()]

    with start() as first, start() as second:
        try:
            assert half.wait(60)
            for process in (first, second):
                wait_for(lambda pid=process.pid: has_the_folder_open(pid))
            time.sleep(0.3)  # a process that ignored the lock would now ask for the shard
            assert hub.requests.count((shard_name(0), 0)) == 1
            processes = [first, second]
            if first_is_killed:
                victim = next(p for p in processes if p.pid == pid_connected_to(hub, first, second))
                processes.remove(victim)
                victim.kill()
                victim.wait()
            release.set()
            for process in processes:
                output, _ = process.communicate(timeout=60)
                assert process.returncode == 0, output
        finally:
            release.set()
            for process in (first, second):
                process.kill()
    assert fetched(hub, data_dir) == [shard_name(0), VAL]
    assert {path.suffix for path in data_dir.iterdir()} == {".parquet", ".json"}
    assert hub.requests.count((shard_name(0), 0)) == (2 if first_is_killed else 1)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def pid_connected_to(hub, *processes):
    """The pid of the process that has an open connection to the hub."""
    port = hub.server_address[1]
    for process in processes:
        connections = psutil.Process(process.pid).net_connections("tcp")
        if any(c.raddr and c.raddr.port == port and c.status == "ESTABLISHED" for c in connections):
            return process.pid
    raise AssertionError("nobody is connected")
