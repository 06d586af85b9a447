"""A chat server whose answers share steps: each client gets its own, whoever comes and goes beside it."""

import asyncio
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanochat.engine import Batch, Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.sampling import Sampling
from nanochat.serving import job as jobs
from nanochat.serving.job import Answer, Done, Job, Outbox, Piece
from nanochat.tokenizer import stream_parts
from tests.helpers import until
from tests.helpers_server import MODEL, Script, ask, said, send_raw

BATCH = 4


@pytest.fixture(scope="module")
def engine(tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=256, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Engine(model, tokenizer, dtype=torch.float64)  # so that no two tokens are as likely but for rounding


def request(number):
    """Requests that differ in all that is a row's own."""
    pick = random.Random(number)
    return {
        "messages": [{"role": "user", "content": "word " * pick.randint(1, 30) + str(number)}],
        "max_tokens": pick.randint(1, 40),
        "temperature": pick.choice([0, 0.7, 1.0]),
        "top_k": pick.choice([5, 50]),
        "seed": number,
    }


def alone(engine, body):
    settings = {name: body[name] for name in ("max_tokens", "temperature", "top_k", "seed")}
    prompt = engine.tokenizer.render_for_completion({"messages": body["messages"]})
    return "".join(text for _, text in stream_parts(engine.tokenizer, engine.generate(prompt, **settings)))


@pytest.fixture
def sizes(monkeypatch):
    """How many streams there were at each step."""
    seen, step = [], Batch.step
    monkeypatch.setattr(Batch, "step", lambda self: (seen.append(len(self)), step(self))[1])
    return seen


def test_each_client_gets_its_own_answer(serve, engine, sizes):
    server = serve(engine, batch_size=BATCH)
    bodies = [request(number) for number in range(24)]
    with ThreadPoolExecutor(12) as clients:
        replies = list(clients.map(lambda body: ask(server, **body), bodies))
    assert [said(one) for one in replies] == [alone(engine, body) for body in bodies]
    assert max(sizes) == BATCH
    assert sum(sizes) > 1.5 * len(sizes)  # steps were shared, and not now and then only


def test_log_probabilities_are_of_ones_own_row(serve, engine):
    """As many as each asks for, equal to those of a server that answers one at a time."""
    prompts = ["once upon", "a time there", "was", "a row of four"]

    def complete(server, number):
        body = {"prompt": prompts[number], "max_tokens": 8, "logprobs": number, "temperature": 0, "model": MODEL.id}
        choice = server.client.post("/v1/completions", json=body).json()["choices"][0]
        return choice["text"], choice["logprobs"]

    shared, single = serve(engine, batch_size=BATCH), serve(engine, batch_size=1)
    with ThreadPoolExecutor(BATCH) as clients:
        got = list(clients.map(lambda number: complete(shared, number), range(BATCH)))
    for number, (text, probabilities) in enumerate(got):
        expected_text, expected = complete(single, number)
        assert text == expected_text
        assert probabilities["tokens"] == expected["tokens"]
        assert probabilities["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-4)
        assert all(len(top) >= min(number, 1) for top in probabilities["top_logprobs"] or [])


def test_clients_leave_at_every_moment(serve, engine):
    """Those that stay are answered in full and as if they were alone; nothing of the others stays behind."""
    server = serve(engine, batch_size=BATCH)
    staying, pick = [request(number) for number in range(8)], random.Random(0)
    done = threading.Event()

    def leave():
        while not done.is_set():
            with send_raw(server, {**request(pick.randint(100, 200)), "max_tokens": 200}) as connection:
                connection.settimeout(pick.choice([0.001, 0.005, 0.02, 0.1]))
                try:
                    for _ in range(pick.randint(0, 5)):
                        connection.recv(1000)
                except TimeoutError:
                    pass

    threads = [threading.Thread(target=leave) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        replies = [ask(server, **body) for body in staying]
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert [said(one) for one in replies] == [alone(engine, body) for body in staying]
    until(server.pool.is_idle)
    [worker] = server.pool.workers
    assert (len(worker.batch), worker.batch.caches.rows, worker.batch.sampler.rows, worker.making) == (0, [], [], {})
    totals = server.pool.totals
    assert totals["failed"] == 0
    assert totals["cancelled"] > 3
    assert totals["completed"] + totals["cancelled"] == totals["requests"]


def test_a_short_answer_does_not_wait_for_a_long_one(serve, tokenizer):
    script = Script(tokenizer, "x", endless=True, each=0.001)
    server = serve(script, batch_size=2)
    with send_raw(server, {"messages": [{"role": "user", "content": "long"}], "max_tokens": 4000}) as long:
        long.recv(100)
        assert said(ask(server, max_tokens=5)) == "xxxxx"
        assert server.pool.stats()["workers"][0]["answers"] == 1  # the long one
    until(server.pool.is_idle)


def test_scoring_a_prompt_holds_up_nobody(serve, engine, monkeypatch):
    """Prompts whose own probabilities are asked for are read in parts, between the steps of those that answer."""
    log, step, part = [], Batch.step, jobs.ranked
    monkeypatch.setattr(Batch, "step", lambda self: (log.append("step"), step(self))[1])
    monkeypatch.setattr(jobs, "ranked", lambda *args: (log.append("part"), part(*args))[1])
    monkeypatch.setattr(jobs, "SCORED_AT_ONCE", 8)
    server = serve(engine, batch_size=BATCH)
    long = {"messages": [{"role": "user", "content": "long"}], "max_tokens": 200, "temperature": 2, "seed": 1}
    bodies = [{"prompt": f"{i} of many words" * 8, "max_tokens": 0, "echo": True, "logprobs": 1} for i in range(3)]
    with ThreadPoolExecutor(BATCH) as clients:
        answering = clients.submit(ask, server, **long)
        until(lambda: "step" in log)
        scored = list(clients.map(lambda body: server.client.post("/v1/completions", json=body).json(), bodies))
        assert said(answering.result()) == alone(engine, long | {"top_k": 50})
    for one in scored:
        found = one["choices"][0]["logprobs"]
        assert len(found["tokens"]) == len(found["token_logprobs"]) > 50
    order = "".join("s" if entry == "step" else "p" for entry in log)
    assert order.count("p") > 18
    assert "pp" not in order.rstrip("p").lstrip("p")[: order.rfind("s") + 1]
    until(server.pool.is_idle)


def test_many_short_prompts_are_read_in_one_step(engine):
    """As many as are no more than a part of a long one, so that the last of them does not wait for as many steps."""
    batch = engine.batch()
    streams = [batch.add([1] * 50, 9, Sampling()) for _ in range(8)]
    long = batch.add([2] * 200, 9, Sampling())
    assert [stream for stream, *_ in batch.step()] == streams[:6]  # 50 tokens each, of at most 256
    assert {stream for stream, *_ in batch.step()} == {*streams, long}


def test_one_fault_costs_one_answer(serve, engine, monkeypatch, caplog):
    """A row whose tokens cannot be shown fails; those that share its steps do not notice."""
    server = serve(engine, batch_size=BATCH)
    bodies, take = [request(number) for number in (3, 4, 5)], Answer.take
    expected = [alone(engine, body) for body in bodies]
    bad = {**request(9), "temperature": 0, "max_tokens": 3}

    def broken_take(self, id, *rank):
        if self.job.sampling.seed == 9:
            raise RuntimeError("on purpose")
        return take(self, id, *rank)

    monkeypatch.setattr(Answer, "take", broken_take)
    with ThreadPoolExecutor(4) as clients:
        failing = clients.submit(ask, server, **bad)
        replies = list(clients.map(lambda body: ask(server, **body), bodies))
    assert failing.result()[-1] == {"error": "the model failed on this request"}
    assert [said(one) for one in replies] == expected
    assert caplog.text.count("RuntimeError: on purpose") == 1


def test_a_step_that_fails_costs_its_answers_and_not_the_worker(serve, engine, monkeypatch, caplog):
    server, real = serve(engine, batch_size=BATCH), Batch.step
    broken = threading.Event()

    def step(self):
        if broken.is_set() and len(self) > 1:
            raise MemoryError("on purpose")
        return real(self)

    monkeypatch.setattr(Batch, "step", step)
    broken.set()
    with ThreadPoolExecutor(4) as clients:
        replies = list(clients.map(lambda number: ask(server, **{**request(number), "max_tokens": 200}), range(4)))
    assert sum(reply[-1] == {"error": "the model failed on this request"} for reply in replies) >= 2
    broken.clear()
    assert said(ask(server, **request(1))) == alone(engine, request(1))
    until(server.pool.is_idle)


def test_a_cancelled_answer_that_cannot_be_removed_does_not_cost_the_worker(serve, engine, monkeypatch, caplog):
    """Taking a row out moves memory, which may be short."""
    server, real, step = serve(engine, batch_size=BATCH), Batch.remove, Batch.step
    failed = threading.Event()
    monkeypatch.setattr(Batch, "step", lambda self: (time.sleep(0.01), step(self))[1])  # so that it is not over before

    def remove(self, stream):
        if not failed.is_set():
            failed.set()
            raise MemoryError("on purpose")
        real(self, stream)

    monkeypatch.setattr(Batch, "remove", remove)
    with send_raw(server, {**request(1), "max_tokens": 200}) as connection:
        while b"token" not in connection.recv(1000):  # the worker has begun
            pass
    assert failed.wait(10)
    until(server.pool.is_idle)
    assert said(ask(server, **request(1))) == alone(engine, request(1))


# ---------------------------------------------------------------------------------------------------------
# What goes out together


def heard(job):
    """The events that have reached the job's queue."""
    found = []
    while True:
        try:
            found.append(job.events.get_nowait()[1])
        except asyncio.QueueEmpty:
            return found


def test_events_of_a_step_go_out_together():
    async def run():
        outbox = Outbox()
        one, two = (Job([1], 9, outbox=outbox) for _ in range(2))
        one.emit(Piece("text", "a", 0))
        two.emit(Piece("text", "x", 0))
        one.emit(Done("stop"))
        await asyncio.sleep(0)
        assert (heard(one), heard(two)) == ([], [])
        outbox.send()
        await asyncio.sleep(0)
        assert (heard(one), heard(two)) == ([Piece("text", "a", 0), Done("stop")], [Piece("text", "x", 0)])
        assert not outbox

    asyncio.run(run())


def test_events_reach_their_own_loop():
    """Jobs of two event loops share an outbox."""
    outbox, results = Outbox(), []

    async def wait(name, ready, go):
        job = Job([1], 9, outbox=outbox)
        job.emit(Piece("text", name, 0))
        ready.set()
        await asyncio.to_thread(go.wait)
        results.append((await job.events.get())[1].text)

    go, threads = threading.Event(), []
    for name in "ab":
        ready = threading.Event()
        threads.append(threading.Thread(target=asyncio.run, args=(wait(name, ready, go),)))
        threads[-1].start()
        assert ready.wait(10)
    outbox.send()
    go.set()
    for thread in threads:
        thread.join(10)
    assert sorted(results) == ["a", "b"]
