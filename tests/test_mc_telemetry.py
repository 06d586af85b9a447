"""Telemetry: the tables, a real collector, and collectors that misbehave."""

import ast
import asyncio
import contextlib
import json
import logging
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import rotel

from megacontext.telemetry.endpoint import Endpoint, open_telemetry, parse_endpoint
from megacontext.telemetry.events import EVENTS, METRICS, metric_of
from nanochat.common import UserError
from nanochat.loop import RunLog
from nanochat.sampling import Sampling
from nanochat.serving.job import Done, Job, Piece
from nanochat.serving.worker_pool import WorkerPool
from scripts.chat_web import chat_attributes, chat_text
from tests.helpers import ROOT, Told, free_port, until
from tests.helpers_server import MODEL, Script

TIMING = {"step": 3, "milliseconds": 40.0}
SNAPSHOT = {"entries": 40, "budget": 64, "lod_count/0": 32, "lod_count/1": 8}


@pytest.fixture
def opened(monkeypatch):
    """opened(endpoint): telemetry that is closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def start(endpoint, **others):
            for name, value in {"MC_OTEL_ENDPOINT": endpoint, "MC_OTEL_INSECURE": "1", **others}.items():
                monkeypatch.setenv(name, value)
            return stack.enter_context(contextlib.closing(open_telemetry("base_train", "d4", {"device": "cpu"})))

        yield start


# ---------------------------------------------------------------------------------------------------------
# What is asked for, and what it is called


@pytest.mark.parametrize(
    ("text", "insecure", "endpoint"),
    [
        ("http://localhost:4318", False, Endpoint("http", "http://localhost:4318")),
        ("http://localhost:4318/", True, Endpoint("http", "http://localhost:4318", verify=False)),
        ("https://collect.example/otlp", False, Endpoint("http", "https://collect.example/otlp", tls=True)),
        ("http://localhost:4317", False, Endpoint("grpc", "localhost:4317")),
        ("https://localhost:4317", False, Endpoint("grpc", "localhost:4317", tls=True)),
        ("grpc://collector", True, Endpoint("grpc", "collector:4317")),
        ("grpc://collector:9000", False, Endpoint("grpc", "collector:9000", tls=True)),
        ("file:a/b.jsonl", False, Endpoint("file", "a/b.jsonl")),
        ("file:///tmp/b.jsonl", False, Endpoint("file", "/tmp/b.jsonl")),
    ],
)
def test_endpoints(text, insecure, endpoint):
    assert parse_endpoint(text, insecure) == endpoint


@pytest.mark.parametrize("text", ["localhost:4318", "4318", "ftp://host", "http://", "http://host:port", "file:", "?"])
def test_endpoints_that_make_no_sense(text):
    with pytest.raises(UserError, match="MC_OTEL_ENDPOINT must be like http://localhost:4318"):
        parse_endpoint(text)


def test_names_of_metrics():
    assert metric_of("mc/lod_count/2") == ("mc.lod_count", {"lod": 2})
    assert metric_of("train/tok_per_sec") == ("train.tok_per_sec", {})
    assert metric_of("pass@8") == ("pass", {"k": 8})
    assert metric_of("metrics/ARC-Easy") == ("metrics.ARC_Easy", {})


def strings_of(path):
    """Texts in a module; what an f-string fills in becomes {lod}. Docstrings are left out."""
    tree = ast.parse(path.read_text("utf-8"))
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(node.value)
        if isinstance(node, ast.JoinedStr):
            inside |= set(node.values)
            yield "".join(part.value if isinstance(part, ast.Constant) else "{lod}" for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.value


def our_strings():
    paths = [*ROOT.glob("megacontext/**/*.py"), *ROOT.glob("scripts/*.py"), ROOT / "nanochat" / "training.py"]
    return {text for path in paths if path.parent.name != "telemetry" for text in strings_of(path)}


def test_the_log_has_what_the_table_says():
    """Every key that a training script logs is in the table, and the other way round."""
    logged = {text for text in our_strings() if re.fullmatch(r"(train|val|mc)/[\w{}/]+", text)}
    others = {key for key in METRICS if "/" not in key}
    assert logged == set(METRICS) - others
    assert others <= our_strings()


def test_a_step_of_training_tells_its_events():
    """From the record of the log alone; a record without MegaContext tells of none."""
    told = Told()
    record = {"step": 7, "train/loss": 2.0, "mc/tree_tokens": 512, "mc/wc_entries": 200, "mc/time_controller_ms": 40.0}
    told.metrics({**record, "mc/lod_count/0": 190.5, "mc/lod_count/1": 9.5, "val/mc_context_gain": None})
    told.metrics({"step": 8, "train/loss": 2.0})
    assert told.events == [
        ("mc_tree_snapshot", {"step": 7, "num_tokens": 512}),
        ("working_context_snapshot", {"step": 7, "entries": 200, "lod_count.0": 190.5, "lod_count.1": 9.5}),
        ("mc_timing", {"step": 7, "milliseconds": 40.0}),
    ]


def test_what_is_not_in_the_table_is_our_mistake(opened):
    telemetry = opened("")
    telemetry.event("mc_timing", TIMING)
    with pytest.raises(KeyError, match="prompt"):
        telemetry.event("chat", {"prompt": "my secret"})
    with pytest.raises(KeyError, match="mc_time"):
        telemetry.event("mc_time", {})


# ---------------------------------------------------------------------------------------------------------
# None, and JSON lines


def test_without_an_endpoint_nothing_is_loaded():
    code = (
        "import sys; from megacontext.telemetry.endpoint import open_telemetry as o; t = o('base_train', 'd4')\n"
        "t.event('mc_timing', {'milliseconds': 1.0}); t.metrics({'step': 1}); t.close()\n"
        "assert not [m for m in sys.modules if m.startswith(('opentelemetry', 'grpc'))]"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MC_OTEL_ENDPOINT"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=60)


def test_other_ranks_tell_nothing(tmp_path, opened):
    path = tmp_path / "events.jsonl"
    opened(f"file:{path}", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2").metrics({"step": 1})
    assert not path.exists()


def test_json_lines(tmp_path, opened):
    path = tmp_path / "deep" / "events.jsonl"
    telemetry = opened(f"file:{path}")
    telemetry.event("working_context_snapshot", {**SNAPSHOT, "step": None})
    telemetry.event("mc_timing", {"step": math.nan, "milliseconds": 250.0})
    telemetry.metrics({"step": 1, "train/loss": math.inf, "val/bpb": 2.5, "train/mfu": None})
    first, second, third = map(json.loads, path.read_text().splitlines())
    assert first | {"time": 0} == {
        **{"time": 0, "service": "base_train", "run": "d4", "device": "cpu"},
        **{"event": "working_context_snapshot", "seconds": 0.0},
        **{"entries": 40, "budget": 64, "lod_count.0": 32, "lod_count.1": 8},
    }
    assert second["seconds"] == 0.25
    assert "step" not in second
    assert third["metrics"] == {"step": 1, "val/bpb": 2.5}
    with pytest.raises(UserError, match="cannot write to /proc/none"):
        opened("file:/proc/none/x")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full, of Linux")
def test_a_full_disk_is_told_once(opened, capsys):
    telemetry = opened("file:/dev/full")
    for _ in range(2):
        telemetry.event("mc_timing", TIMING)
        telemetry.metrics({"step": 1})
    assert capsys.readouterr().out == "the run continues without /dev/full: No space left on device\n"


def test_a_log_is_handed_on(tmp_path, base_dir, opened):
    log = RunLog("base", "d1", "dummy", {}, resumed=False)
    log.listen(opened(f"file:{tmp_path / 'e.jsonl'}"))
    log.log({"step": 1, "train/loss": 2.0})
    log.finish()
    assert json.loads((tmp_path / "e.jsonl").read_text())["metrics"] == {"step": 1, "train/loss": 2.0}


# ---------------------------------------------------------------------------------------------------------
# A real collector


class Collector:
    """rotel, which writes what it receives to a log in plain words."""

    def __init__(self, folder):
        self.log = folder / "collector.log"
        self.http, self.grpc = free_port(), free_port()
        command = [Path(rotel.__file__).parent / "rotel-agent", "start", "--pid-file", folder / "pid"]
        command += ["--exporter", "blackhole", "--debug-log-verbosity", "detailed"]
        command += ["--debug-log", "traces", "--debug-log", "metrics"]
        command += ["--otlp-http-endpoint", f"127.0.0.1:{self.http}", "--otlp-grpc-endpoint", f"127.0.0.1:{self.grpc}"]
        with open(self.log, "wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        until(lambda: self.listens(self.http) and self.listens(self.grpc))

    def listens(self, port):
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    def received(self, *parts):
        """Waits until all these texts are in the log; returns it."""
        until(lambda: all(part in self.log.read_text() for part in parts))
        return self.log.read_text()

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def collector(tmp_path):
    collector = Collector(tmp_path)
    yield collector
    collector.stop()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_collector_gets_spans_and_metrics(protocol, collector, opened, caplog):
    telemetry = opened(f"{protocol}://127.0.0.1:{getattr(collector, protocol)}")
    telemetry.event("mc_tree_snapshot", {"num_tokens": 512, "bytes": 4096})
    telemetry.event("working_context_snapshot", SNAPSHOT)
    telemetry.event("focus_allocator", {"expansions": 2, "collapses": 1, "swap_rate": 0.075, "score_mean": -0.25})
    telemetry.event("mc_timing", TIMING)
    telemetry.event("inference_update", {"entries_read": 12, "milliseconds": 7.5})
    telemetry.metrics({"step": 3, "train/loss": 2.125, "mc/lod_count/1": 8.5, "train/mfu": None})
    telemetry.close()
    log = collector.received("mc_tree_snapshot", "Name: train.loss", "Name: mc.swap_rate")
    for name in EVENTS.keys() - {"chat"}:
        assert f"Name           : {name}\n" in log
    assert "-> milliseconds: Double(40)" in log
    assert "-> lod_count.1: Int(8)" in log
    assert "-> bytes: Int(4096)" in log
    assert "service.name: Str(base_train)" in log
    assert "service.instance.id: Str(d4)" in log
    assert "device: Str(cpu)" in log
    start, end = (int(re.search(f"mc_timing.*?{edge} time: (\\d+)", log, re.S)[1]) for edge in ("Start", "End"))
    assert abs(end - start - 40_000_000) < 1000
    assert "2.125" in log
    assert re.search(r"Name: mc.lod_count.*?lod: Int\(1\).*?Value: 8.5", log, re.S)
    assert re.search(r"Name: mc.wc_lod_count.*?lod: Int\(0\).*?Value: 32", log, re.S)
    assert "Description: entries of a level in a working context" in log
    assert "train.mfu" not in log
    assert not warnings(caplog)


def test_text_of_a_chat_is_told_if_asked_for(tokenizer):
    async def job():
        return Job(tokenizer.encode("my secret"), 9, ids=tokenizer.encode('Tell "nobody".'))

    told = chat_text(asyncio.run(job()), tokenizer)
    assert told.keys() <= EVENTS["chat"].keys()
    (asked,), (answer,) = (json.loads(text) for text in told.values())
    assert (asked["role"], asked["parts"]) == ("user", [{"type": "text", "content": "my secret"}])
    assert (answer["role"], answer["parts"]) == ("assistant", [{"type": "text", "content": 'Tell "nobody".'}])


def test_a_chat_request_becomes_a_span(tokenizer, collector, opened):
    """Through a worker: usage, times and settings arrive, and not a word of the conversation."""
    telemetry = opened(f"http://127.0.0.1:{collector.http}")
    outcomes = []

    def on_end(job, outcome):
        outcomes.append(outcome)
        telemetry.event("chat", chat_attributes(job, outcome, pool.model.id), time.monotonic() - job.created)

    pool = WorkerPool(on_end=on_end)
    engine = Script(tokenizer, "Tell nobody.")
    pool.start([engine], MODEL)

    async def ask(prompt, **settings):
        job = Job(tokenizer.encode(prompt), sampling=Sampling(0.5, 7), **{"max_tokens": 99, **settings})
        pool.submit([job])
        while isinstance(event := (await job.events.get())[1], Piece):
            pass
        return event

    try:
        assert asyncio.run(ask("my secret")) == Done("stop")
        assert asyncio.run(ask("my secret", max_tokens=1)) == Done("length")
        engine.fault = ValueError("broken")
        asyncio.run(ask("my secret"))
        until(lambda: len(outcomes) == 3)
    finally:
        pool.drain()
        pool.close()
    telemetry.close()
    assert outcomes == ["stop", "length", "failed"]
    log = collector.received(f"Name           : chat {MODEL.id}", "gen_ai.server.time_to_first_token")
    prompt, answer = len(tokenizer.encode("my secret")), len(tokenizer.encode("Tell nobody.")) + 1
    for text in (
        "gen_ai.operation.name: Str(chat)",
        "gen_ai.provider.name: Str(nanochat)",
        f"gen_ai.request.model: Str({MODEL.id})",
        f"gen_ai.usage.input_tokens: Int({prompt})",
        f"gen_ai.usage.output_tokens: Int({answer})",
        "gen_ai.request.max_tokens: Int(99)",
        "gen_ai.response.time_to_first_chunk: Double(",
        "gen_ai.conversation.compacted: Bool(false)",
        "error.type: Str(worker)",
        "STATUS_CODE_ERROR",
        "Name: gen_ai.server.request.duration",
    ):
        assert text in log
    assert log.count("gen_ai.response.finish_reasons") == 3
    assert "secret" not in log
    assert "nobody" not in log


# ---------------------------------------------------------------------------------------------------------
# Collectors that misbehave


@contextlib.contextmanager
def refusing():
    yield free_port()


@contextlib.contextmanager
def black_hole():
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in taken:
            connection.close()


class Always503(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(503)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def unavailable():
    with ThreadingHTTPServer(("127.0.0.1", 0), Always503) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


FAULTS = [("http", refusing), ("http", black_hole), ("http", unavailable), ("grpc", refusing), ("grpc", black_hole)]


def tell(telemetry, steps, pause=0.0):
    """Steps of training as they are told of: milliseconds of each call."""
    times = []
    for step in range(steps):
        started = time.perf_counter()
        telemetry.event("mc_timing", TIMING)
        times.append(time.perf_counter() - started)
        started = time.perf_counter()
        telemetry.metrics({"step": step, "train/loss": 2.0, "mc/lod_count/0": 3.0})
        times.append(time.perf_counter() - started)
        time.sleep(pause)
    return [1000 * t for t in times]


def warnings(caplog):
    """What a person gets to see; caplog also has what the SDK says and telemetry keeps to itself."""
    return [record.getMessage() for record in caplog.records if not record.name.startswith("opentelemetry")]


@pytest.mark.parametrize(("protocol", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_costs_neither_time_nor_the_end(protocol, fault, opened, caplog):
    with fault() as port, caplog.at_level(logging.WARNING):
        telemetry = opened(f"{protocol}://127.0.0.1:{port}")
        times = tell(telemetry, 300, pause=0.005)  # long enough for sending to have begun
        times += tell(telemetry, 3000)  # more than the queue holds
        started = time.monotonic()
        telemetry.close()
        assert time.monotonic() - started < 3
        assert statistics.median(times) < 1
        (warning,) = warnings(caplog)
        assert f"127.0.0.1:{port} does not accept telemetry" in warning


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_collector_that_dies(protocol, collector, opened, caplog):
    telemetry = opened(f"{protocol}://127.0.0.1:{getattr(collector, protocol)}")
    telemetry.event("mc_timing", TIMING)
    collector.received("mc_timing")
    collector.stop()
    times = tell(telemetry, 300, pause=0.005)
    started = time.monotonic()
    telemetry.close()
    assert time.monotonic() - started < 3
    assert statistics.median(times) < 1
    assert len(warnings(caplog)) == 1


def test_a_process_ends_though_its_collector_hangs():
    """Also one that an error ends, before it could close anything."""
    code = (
        "import time; from megacontext.telemetry.endpoint import open_telemetry as o; t = o('base_train', 'd4')\n"
        "for i in range(3000): t.event('mc_timing', {'step': i}); t.metrics({'step': i})\n"
        "time.sleep(1.5); print(time.time(), flush=True); raise SystemExit(3)"
    )

    def seconds_to_end(endpoint):
        environment = {**os.environ, "MC_OTEL_ENDPOINT": endpoint, "MC_OTEL_INSECURE": "1"}
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        ended = time.time()
        assert result.returncode == 3, result.stderr
        assert len(result.stderr.splitlines()) == (1 if endpoint else 0), result.stderr
        return ended - float(result.stdout)

    without = seconds_to_end("")  # a process with PyTorch takes its time anyway
    with black_hole() as port:
        assert seconds_to_end(f"http://127.0.0.1:{port}") < without + 4
        assert seconds_to_end(f"grpc://127.0.0.1:{port}") < without + 4
